"""Random arrays in place of data."""

import dataclasses

import numpy as np
import pytest

from gen.config import from_json, to_json
from gen.data.images import Images
from gen.data.loader import expect
from gen.data.random import RANDOM, Random
from gen.errors import GenError
from gen.experiments import build

SHAPES = {"latent": (4, 4, 2), "label": (), "text": (3, 8), "text_mask": (3,)}


def test_rows_have_the_shapes_and_types_that_are_asked_for() -> None:
    data = Random(SHAPES)
    assert from_json(to_json(data), Random) == data
    expect(RANDOM, data.source(), **SHAPES)
    batch = next(data.batches(batch=8, seed=0, start=0))
    again = next(data.batches(batch=4, seed=0, start=0, process=1, processes=2))
    assert {name: (array.shape[1:], array.dtype.name) for name, array in batch.items()} == {
        "latent": ((4, 4, 2), "float32"),
        "label": ((), "int32"),
        "text": ((3, 8), "float32"),
        "text_mask": ((3,), "bool"),
    }
    np.testing.assert_array_equal(again["latent"], batch["latent"][2:4])
    assert batch["latent"].std() == pytest.approx(1.0, abs=0.1)
    assert {name: array.tolist() for name, array in data.normalizer().items()} == {"shift": [0, 0], "scale": [1, 1]}


def test_images_of_the_size_that_is_asked_for() -> None:
    data = Images(RANDOM, 8, flip=True)
    batch = next(data.batches(batch=4, seed=0, start=0))
    assert batch["image"].shape == (4, 8, 8, 3)
    assert batch["image"].dtype == np.uint8
    assert data.identity() != Images(RANDOM, 16).identity()
    texts = Images(RANDOM, 8, labels="text", width=5, length=2).source()
    assert {name: array.shape for name, array in texts[0].items()} == {
        "image": (8, 8, 3),
        "text": (2, 5),
        "text_mask": (2,),
    }
    with pytest.raises(GenError, match="random images have the size that is asked for; set size"):
        Images(RANDOM).source()
    with pytest.raises(GenError, match="random text has the width that the model takes; set width"):
        Images(RANDOM, 8, labels="text").source()


def test_presets_take_them_as_they_take_latents() -> None:
    stage = build("dit-b2", {"data": RANDOM}).config.stages[0]
    assert stage.data.shapes == {"latent": (32, 32, 4), "label": ()}
    row = next(stage.data.batches(batch=1, seed=0, start=0))
    stage.task.check(row)
    assert "random" in dataclasses.replace(stage).data.identity()
