"""Latent caches: folders of arrays by row, with the normaliser that everything trained on them shares.

A cache is made in two moves, both safe to repeat: an indexed job writes the rows (`gen.training.indexed`), and
`seal` checks them, measures the normaliser and writes ``cache.json``, without which the folder is no cache::

    run_indexed(encode, range(count), batch=256, writer=ArrayWriter(path, count, identity), arguments=params)
    cache = seal(path, tokenizer=..., data=source.identity())
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gen.arrays import digest
from gen.data import loader
from gen.data.sources import ArraySource
from gen.data.stores import load_arrays
from gen.errors import GenError

__all__ = ["Cache", "LatentSource", "seal"]

_ROWS = 16384  # rows read at a time


class LatentSource:
    """Rows of a cache; "latent" comes out normalised, (latent - shift) / scale, the rest as stored.

    Reading a row whose latent is NaN or infinite raises GenError: `seal` lets none in, so the file was damaged since.
    """

    def __init__(self, rows: ArraySource, shift: np.ndarray, scale: np.ndarray):
        self.rows, self.shift, self.scale = rows, shift, scale

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._normalized(self.rows[index], [index])

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Rows `indices` (B,) of every array."""
        return self._normalized(self.rows.gather(indices), indices)

    def title(self, index: int) -> str:
        """How messages call record `index`."""
        return self.rows.title(index)

    def _normalized(self, record: dict[str, np.ndarray], indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            latent = (record["latent"] - self.shift) / self.scale
        finite = np.isfinite(latent).reshape(len(indices), -1).all(axis=1)
        if not finite.all():
            row = int(indices[int(np.argmin(finite))])
            raise GenError(
                f"the latent of {self.title(row)} is NaN or infinite; it was finite when "
                "it was encoded, delete the folder and encode the images again"
            )
        return record | {"latent": latent}


@dataclasses.dataclass(frozen=True)
class Cache:
    """A sealed latent cache as training data: "latent" float32, normalised, and whatever else it holds by name.

    Attributes:
      path: the cache folder.
      classes: number of classes the model knows; labels beyond are refused.
    """

    path: str
    classes: int | None = None

    def source(self) -> LatentSource:
        """The rows by index, memory-mapped. Raises GenError for no cache, an altered one, labels beyond `classes`."""
        found = _read(self.path)
        normalizer = self.normalizer()
        rows = _rows(self.path, found)
        label = rows.arrays.get("label")
        if self.classes is not None and label is not None and int(label.max(initial=0)) >= self.classes:
            row = int(np.argmax(label))
            raise GenError(
                f"row {row} of {self.path} has label {label[row]}; the model knows {self.classes} classes, 0 to "
                f"{self.classes - 1}: encode data of these classes"
            )
        return LatentSource(rows, normalizer["shift"], normalizer["scale"])

    def normalizer(self) -> dict[str, np.ndarray]:
        """ "shift" and "scale" (C,) float32: raw latents are normalised * scale + shift."""
        found = _read(self.path)
        return {name: np.asarray(found[name], np.float32) for name in ("shift", "scale")}

    def batches(
        self, *, batch: int, seed: int, start: int, process: int = 0, processes: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """Endless shuffled batches, this process's slice, from global step `start` (see `gen.data.loader`)."""
        source = self.source()
        loader.enough(self.path, len(source), batch)
        return loader.batches(source, batch=batch, seed=seed, start=start, process=process, processes=processes)

    def identity(self) -> str:
        """Fingerprint of the rows, the normaliser and what they were made from; not of where they lie."""
        return str(_read(self.path)["identity"])


def seal(
    path: str | Path,
    *,
    tokenizer: str,
    data: str,
    shift: Sequence[float] | None = None,
    scale: Sequence[float] | None = None,
) -> Cache:
    """Makes a cache of a folder that holds ``latent.npy`` (N, ..., C) and other arrays (N, ...) by name.

    Args:
      path: the folder, every row written. A cache sealed from the same things is left as it is.
      tokenizer: fingerprint of what made the latents (weights and configuration).
      data: identity of the images they were made from.
      shift, scale: the normaliser, per channel; by default the latents' mean and standard deviation. Latents
        that are already normalised (a teacher's samples) take zeros and ones.

    Raises:
      GenError: rows missing or of different number, NaN or infinite latents (naming the row), a channel that never
        varies, a cache sealed from other things, a folder that cannot be written.
    """
    path = Path(path)
    if (path / "cache.json").exists():
        found = _read(path)
        if (found["tokenizer"], found["data"]) != (tokenizer, data):
            raise GenError(
                f"{path} is a latent cache of another tokenizer or other data; delete it or choose another folder"
            )
        return Cache(str(path))
    arrays = {file.stem: load_arrays(file)["image"] for file in sorted(path.glob("*.npy"))}
    if "latent" not in arrays:
        raise GenError(f"{path} has no latent.npy; expected a folder of encoded rows, encode the images first")
    mean, deviation = _statistics(arrays["latent"])
    if scale is None and (deviation < 1e-6).any():
        raise GenError(
            f"channel {int(np.argmin(deviation))} of the latents never varies; a trained tokenizer uses every channel, "
            "train it longer or give the normaliser"
        )
    normalizer = {
        "shift": np.broadcast_to(mean if shift is None else np.asarray(shift), mean.shape).astype(np.float32),
        "scale": np.broadcast_to(deviation if scale is None else np.asarray(scale), mean.shape).astype(np.float32),
    }
    made_from = np.frombuffer(f"{tokenizer}\n{data}".encode(), np.uint8)
    head = {
        "count": len(ArraySource(**arrays)),
        "arrays": {name: [array.dtype.str, list(array.shape[1:])] for name, array in arrays.items()},
        **{name: [float(value) for value in values] for name, values in normalizer.items()},
        "tokenizer": tokenizer,
        "data": data,
        "identity": digest({**arrays, **normalizer, "made from": made_from}),
    }
    _write(path / "cache.json", head)
    return Cache(str(path))


def _statistics(latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel (last axis), float64, in one pass over the rows."""
    count, mean, square = 0, np.zeros(latents.shape[-1]), np.zeros(latents.shape[-1])
    for first in range(0, len(latents), _ROWS):
        block = np.asarray(latents[first : first + _ROWS], np.float64)
        finite = np.isfinite(block).reshape(len(block), -1).all(axis=1)
        if not finite.all():
            raise GenError(
                f"latent {first + int(np.argmin(finite))} is NaN or infinite; expected finite latents, look at the "
                "tokenizer's weights and that image"
            )
        block = block.reshape(-1, block.shape[-1])
        total, delta = count + len(block), block.mean(axis=0) - mean
        square += np.square(block - block.mean(axis=0)).sum(axis=0) + np.square(delta) * count * len(block) / total
        mean += delta * len(block) / total
        count = total
    return mean, np.sqrt(square / max(count, 1))


def _read(path: str | Path) -> dict[str, Any]:
    file = Path(path) / "cache.json"
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        raise GenError(
            f"no latent cache at {path}; expected a folder with cache.json, make one with gen encode"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise GenError(f"cannot read {file} ({error}); delete the folder and encode the images again") from None
    if not _is_head(found):
        raise GenError(f"{file} was altered; delete the folder and encode the images again")
    return dict(found)


def _is_head(found: Any) -> bool:
    """Whether a value read from JSON has everything that `seal` writes, of the right types."""
    if not isinstance(found, dict) or not isinstance(arrays := found.get("arrays"), dict):
        return False
    rows = [row for row in arrays.values() if isinstance(row, list) and len(row) == 2 and isinstance(row[1], list)]
    affine = [values for values in (found.get("shift"), found.get("scale")) if isinstance(values, list)]
    return (
        type(found.get("count")) is int
        and "latent" in arrays
        and len(rows) == len(arrays)
        and all(re.fullmatch(r"\w[\w.-]*", name) for name in arrays)  # no name leads out of the folder
        and len(affine) == 2
        and all(type(value) is float and math.isfinite(value) for values in affine for value in values)
        and all(len(values) == (arrays["latent"][1] or [0])[-1] for values in affine)
        and all(isinstance(found.get(name), str) for name in ("tokenizer", "data", "identity"))
    )


def _rows(path: str | Path, head: dict[str, Any]) -> ArraySource:
    arrays = {}
    for name, (dtype, shape) in head["arrays"].items():
        file = Path(path) / f"{name}.npy"
        array = load_arrays(file)["image"]
        if array.dtype.str != dtype or list(array.shape) != [head["count"], *shape]:
            raise GenError(
                f"{file} holds {array.dtype.str} {array.shape}; expected {dtype} {(head['count'], *shape)} as "
                "cache.json says, delete the folder and encode the images again"
            )
        arrays[name] = array
    return ArraySource(**arrays)


def _write(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "w") as file:
            json.dump(value, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise GenError(f"cannot write {path}: {reason}; free space or choose another output folder") from error
