"""Adapters: a trained network changed by a few numbers, kept apart from it and merged into plain weights.

An adapter is a pure function of the network's parameters and its own: ``merge(params, own)`` gives parameters of the
same network. Training differentiates through it, samples are made with what it gives, and nothing that calls the
network knows of it.
"""

import abc
import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gen.arrays import flatten, unflatten
from gen.errors import GenError
from gen.nn.network import Network, Params, param_shapes

__all__ = ["Adapted", "Adapter", "fitting", "layers"]

NAMED = 6  # names that a message lists


def fitting(patterns: Sequence[str], names: Sequence[str], what: str) -> list[str]:
    """Gives the names that fit one of the patterns (`fnmatch`, alternatives separated by "|"), in their order.

    Raises GenError for a pattern that fits none, with names that there are.
    """
    chosen = set()
    for pattern in patterns:
        found = {name for name in names for part in pattern.split("|") if fnmatch.fnmatchcase(name, part)}
        if not found:
            some = ", ".join(names[:NAMED]) + (" ..." if len(names) > NAMED else "")
            raise GenError(f"no {what} of the network fits '{pattern}'; there are {some or 'none'}")
        chosen |= found
    return [name for name in names if name in chosen]


def layers(shapes: Any) -> list[str]:
    """Gives the paths of a network's dense layers (those with a ``kernel`` and a ``bias``)."""
    paths = flatten(shapes)
    return [path.removesuffix("/kernel") for path in paths if f"{path.removesuffix('/kernel')}/bias" in paths]


@dataclasses.dataclass(frozen=True)
class Adapter(abc.ABC):
    """What is trained of a network, and how it becomes part of it.

    Attributes:
      train: patterns over "/"-joined paths of parameters that learn as they are, a new value in place of the network's
        own; alternatives are separated by "|", and each pattern must fit something.
    """

    train: tuple[str, ...] = ()

    def values(self, config: Any) -> list[str]:
        """Gives the paths of the parameters that are replaced."""
        paths = [path for path in flatten(param_shapes(config)) if path not in Network(config).buffers]
        return fitting(self.train, paths, "parameter")

    @abc.abstractmethod
    def extra(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Gives the shapes of the further arrays of the adapter of this network, by path."""

    @abc.abstractmethod
    def begin(self, key: jax.Array, config: Any) -> dict[str, jax.Array]:
        """Gives the further arrays at the start, by path, for which the network is what it was."""

    @abc.abstractmethod
    def change(self, params: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        """Gives the flat parameters with the further arrays `own` taken in."""

    def merge(self, params: Params, own: Mapping[str, Any]) -> Params:
        """Gives plain parameters of the network.

        Args:
          params: those of the network that is adapted.
          own: what `Adapted` describes: ``value``, the replaced parameters, and ``extra``.
        """
        flat = {**flatten(params), **flatten(own.get("value", {}))}
        return unflatten(self.change(flat, flatten(own.get("extra", {}))))


@dataclasses.dataclass(frozen=True)
class Adapted:
    """The arrays of an adapter of a network, as the network of a `Part`.

    Attributes:
      network: the configuration of what is adapted, with the classes and the size that are wanted.
      adapter: how.
    """

    network: Any
    adapter: Adapter

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Gives the module that holds them: nested like the paths of the parameters, and never called."""
        del rngs
        shapes = flatten(param_shapes(self.network))
        values = {f"value/{path}": shapes[path].shape for path in self.adapter.values(self.network)}
        extra = {f"extra/{path}": shape for path, shape in self.adapter.extra(self.network).items()}
        return _tree(unflatten({**values, **extra}), lambda shape: nnx.Param(jnp.zeros(shape)))

    def start(self, key: jax.Array, params: Params) -> Params:
        """Gives the arrays at the start: the parameters that `params` has, and no change.

        A table of labels of another number of classes starts afresh, but for its last row, the null label's, where the
        network has one.

        Raises GenError for parameters of another shape that are not trained.
        """
        value_key, extra_key = jax.random.split(key)
        given, fresh = flatten(params), flatten(Network(self.network).init(value_key))
        values = {}
        for path in self.adapter.values(self.network):
            new, old = fresh[path], given.get(path)
            if old is not None and old.shape == new.shape:
                new = old
            elif old is not None and self.network.null_class and old.ndim == 2 and old.shape[1:] == new.shape[1:]:
                new = new.at[-1].set(old[-1])
            values[f"value/{path}"] = new
        missing = [p for p, leaf in fresh.items() if f"value/{p}" not in values and _shape(given.get(p)) != leaf.shape]
        if missing:
            raise GenError(
                f"{missing[0]} is {_shape(given.get(missing[0]))} in the network that is adapted and "
                f"{fresh[missing[0]].shape} in the one that is wanted, and it is not trained; add it to the adapter's "
                "'train', or leave the network as it is"
            )
        extra = {f"extra/{path}": leaf for path, leaf in self.adapter.begin(extra_key, self.network).items()}
        return unflatten({**values, **extra})


def _shape(leaf: Any) -> Any:
    return None if leaf is None else tuple(leaf.shape)


class _Node(nnx.Module):
    """Arrays by name, nested."""


def _tree(shapes: Mapping[str, Any], make: Callable[[Any], Any]) -> nnx.Module:
    node = _Node()
    for name, value in shapes.items():
        setattr(node, name, _tree(value, make) if isinstance(value, Mapping) else make(value))
    return node
