"""Part: what one optimiser trains, and the update that every method's programs are made of."""

import contextlib
import contextvars
import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gen.arrays import flatten, map_paths
from gen.errors import GenError
from gen.nn.network import Network, tree_copy
from gen.training.ema import Decay, average, numbered
from gen.training.optim import OptimConfig
from gen.training.sharding import constrain
from gen.training.task import Schedule, State

__all__ = ["Aux", "Part", "begin", "keep_if", "microbatches", "warm_start", "with_buffers"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Aux:
    """What a loss returns beside its value.

    Attributes:
      metrics: scalars by name, averaged over microbatches.
      buffers: new values of the network's `Buffer`s by "/"-joined path, averaged over microbatches: statistics of a
        batch must therefore be means.
      out: any tree of per-sample outputs with leading axis B; the microbatches' are joined in its order.
    """

    metrics: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    buffers: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    out: Any = None


LossFn = Callable[[Any, Any], tuple[jax.Array, Aux]]


@dataclasses.dataclass(frozen=True)
class Part:
    """One trained network, or several that one optimiser trains together (DMD2's fake score with its head).

    Arrays that no gradient trains (`gen.nn.network.Buffer`: fixed frequencies, codebook averages) stand in the same
    nested dict as the parameters. They have neither optimiser state nor decay; their new values come from the loss.

    Attributes:
      name: key of the network in the state.
      network: configuration of the network, or a mapping from role to configuration.
      optim: its optimiser.
      averages: decays of its averages: the first is kept as ``name``, the i-th further one as ``name@i``.
      train: patterns (as of `fnmatch`) over "/"-joined paths of the parameters that learn, and of the buffers that take
        new values; the others stay as they are.
    """

    name: str
    network: Any
    optim: OptimConfig
    averages: tuple[Decay, ...] = ()
    train: tuple[str, ...] = ("*",)

    @property
    def named_averages(self) -> dict[str, Decay]:
        """Gives the decays by their key in ``State.ema``."""
        return numbered(self.name, self.averages)

    def learns(self, params: Any) -> frozenset[str]:
        """Paths of the arrays that the optimiser trains.

        Raises:
          GenError: a pattern of `train` that fits no parameter.
        """
        paths = [path for path in flatten(params) if path not in self._buffers()]
        for pattern in self.train:
            if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
                some = ", ".join(paths[:3])
                raise GenError(f"no parameter of '{self.name}' fits the pattern '{pattern}'; paths are like {some}")
        return frozenset(path for path in paths if self._trains(path))

    def _trains(self, path: str) -> bool:
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.train)

    def begin(self, params: Any) -> tuple[Any, Any, dict[str, Any]]:
        """(parameters, optimiser entry, averages) at the start of a stage: copies, a fresh optimiser."""
        own = tree_copy(params)
        trained, _ = _split(own, self.learns(own))
        entry = {"updates": jnp.zeros((), jnp.int32), "state": self.optim.transform().init(trained)}
        return own, entry, {key: tree_copy(params) for key in self.named_averages}

    def averaged(self, state: State) -> Any:
        """Gives the first average of the network, or the network itself where there is none."""
        return state.ema.get(self.name, state.params[self.name])

    def update(
        self, state: State, loss: LossFn, data: Any, schedule: Schedule
    ) -> tuple[State, dict[str, jax.Array], Any]:
        """One optimiser step: weight rules, gradients (accumulated), clipping, NaN guard, averages.

        Forced weight rules (`Network.project`, EDM2's) are applied to the stored parameters first. When the loss or the
        gradient norm is not finite, nothing of the network's state changes and the metric ``skipped`` is 1: the engine
        counts those and stops the run after too many in a row.

        Args:
          state: the whole state; only the entries of this part change.
          loss: (params, data) -> (loss () float32, `Aux`). The loss is a mean over the batch.
          data: any tree of arrays with leading axis B. Everything random (times, noise, per-sample keys) is drawn for
            the whole batch beforehand and stands in here, so that the result does not depend on accumulation.
          schedule: the step's schedule; ``lr/<name>`` is the learning rate.

        Returns:
          The new state; a dict with ``loss``, ``grad_norm`` (before clipping), ``skipped``, ``lr`` and the loss's own
          metrics; the joined per-sample outputs.
        """
        entry, rate = state.opt[self.name], schedule[f"lr/{self.name}"]
        params = self._project(state.params[self.name])
        trained, rest = _split(params, self.learns(params))
        value, aux, grads = _gradients(lambda part, rows: loss(_join(part, rest), rows), trained, data)
        norm = optax.tree.norm(grads)
        ok = jnp.isfinite(value) & jnp.isfinite(norm)
        direction, inner = self.optim.transform().update(grads, entry["state"], trained)
        learned = optax.apply_updates(trained, jax.tree.map(lambda d: -rate * d, direction))
        buffers = {path: value for path, value in aux.buffers.items() if self._trains(path)}
        new_params = with_buffers(_join(learned, rest), buffers)
        updates, batch = entry["updates"] + 1, jax.tree.leaves(data)[0].shape[0]
        new_ema = {
            key: self._average(state.ema[key], new_params, decay.weight(updates, batch))
            for key, decay in self.named_averages.items()
        }
        old = (params, entry, {key: state.ema[key] for key in new_ema})
        kept = keep_if(ok, (new_params, {"updates": updates, "state": inner}, new_ema), old)
        state = dataclasses.replace(
            state,
            params=state.params | {self.name: kept[0]},
            opt=state.opt | {self.name: kept[1]},
            ema=state.ema | kept[2],
        )
        skipped = 1.0 - ok.astype(jnp.float32)
        metrics = {**aux.metrics, "loss": value, "grad_norm": norm, "skipped": skipped, "lr": rate}
        return state, metrics, aux.out

    def named(self, metrics: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Metrics of a task with several parts, each under its part's name: ``student/loss``."""
        return {f"{self.name}/{key}": value for key, value in metrics.items()}

    def _networks(self) -> Mapping[str, Any]:
        """Configurations by the path under which their parameters lie; "" for the only one."""
        return self.network if isinstance(self.network, Mapping) else {"": self.network}

    def _buffers(self) -> frozenset[str]:
        return frozenset(
            f"{role}/{path}" if role else path
            for role, config in self._networks().items()
            for path in Network(config).buffers
        )

    def _project(self, params: Any) -> Any:
        if not isinstance(self.network, Mapping):
            return Network(self.network).project(params)
        return {role: Network(config).project(params[role]) for role, config in self.network.items()}

    def _average(self, ema: Any, params: Any, weight: jax.Array) -> Any:
        """The average moved towards `params`; buffers are copied."""
        moved, buffers = average(ema, params, weight), self._buffers()
        if not buffers:
            return moved
        newest = flatten(params)
        return map_paths(lambda path, leaf: newest[path] if path in buffers else leaf, moved)


def begin(parts: Iterable[Part], params: Mapping[str, Any], aux: Mapping[str, Any] | None = None) -> State:
    """Gives the state at the start of a stage: copies of `params`, fresh optimisers, averages equal to the parameters.

    Args:
      parts: what is trained.
      params: parameters by part name.
      aux: further arrays of the state, by name.
    """
    begun = {part.name: part.begin(params[part.name]) for part in parts}
    return State(
        step=jnp.zeros((), jnp.int32),
        params={name: own for name, (own, _, _) in begun.items()},
        opt={name: entry for name, (_, entry, _) in begun.items()},
        ema={key: tree for _, _, averages in begun.values() for key, tree in averages.items()},
        aux=tree_copy(dict(aux or {})),
    )


def warm_start(config: Any, key: jax.Array, source: Any) -> Any:
    """Fresh parameters of a network in which arrays of `source` take the place of those with equal path and shape.

    A network of the same configuration becomes a copy; one with another head or number of classes keeps what fits.

    Args:
      config: the network's configuration.
      key: of the parameters that `source` does not give.
      source: parameters of another network.

    Raises:
      GenError: `source` has no array that fits.
    """
    given, fresh = flatten(source), Network(config).init(key)
    fits = {path for path, leaf in flatten(fresh).items() if path in given and given[path].shape == leaf.shape}
    if not fits:
        raise GenError(
            f"no array of the given network fits {type(config).__name__} by path and shape; start from a network of "
            "the same family, or from random weights"
        )
    return map_paths(lambda path, leaf: given[path].astype(leaf.dtype) if path in fits else leaf, fresh)


def keep_if(ok: jax.Array, new: Any, old: Any) -> Any:
    """`new` where `ok` () bool, else `old`, leaf by leaf: for the arrays of a state that a method updates itself."""
    return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)


_Absent = None  # pytrees leave None out: the trained and the fixed arrays of a network share its structure


def _split(params: Any, learns: frozenset[str]) -> tuple[Any, Any]:
    """(trained, fixed) arrays, each in the structure of `params` with None in the other's places."""
    trained = map_paths(lambda path, leaf: leaf if path in learns else _Absent, params)
    return trained, map_paths(lambda path, leaf: _Absent if path in learns else leaf, params)


def _join(trained: Any, fixed: Any) -> Any:
    return jax.tree.map(lambda a, b: b if a is None else a, trained, fixed, is_leaf=lambda leaf: leaf is None)


def with_buffers(params: Any, buffers: Mapping[str, jax.Array]) -> Any:
    """Gives the parameters with new values of the `Buffer`s named by path."""
    if not buffers:
        return params
    return map_paths(lambda path, leaf: buffers.get(path, leaf), params)


_MICROBATCHES: contextvars.ContextVar[int] = contextvars.ContextVar("microbatches", default=1)


@contextlib.contextmanager
def microbatches(count: int) -> Iterator[None]:
    """While a program is traced inside, `Part.update` cuts its batch into `count` parts and averages their gradients.

    Like the mesh, this is where a computation runs and not what it computes, so it is ambient.
    """
    token = _MICROBATCHES.set(count)
    try:
        yield
    finally:
        _MICROBATCHES.reset(token)


def _gradients(loss: LossFn, params: Any, data: Any) -> tuple[jax.Array, Aux, Any]:
    grad = jax.value_and_grad(loss, has_aux=True)
    count = _MICROBATCHES.get()
    if count == 1:
        (value, aux), grads = grad(params, data)
        return value, aux, grads

    def cut(x: jax.Array) -> jax.Array:
        # Rows i, i + count, ... form microbatch i: each device keeps its own rows.
        parts = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return constrain(parts, axis=1)

    def join(x: jax.Array) -> jax.Array:
        return constrain(x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:]))

    def body(total: Any, part: Any) -> tuple[Any, Any]:
        (value, aux), grads = grad(params, part)
        means = (value, aux.metrics, aux.buffers, grads)
        return jax.tree.map(lambda t, v: t + v / count, total, means), aux.out

    parts = jax.tree.map(cut, data)
    (value, aux), grads = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (value, aux.metrics, aux.buffers, grads))
    (value, metrics, buffers, grads), out = jax.lax.scan(body, zeros, parts)
    return value, Aux(metrics, buffers, jax.tree.map(join, out)), grads
