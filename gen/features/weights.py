"""Where the weights of feature networks lie: one safetensors file per network in a per-user cache, with its identity.

Files get there by ``gen convert`` alone; nothing is ever downloaded.
"""

import abc
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax

from gen import arrays
from gen.config import from_json, to_json
from gen.errors import GenError
from gen.nn.network import Params

__all__ = [
    "ConvertedWeights",
    "cache_path",
    "identity_of",
    "load_weights",
    "network_of",
    "store_weights",
]

T = TypeVar("T")


def cache_path(name: str) -> Path:
    """Tells where the network `name` is kept: ``$XDG_CACHE_HOME/gen/weights`` or ``~/.cache/gen/weights``."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "gen" / "weights" / f"{name}.safetensors"


def store_weights(path: str | Path, params: Params, *, origin: str, published: str = "", network: Any = None) -> str:
    """Writes a network's weights with their identity; returns that identity.

    Args:
      origin: the file they came from, for the reader of the header.
      published: the name of the published weights, when the file was verified to hold them; by default the identity
        is `gen.arrays.digest` of the parameters: one network, one text, whatever file it came in.
      network: the configuration, where one family comes in several sizes: `network_of` gives it back.
    """
    content = arrays.digest(arrays.flatten(params))
    identity = published or content
    described = {} if network is None else {"network": json.dumps(to_json(network))}
    arrays.save(path, params, {"origin": origin, "content": content, "identity": identity} | described)
    return identity


@functools.lru_cache(maxsize=64)
def _header(path: str, modified: int) -> Mapping[str, str]:
    header = arrays.metadata(path)
    if not {"content", "identity"} <= set(header):
        raise GenError(f"{path} is not a file of converted weights (it has no identity)")
    return header


def _read_header(path: Path, hint: str) -> Mapping[str, str]:
    try:
        return _header(str(path), path.stat().st_mtime_ns)
    except OSError:
        raise GenError(f"no weights at {path}; {hint}") from None
    except GenError as error:
        raise GenError(f"{error}; {hint}") from None


def identity_of(path: Path, hint: str) -> str:
    """Gives the identity that stands in the file. Raises GenError, with `hint` on what to do, for a missing or other
    file.
    """
    return _read_header(path, hint)["identity"]


def network_of(path: Path, expected: type[T], hint: str) -> T:
    """Gives the configuration that stands in the file. Raises GenError for a missing file, or another kind of
    network's.
    """
    text = _read_header(path, hint).get("network")
    if text is None:
        raise GenError(f"{path} does not say which {expected.__name__} it holds; {hint}")
    found = from_json(json.loads(text), expected, str(path))
    assert isinstance(found, expected)
    return found


def load_weights(path: Path, hint: str) -> dict[str, Any]:
    """Gives the nested parameters, checked against the fingerprint in the file's header.

    Raises GenError for a missing, damaged or altered file; `hint` says how to get a sound one.
    """
    content = _read_header(path, hint)["content"]
    params = arrays.load(path)
    if arrays.digest(arrays.flatten(params)) != content:
        raise GenError(f"the weights in {path} are not those that were converted; {hint}")
    return params


class ConvertedWeights(abc.ABC):
    """What extractors share whose weights are a file that ``gen convert`` made; they take images of any size.

    A subclass is a frozen dataclass with a field ``weights``: that file, or "" for the one of the per-user cache.
    """

    weights: str
    modes: ClassVar[tuple[str, ...]] = ()

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Gives the short name for protocols, tables and the cache."""

    @property
    @abc.abstractmethod
    def hint(self) -> str:
        """Tells where the weights are published and how to convert them, for messages."""

    @abc.abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Gives the shape of every array of the weights, by its "/"-joined path."""

    @abc.abstractmethod
    def __call__(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        """Does what `gen.features.extractor.Extractor.__call__` says."""

    @property
    def image(self) -> tuple[int | None, int | None, int]:
        """Takes images of any size."""
        return (None, None, 3)

    @property
    def precision(self) -> str:
        """Does what `gen.features.extractor.Extractor.precision` says."""
        return "float32-highest"

    @property
    def outputs(self) -> tuple[str, ...]:
        """Does what `gen.features.extractor.Extractor.outputs` says."""
        return ("features",)

    @property
    def classes(self) -> int:
        """Does what `gen.features.extractor.Extractor.classes` says."""
        return 0

    @property
    def path(self) -> Path:
        """Tells where the weights lie."""
        return Path(self.weights) if self.weights else cache_path(self.name)

    def fingerprint(self) -> str:
        """Gives the name of the published weights, or else a hash. Raises GenError when there are none."""
        return identity_of(self.path, self.hint)

    def load(self) -> Params:
        """Gives the weights. Raises GenError when the file is missing, damaged or another network's."""
        params = load_weights(self.path, self.hint)
        self.check(params, self.path)
        return params

    def check(self, params: Params, path: Path) -> None:
        """Raises GenError where the arrays read from `path` are not of this network's names and shapes."""
        if {name: tuple(value.shape) for name, value in arrays.flatten(params).items()} != self.shapes():
            raise GenError(f"{path} does not hold the {self.name} network that it should; {self.hint}")
