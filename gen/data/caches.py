"""Caches of encoded images: folders of arrays by row, of latents, of tokens or of bits.

A cache is made in two moves, both safe to repeat: an indexed job writes the rows (`gen.training.indexed`), and a
``seal`` function checks them and writes ``cache.json``, without which the folder is no cache::

    run_indexed(encode, count, batch=256, writer=ArrayWriter(path, count, identity), arguments=params)
    cache = seal(path, tokenizer=..., data=source.identity())                        # latent.npy
    cache = seal_tokens(path, vocabulary=4096, tokenizer=..., data=...)              # tokens.npy
    cache = seal_bits(path, tokenizer=..., data=...)                                 # bits.npy

| kind | array | rows come out as | what the cache knows beside |
|---|---|---|---|
| latents | latent (N, ..., C) | float32, normalised: (latent - shift) / scale | shift, scale (C,) |
| tokens | tokens (N, ...) | int32, as they are, 0 to vocabulary - 1 | vocabulary |
| bits | bits (N, ..., K) | uint8, as they are, 0 or 1 | width K |

Whatever else a cache holds (labels, text features, noise) comes out as stored. An array NAME_flip beside NAME is of the
mirror images: in training half of the rows, others in every epoch, come from it, under the name NAME.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gen.arrays import digest
from gen.config import PLACE
from gen.data import loader
from gen.data.cache_rows import FLIP, MAKE_AGAIN, CacheSource
from gen.data.loader import Record
from gen.data.sources import ArraySource
from gen.data.stores import load_arrays
from gen.errors import GenError
from gen.files import write_json

__all__ = ["BitCache", "Cache", "TokenCache", "seal", "seal_bits", "seal_tokens"]

_ROWS = 16384  # rows read at a time
_ARRAYS = {"latents": "latent", "tokens": "tokens", "bits": "bits"}  # kind -> the array that makes a cache of it


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What the kinds share: a sealed cache as training data.

    Attributes:
      path: the cache folder.
    """

    path: str = dataclasses.field(metadata=PLACE)
    kind: ClassVar[str] = ""

    def source(self) -> CacheSource:
        """The rows by index, memory-mapped. Raises GenError for no cache of this kind, and an altered one."""
        head = _read(self.path, self.kind)
        rows = _rows(self.path, head)
        return CacheSource(rows, _ARRAYS[self.kind], *_READERS[self.kind](head))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one encoded image: (..., C) of latents, (...) of tokens, (..., K) of bits."""
        return tuple(_read(self.path, self.kind)["arrays"][_ARRAYS[self.kind]][1])

    def batches(self, *, batch: int, seed: int, start: int, process: int = 0, processes: int = 1) -> Iterator[Record]:
        """Endless shuffled batches, this process's slice, from global step `start` (see `gen.data.loader`)."""
        source = self.source()
        loader.enough(self.path, len(source), batch)
        gather = source.mirrored if source.flips else None
        return loader.batches(
            source, batch=batch, seed=seed, start=start, process=process, processes=processes, gather=gather
        )

    @property
    def tokenizer(self) -> str:
        """Fingerprint of what encoded the images: the tokenizer's configuration and weights come first."""
        return str(_read(self.path, self.kind)["tokenizer"])

    def identity(self) -> str:
        """Fingerprint of the rows and of what they were made from; not of where they lie."""
        return str(_read(self.path, self.kind)["identity"])


@dataclasses.dataclass(frozen=True)
class Cache(_Rows):
    """A sealed latent cache as training data: "latent" float32, normalised, and whatever else it holds by name.

    Attributes:
      path: the cache folder.
    """

    kind: ClassVar[str] = "latents"

    def normalizer(self) -> dict[str, np.ndarray]:
        """Gives "shift" and "scale" (C,) float32: raw latents are normalised * scale + shift."""
        head = _read(self.path, self.kind)
        return {name: np.asarray(head[name], np.float32) for name in ("shift", "scale")}


@dataclasses.dataclass(frozen=True)
class TokenCache(_Rows):
    """A sealed token cache as training data: "tokens" int32, never changed, and whatever else it holds by name.

    Attributes:
      path: the cache folder.
    """

    kind: ClassVar[str] = "tokens"

    @property
    def vocabulary(self) -> int:
        """Tells how many different tokens there are: they count from 0 to vocabulary - 1."""
        return int(_read(self.path, self.kind)["vocabulary"])


@dataclasses.dataclass(frozen=True)
class BitCache(_Rows):
    """A sealed cache of binary latents as training data: "bits" uint8 of 0 and 1, and whatever else it holds by name.

    Attributes:
      path: the cache folder.
    """

    kind: ClassVar[str] = "bits"

    @property
    def width(self) -> int:
        """Tells how many bits each position has: the last axis."""
        return self.shape[-1]


Reader = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]  # read, good of `CacheSource`


def _latents_reader(head: Mapping[str, Any]) -> Reader:
    shift, scale = (np.asarray(head[name], np.float32) for name in ("shift", "scale"))
    return lambda latent: (latent - shift) / scale, lambda latent: _each(np.isfinite(latent))


def _tokens_reader(head: Mapping[str, Any]) -> Reader:
    vocabulary = head["vocabulary"]
    return lambda tokens: tokens.astype(np.int32), lambda tokens: _each((tokens >= 0) & (tokens < vocabulary))


def _bits_reader(head: Mapping[str, Any]) -> Reader:
    return lambda bits: bits.astype(np.uint8), lambda bits: _each(bits <= 1)


_READERS = {"latents": _latents_reader, "tokens": _tokens_reader, "bits": _bits_reader}


def _each(good: np.ndarray) -> np.ndarray:
    """(B, ...) bool -> (B,): whether all of a row is."""
    return np.asarray(good.reshape(len(good), -1).all(axis=1))


def seal(
    path: str | Path,
    *,
    tokenizer: str,
    data: str,
    shift: Sequence[float] | None = None,
    scale: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
) -> Cache:
    """Makes a cache of a folder that holds ``latent.npy`` (N, ..., C) and other arrays (N, ...) by name.

    Args:
      path: the folder, every row written. A cache sealed from the same things is left as it is.
      tokenizer: fingerprint of what made the latents (weights and configuration).
      data: identity of the images they were made from.
      shift, scale: the normaliser, per channel; by default the latents' mean and standard deviation. Latents
        that are already normalised (a teacher's samples) take zeros and ones.
      class_names: names of the classes that ``label.npy`` counts, where they are known.

    Raises:
      GenError: rows missing or of different number, NaN or infinite latents (naming the row), a channel that never
        varies, labels that are none, a cache sealed from other things, a folder that cannot be written.
    """

    def describe(latents: np.ndarray) -> dict[str, Any]:
        mean, deviation = _statistics(latents)
        if scale is None and (deviation < 1e-6).any():
            raise GenError(
                f"channel {int(np.argmin(deviation))} of the latents never varies; a trained tokenizer uses every "
                "channel, train it longer or give the normaliser"
            )
        given = {"shift": mean if shift is None else shift, "scale": deviation if scale is None else scale}
        return {name: np.broadcast_to(np.asarray(v), mean.shape).astype(np.float32) for name, v in given.items()}

    _seal(Path(path), "latents", describe, tokenizer, data, class_names)
    return Cache(str(path))


def seal_tokens(
    path: str | Path, *, vocabulary: int, tokenizer: str, data: str, class_names: Sequence[str] | None = None
) -> TokenCache:
    """Makes a cache of a folder that holds ``tokens.npy`` (N, ...), of any integer type, and other arrays by name.

    Args:
      path: the folder, every row written. A cache sealed from the same things is left as it is.
      vocabulary: how many different tokens the tokenizer has.
      tokenizer, data, class_names: see `seal`.

    Raises:
      GenError: as `seal`; tokens that are no integers from 0 to vocabulary - 1, naming the row.
    """

    def describe(tokens: np.ndarray) -> dict[str, Any]:
        _integers(tokens, "tokens", vocabulary)
        return {"vocabulary": vocabulary}

    _seal(Path(path), "tokens", describe, tokenizer, data, class_names)
    return TokenCache(str(path))


def seal_bits(path: str | Path, *, tokenizer: str, data: str, class_names: Sequence[str] | None = None) -> BitCache:
    """Makes a cache of a folder that holds ``bits.npy`` (N, ..., K), of bool or any integer type, and other arrays.

    Args:
      path: the folder, every row written. A cache sealed from the same things is left as it is.
      tokenizer, data, class_names: see `seal`.

    Raises:
      GenError: as `seal`; bits other than 0 and 1, naming the row.
    """

    def describe(bits: np.ndarray) -> dict[str, Any]:
        _integers(bits, "bits", 2)
        return {}

    _seal(Path(path), "bits", describe, tokenizer, data, class_names)
    return BitCache(str(path))


def _seal(
    path: Path,
    kind: str,
    describe: Callable[[np.ndarray], dict[str, Any]],
    tokenizer: str,
    data: str,
    class_names: Sequence[str] | None,
) -> None:
    """Writes cache.json; `describe` checks the encoded rows and gives what belongs to the kind."""
    if (path / "cache.json").exists():
        head = _read(path, kind)
        if (head["tokenizer"], head["data"]) != (tokenizer, data):
            raise GenError(
                f"{path} is a cache of {kind} of another tokenizer or other data; choose another folder, or delete it "
                "if it is not needed"
            )
        return
    arrays = {file.stem: load_arrays(file)["image"] for file in sorted(path.glob("*.npy"))}
    if _ARRAYS[kind] not in arrays:
        raise GenError(f"{path} has no {_ARRAYS[kind]}.npy; expected a folder of encoded rows, encode the images first")
    rows = ArraySource(class_names, **arrays)
    _finite_text(arrays.get("text"))
    described = describe(arrays[_ARRAYS[kind]])
    for name, array in arrays.items():
        of = name.removesuffix(FLIP)
        if name != of and of in arrays and (array.dtype, array.shape) != (arrays[of].dtype, arrays[of].shape):
            raise GenError(f"{name}.npy is not of the type and shape of {of}.npy, of whose mirror images it should be")
    if _ARRAYS[kind] + FLIP in arrays:
        describe(arrays[_ARRAYS[kind] + FLIP])
    made_from = {
        "made from": np.frombuffer(f"{tokenizer}\n{data}".encode(), np.uint8),
        **{name: np.atleast_1d(value) for name, value in described.items()},
    }
    head = {
        "kind": kind,
        "count": len(rows),
        "arrays": {name: [array.dtype.str, list(array.shape[1:])] for name, array in arrays.items()},
        **{name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in described.items()},
        "tokenizer": tokenizer,
        "data": data,
        "identity": digest({**arrays, **made_from}),
        "class_names": list(class_names) if class_names else None,
    }
    write_json(path / "cache.json", head)


def _statistics(latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel (last axis), float64, in one pass over the rows."""
    count, mean, square = 0, np.zeros(latents.shape[-1]), np.zeros(latents.shape[-1])
    for first in range(0, len(latents), _ROWS):
        block = np.asarray(latents[first : first + _ROWS], np.float64)
        finite = _each(np.isfinite(block))
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


def _integers(values: np.ndarray, name: str, count: int) -> None:
    """Raises GenError unless all values are integers from 0 to count - 1."""
    if values.dtype.kind not in "iub" or values.ndim < 2:
        raise GenError(
            f"{name}.npy holds {values.dtype} {values.shape}; expected integers (N, ...), stored as they are"
        )
    for first in range(0, len(values), _ROWS):
        block = np.asarray(values[first : first + _ROWS])
        good = _each((block >= 0) & (block < count))
        if not good.all():
            row = int(np.argmin(good))
            wrong = block[row][(block[row] < 0) | (block[row] >= count)][0]
            raise GenError(
                f"row {first + row} of {name}.npy has {wrong}; expected 0 to {count - 1}, look at the tokenizer's "
                "weights and vocabulary"
            )


def _finite_text(text: np.ndarray | None) -> None:
    for first in range(0, 0 if text is None else len(text), _ROWS):
        finite = _each(np.isfinite(np.asarray(text[first : first + _ROWS])))  # type: ignore[index]
        if not finite.all():
            raise GenError(
                f"row {first + int(np.argmin(finite))} of text.npy is NaN or infinite; look at the encoder's weights "
                "and that caption"
            )


def _read(path: str | Path, kind: str) -> dict[str, Any]:
    """cache.json of a cache of this kind."""
    file = Path(path) / "cache.json"
    try:
        head = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise GenError(
            f"{path} is no cache of {kind}; images have to be encoded before a model of {kind} can train on them: gen "
            f"encode TOKENIZER_RUN --data {path} --out CACHE, then --data CACHE"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise GenError(f"cannot read {file} ({error}); {MAKE_AGAIN}") from None
    # Caches made before there were kinds are of latents.
    if not isinstance(head, dict) or head.setdefault("kind", "latents") not in _READERS or not _is_head(head):
        raise GenError(f"{file} was altered, or is no cache's; {MAKE_AGAIN}")
    if head["kind"] != kind:
        raise GenError(f"{path} is a cache of {head['kind']}; expected one of {kind}, encode with such a tokenizer")
    return head


def _is_head(head: dict[str, Any]) -> bool:
    """Whether an object read from JSON has everything that `_seal` writes for its kind, of the right types."""
    arrays = head.get("arrays")
    if not isinstance(arrays, dict):
        return False
    rows = [row for row in arrays.values() if isinstance(row, list) and len(row) == 2 and isinstance(row[1], list)]
    encoded, names = _ARRAYS[head["kind"]], head.get("class_names")
    return (
        type(head.get("count")) is int
        and encoded in arrays
        and len(rows) == len(arrays)
        and all(re.fullmatch(r"\w[\w.-]*", name) for name in arrays)  # no name leads out of the folder
        and all(isinstance(head.get(name), str) for name in ("tokenizer", "data", "identity"))
        and (names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names)))
        and (head["kind"] != "tokens" or (type(head.get("vocabulary")) is int and head["vocabulary"] > 0))
        and (head["kind"] != "latents" or _is_affine(head, (arrays["latent"][1] or [0])[-1]))
    )


def _is_affine(head: dict[str, Any], channels: int) -> bool:
    affine = [values for values in (head.get("shift"), head.get("scale")) if isinstance(values, list)]
    return (
        len(affine) == 2
        and all(type(value) is float and math.isfinite(value) for values in affine for value in values)
        and all(len(values) == channels for values in affine)
    )


def _rows(path: str | Path, head: dict[str, Any]) -> ArraySource:
    arrays = {}
    for name, (dtype, shape) in head["arrays"].items():
        file = Path(path) / f"{name}.npy"
        array = load_arrays(file)["image"]
        if array.dtype.str != dtype or list(array.shape) != [head["count"], *shape]:
            raise GenError(
                f"{file} holds {array.dtype.str} {array.shape}; expected {dtype} {(head['count'], *shape)} as "
                f"cache.json says; {MAKE_AGAIN}"
            )
        arrays[name] = array
    return ArraySource(head.get("class_names"), **arrays)
