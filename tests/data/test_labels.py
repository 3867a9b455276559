"""Labels and text are checked where they enter, naming the row, and where a model meets them, naming the flag."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gen.data.caches import seal
from gen.data.images import Images, Zipped
from gen.data.labels import check_classes, missing_classes
from gen.data.loader import batches, expect, gathered
from gen.data.sources import ArraySource, Digits
from gen.data.stores import open_store
from gen.errors import GenError
from gen.training.indexed import ArrayWriter, run_indexed
from tests.data.files import edm_zip, folder, picture, png, tar

FLAG = "--stages.0.task.denoiser.network.num_classes"
BAD: dict[str, tuple[Any, str]] = {
    "unknown": ([0, 1, -1, 2], "has label -1; expected a class from 0 on"),
    "fractions": ([0.5, 1.0, 1.5, 2.0], r"has label 0\.5"),
    "one-hot rows": (
        np.eye(4),
        r"has a label of shape \(4,\); .*one-hot rows take the argmax|no class labels but vectors",
    ),
    "too large": ([0, 1, 2**40, 2], "has label 1099511627776; expected a class from 0 on"),
}


def sealed(path: Path, labels: np.ndarray) -> Any:
    np.save(path / "latent.npy", np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32))
    np.save(path / "label.npy", labels)
    return seal(path, tokenizer="t", data="d").source()


def in_npz(path: Path, labels: np.ndarray) -> Any:
    np.savez(path / "a.npz", image=np.stack([picture(i) for i in range(4)]), label=labels)
    return open_store(path / "a.npz")


def in_zip(path: Path, labels: np.ndarray) -> Any:
    rows = [[f"00000/img{i:08d}.png", value] for i, value in enumerate(labels.tolist())]
    return Images(str(edm_zip(path / "a.zip", rows, 4))).source()


def in_tar(path: Path, labels: np.ndarray) -> Any:
    members = {}
    for i, value in enumerate(labels.tolist()):
        members |= {f"{i}.png": png(picture(i)), f"{i}.json": json.dumps({"label": value}).encode()}
    return open_store(tar(path / "a.tar", members))


ENTRIES: dict[str, Callable[[Path, np.ndarray], Any]] = {
    "arrays": lambda path, labels: ArraySource(x=np.zeros(4), label=labels),
    "cache": sealed,
    "npz": in_npz,
    "zip": in_zip,
    "tar": in_tar,
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("case", BAD)
def test_labels_that_are_none_are_refused_by_row(tmp_path: Path, entry: str, case: str) -> None:
    labels, message = BAD[case]
    with pytest.raises(GenError, match=f"{message}|is no label; expected a class number"):
        ENTRIES[entry](tmp_path, np.asarray(labels))


def test_a_model_meets_its_classes(tmp_path: Path) -> None:
    data = Images(str(folder(tmp_path / "a", count=6, classes=3))).source()
    assert (data.num_classes, data.class_names) == (3, ("c0", "c1", "c2"))
    check_classes("a", data, 3, FLAG)
    with pytest.raises(GenError, match=rf"a:c2/002\.png has label 2; the model knows 2 .*: train with {FLAG} 3"):
        check_classes("a", data, 2, FLAG)
    assert missing_classes("a", data, 3, FLAG) is None
    assert f"a has 3 classes, the model 10: those from 3 on are never trained; {FLAG} 3" in str(
        missing_classes("a", data, 10, FLAG)
    )
    counted = ArraySource(x=np.zeros(3), label=np.array([1, 2, 3]))
    with pytest.raises(GenError, match=r"record 2 .* has label 3; .* the labels count from 1, subtract 1, or train"):
        check_classes("a", counted, 3, FLAG)
    unlabelled = ArraySource(x=np.zeros(3))
    check_classes("a", unlabelled, 0, FLAG)
    with pytest.raises(GenError, match=r"a has no class labels, and the model .* gen train --unconditional"):
        check_classes("a", unlabelled, 3, FLAG)
    assert (Digits().source().num_classes, Digits().source().class_names) == (10, tuple("0123456789"))


def test_labels_go_through_what_lies_between(tmp_path: Path) -> None:
    images = Images(str(folder(tmp_path / "a")))
    both = Zipped((images,)).source()
    assert (both.num_classes, both.class_names) == (2, ("c0", "c1"))
    cache = seal(_rows(tmp_path / "cache", both.label), tokenizer="t", data="d", class_names=both.class_names)
    assert (cache.source().num_classes, cache.source().class_names) == (2, ("c0", "c1"))
    (tmp_path / "a" / "first.png").write_bytes(png(picture(0)))
    with pytest.raises(GenError, match=r"no class labels: 1 images lie beside the class folders, the first first\.png"):
        Images(images.path).source()


def _rows(path: Path, labels: Any) -> Path:
    path.mkdir()
    np.save(path / "latent.npy", np.random.default_rng(0).normal(size=(len(labels), 2)).astype(np.float32))
    np.save(path / "label.npy", labels)
    return path


def test_text_is_a_sequence_with_its_mask(tmp_path: Path) -> None:
    """From a store through an archive of latents to a batch."""
    text = np.random.default_rng(0).normal(size=(6, 4, 3)).astype(np.float16)
    mask = np.arange(4) < np.array([1, 2, 3, 4, 1, 2])[:, None]
    np.savez(tmp_path / "a.npz", image=np.stack([picture(i) for i in range(6)]), text=text, text_mask=mask)
    source = Images(str(tmp_path / "a.npz"), labels="text", width=3, length=5).source()
    batch = source.gather(np.array([2, 0]))
    assert (batch["text"].shape, batch["text"].dtype, batch["text_mask"].dtype) == ((2, 5, 3), np.float16, np.bool_)
    assert batch["text_mask"].sum(axis=1).tolist() == [3, 1]
    np.testing.assert_array_equal(batch["text"][:, :4], text[[2, 0]])
    np.savez(tmp_path / "b.npz", image=np.stack([picture(0)]), text=text[:1], label=np.array([3]))
    both = Images(str(tmp_path / "b.npz"), labels="both").source()[0]
    assert (both["label"], both["text_mask"].tolist()) == (3, [True] * 4)
    with pytest.raises(GenError, match=r"has text of shape \(4, 3\); the model takes sequences of up to 3 tokens"):
        Images(str(tmp_path / "a.npz"), labels="text", length=3).source()

    def encode(arguments: Any, indices: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
        rows = dict(arguments[1])
        return rows | {"latent": rows.pop("image").mean(axis=(1, 2))}

    path = tmp_path / "cache"
    writer = ArrayWriter(path, 6, "i")
    run_indexed(encode, range(6), batch=4, writer=writer, arguments={}, read=lambda indices: gathered(source, indices))
    cache = seal(path, tokenizer="t", data="d", class_names=source.class_names).source()
    expect("cache", cache, text=(5, 3), text_mask=(5,))
    batch = next(batches(cache, batch=6, seed=0))
    assert batch["text"].dtype == np.float16
    for row in range(6):
        at = int(np.argmax((text == batch["text"][row, :4]).all(axis=(1, 2))))
        np.testing.assert_array_equal(batch["text_mask"][row, :4], mask[at])
    filled = ArraySource(text=text)[0]  # an encoder that always fills its length needs no mask
    assert filled["text_mask"].tolist() == [True] * 4


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"text": np.zeros((2, 4, 3), int)}, "text int64"),
        ({"text_mask": np.ones((2, 4), bool)}, "no text with a mask"),
        ({"text": np.zeros((2, 4, 3)), "text_mask": np.ones((2, 4))}, r"text_mask float64 \(2, 4\).*expected bool"),
        ({"text": np.zeros((2, 4, 3)), "text_mask": np.eye(2, 4) > 1}, "record 0 .* has a text_mask without a token"),
    ],
)
def test_text_that_is_none_is_refused(arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(GenError, match=message):
        ArraySource(**arrays)
