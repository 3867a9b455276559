"""Bits per image: from logits, whatever the batch; against tokens by themselves; and from the command line."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from gen import arrays
from gen.autoregressive.likelihood import bits_of_rows, coin_bits, unigram_bits
from gen.autoregressive.sampler import TokenSampler
from gen.cli import main
from gen.config import to_json
from gen.data.caches import TokenCache, seal_tokens
from gen.errors import GenError
from gen.files import write_json
from gen.training.run import RunConfig
from gen.training.task import Model
from tests.autoregressive.caches import token_cache
from tests.autoregressive.test_writers import TOYS, noisy

MODEL = dataclasses.replace(TOYS["gpt"], shape=(2, 2), vocabulary=3, depth=1)


class Masked(type(MODEL)):
    exact = False


def test_probabilities_of_all_images_add_up(tmp_path: Path) -> None:
    """And rows are scored whatever the batch."""
    every = np.array(list(itertools.product(range(3), repeat=4)), np.int32).reshape(-1, 2, 2)
    folder = tmp_path / "all"
    folder.mkdir()
    np.save(folder / "tokens.npy", every)
    np.save(folder / "label.npy", np.ones(len(every), np.int32))
    path = seal_tokens(folder, vocabulary=3, tokenizer="none", data="none").path
    params = {"net": noisy(MODEL)}
    bits = bits_of_rows(MODEL, params, TokenCache(path).source(), batch=50)
    assert bits.shape == (81,)
    assert np.sum(2.0**-bits) == pytest.approx(1.0, abs=1e-5)


def test_unigrams() -> None:
    trained = np.array([[0, 0], [0, 1]])
    np.testing.assert_allclose(
        unigram_bits(trained, np.array([[0, 2], [1, 1]]), 3), [-np.log2(4 / 7) - np.log2(1 / 7), -2 * np.log2(2 / 7)]
    )


def test_coins() -> None:
    trained = np.array([[[0, 1]], [[0, 0]]], np.uint8)
    np.testing.assert_allclose(coin_bits(trained, np.array([[[0, 1]], [[1, 0]]])), [-np.log2(3 / 8), -np.log2(1 / 8)])


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, params = tmp_path / "run", noisy(MODEL)
    arrays.save(run / "artifacts" / "net.safetensors", jax.device_get(params), {"origin": "here"})
    write_json(run / "config.json", to_json(RunConfig("toy", sampler=TokenSampler(), models={"net": Model(MODEL)})))
    data = token_cache(tmp_path / "c", (2, 2), 3)
    assert main(["evaluate", str(run), "--measures", "likelihood", "--heldout", data]) == 0
    assert "bits_per_image" in capsys.readouterr().out
    found = json.loads((run / "likelihood.json").read_text())
    expected = bits_of_rows(MODEL, {"net": params}, TokenCache(data).source()).mean()
    assert found["values"]["bits_per_image"] == pytest.approx(expected)
    assert found["values"]["bits_per_token"] == pytest.approx(expected / 4)
    assert found["protocol"]["count"] == 8
    wrong = {
        "a vocabulary of 16, and the model one of 3": token_cache(tmp_path / "d", (2, 2)),
        r"tokens \(4, 4\) of an image": token_cache(tmp_path / "e", (4, 4), 3),
    }
    for message, other in wrong.items():
        assert main(["evaluate", str(run), "--measures", "likelihood", "--heldout", other]) == 2
        assert message.replace("\\", "") in capsys.readouterr().err
    assert main(["evaluate", str(run), "--measures", "likelihood", "kid", "--heldout", data]) == 2
    assert "alone" in capsys.readouterr().err


def test_a_model_of_no_order_has_none(tmp_path: Path) -> None:
    data = token_cache(tmp_path / "c", (2, 2), 3)
    model = Masked(**{f.name: getattr(MODEL, f.name) for f in dataclasses.fields(MODEL)})
    with pytest.raises(GenError, match="has no likelihood"):
        bits_of_rows(model, {"net": noisy(MODEL)}, TokenCache(data).source())
