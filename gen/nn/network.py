"""Networks as pairs of a static structure and a plain dict of arrays.

A Flax NNX module is built once to learn its structure (`nnx.eval_shape`: nothing is allocated) and is
rebuilt inside jitted functions from parameters that are always passed in. Shared by all floors above.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
from flax import nnx

__all__ = [
    "Buffer",
    "Cond",
    "Network",
    "NetworkConfig",
    "Params",
    "Projected",
    "Stacked",
    "count",
    "param_shapes",
    "tree_copy",
]

Params = Mapping[str, Any]  # nested plain dict of arrays; stacked blocks hold their layers on axis 0
Cond = Mapping[str, jax.Array]  # conditioning by name: label (B,) int32, text (B, T, D), ...


class Buffer(nnx.Variable[jax.Array]):
    """An array of a network that no gradient trains: fixed frequencies, codebook averages, batch statistics.

    It stands among the parameters, so that checkpoints and imports hold it, but has no gradient, no weight decay and no
    optimiser state. `Network.buffers` says which arrays these are.
    """


class Projected(nnx.Param[jax.Array]):
    """A parameter that training brings back to where it belongs before every step, such as a weight of fixed norm."""

    @staticmethod
    def project(value: jax.Array) -> jax.Array:
        """Gives the nearest value that the parameter may have; a subclass says which. Here any value may stay."""
        return value


class _Stream(nnx.RngStream):
    """The keys of `nnx.RngStream`, without its search for the sharding of a traced counter.

    That search composes an error message from all that was traced so far, for every key: three quarters of the time
    that tracing the initialisation of a large network takes.
    """

    def __call__(self) -> jax.Array:
        """Gives the next key."""
        count = self.count.get_value()
        self.count.set_value(count + 1)
        return jax.random.fold_in(self.key.get_value(), count)


def _rngs(key: jax.Array) -> Any:
    """What a module draws its parameters from."""
    rngs: Any = nnx.Rngs(params=key)
    rngs.params = _Stream(key, tag="params")
    return rngs


class NetworkConfig(Protocol):
    """What a network's configuration offers: a frozen dataclass that builds its module."""

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Gives the module with freshly drawn parameters."""
        ...


@dataclasses.dataclass(frozen=True)
class Network:
    """A network without its parameters: hashable, cheap to hold, usable as a static argument.

    Attributes:
      config: the frozen dataclass whose ``build(rngs)`` gives the NNX module.
    """

    config: Any

    def init(self, key: jax.Array) -> Params:
        """Gives freshly drawn parameters and buffers as one nested plain dict of float32 arrays."""
        module = self.config.build(_rngs(key))
        return nnx.to_pure_dict(nnx.state(module, (nnx.Param, Buffer)))

    @property
    def buffers(self) -> frozenset[str]:
        """Paths of the `Buffer`s in the parameters, joined by "/"; allocates nothing."""
        return _structure(self.config).buffers

    def apply(self, params: Params, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """Calls `method` of the module holding `params`; pure, to be used under `jax.jit`."""
        return getattr(self.module(params), method)(*args, **kwargs)

    def __call__(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        """Does the same as `Network.apply`."""
        return self.apply(params, *args, **kwargs)

    def project(self, params: Params) -> Params:
        """Gives the parameters as training keeps them: every `Projected` one brought back to where it belongs.

        Applied before every training step (EDM2's forced weight normalisation); the identity for most networks.
        """
        rules = _structure(self.config).projections
        if not rules:
            return params

        def one(path: Any, value: jax.Array) -> jax.Array:
            rule = rules.get("/".join(str(key.key) for key in path))
            return value if rule is None else rule(value)

        return cast(Params, jax.tree_util.tree_map_with_path(one, params))

    def module(self, params: Params) -> Any:
        """Gives the NNX module holding `params` (live arrays or tracers)."""
        return nnx.merge(_structure(self.config).graphdef, params)


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Several networks of one configuration, whose arrays lie on a leading axis. It is called one network at a time.

    Attributes:
      network: the configuration of each.
      count: how many.
    """

    network: Any
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Gives the shape of one input, channels last."""
        shape: tuple[int, ...] = self.network.shape
        return shape

    @property
    def conditions(self) -> Any:
        """Gives what each is conditioned on."""
        return self.network.conditions

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Gives the module of all of them, each drawn with a key of its own."""
        config = self.network

        @nnx.split_rngs(splits=self.count)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs: nnx.Rngs) -> nnx.Module:
            module: nnx.Module = config.build(rngs)
            return module

        module: nnx.Module = make(rngs)
        return module


@dataclasses.dataclass(frozen=True)
class _Structure:
    """What a module is without its arrays.

    Attributes:
      graphdef: its static structure.
      shapes: its parameters and buffers as shapes.
      buffers: paths of its buffers.
      projections: by path, how its projected parameters are brought back.
    """

    graphdef: Any
    shapes: Mapping[str, Any]
    buffers: frozenset[str]
    projections: Mapping[str, Callable[[jax.Array], jax.Array]]


@functools.cache
def _structure(config: Any) -> _Structure:
    module = nnx.eval_shape(lambda: config.build(_rngs(jax.random.key(0))))

    def variables(kind: type) -> dict[str, Any]:
        return {"/".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(module, kind))}

    projections = {path: value.project for path, value in variables(Projected).items()}
    shapes = nnx.to_pure_dict(nnx.state(module, (nnx.Param, Buffer)))
    return _Structure(nnx.graphdef(module), shapes, frozenset(variables(Buffer)), projections)


def param_shapes(config: Any) -> Any:
    """Gives the parameters of `config`'s network as `jax.ShapeDtypeStruct` leaves; allocates nothing."""
    return jax.tree.map(lambda shape: shape, _structure(config).shapes)


def count(params: Any) -> int:
    """Gives the number of scalars in a tree of arrays or shapes."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(params))


def tree_copy(tree: Any) -> Any:
    """Gives a tree of fresh buffers: what is donated must never alias what lives on."""
    return jax.tree.map(jnp.copy, tree)
