"""Optimisers from optax, and the update that every task's programs are made of."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from gen.errors import GenError
from gen.nn.network import tree_copy
from gen.training.ema import Decay, average
from gen.training.sharding import constrain
from gen.training.task import State

__all__ = ["OptimConfig", "begin", "keep_if", "microbatches", "update"]

LossFn = Callable[[Any, Any], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with a learning-rate schedule and clipping by the global norm.

    Attributes:
      lr: peak learning rate.
      betas, eps: Adam's.
      weight_decay: decoupled, multiplied by the learning rate, on all parameters, as in PyTorch's AdamW.
      schedule: "constant"; "cosine" or "linear" decay to `final` x lr at `decay_steps` (warm-up included);
        "inverse-sqrt": lr / sqrt(max(step / decay_steps, 1)), EDM2's (its ref_batches is `decay_steps`).
      warmup: updates over which the rate rises linearly from 0; EDM2's 10 M images are 10e6 / batch.
      decay_steps, final: see `schedule`.
      clip: largest global norm of the gradient; 0 for no clipping.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine", "linear", "inverse-sqrt"] = "constant"
    warmup: float = 0
    decay_steps: int = 0
    final: float = 0.0
    clip: float = 0.0

    def __post_init__(self) -> None:
        if self.lr < 0 or self.warmup < 0 or self.clip < 0 or self.weight_decay < 0:
            raise GenError(f"negative value in {self}; lr, warmup, clip and weight_decay are >= 0")
        if self.schedule != "constant" and self.decay_steps < 1:
            raise GenError(f"schedule '{self.schedule}' needs decay_steps >= 1; got {self.decay_steps}")
        if self.schedule in ("cosine", "linear") and self.decay_steps <= self.warmup:
            raise GenError(f"decay_steps {self.decay_steps} must exceed warmup {self.warmup}; it includes the warm-up")

    def learning_rate(self, count: Any) -> Any:
        """The rate of the update with this count (0 for the first)."""
        return self._schedule()(count)

    def _schedule(self) -> optax.Schedule:
        if self.schedule == "inverse-sqrt":

            def rate(count: Any) -> Any:
                rise = jnp.minimum(count / self.warmup, 1.0) if self.warmup else 1.0
                return self.lr / jnp.sqrt(jnp.maximum(count / self.decay_steps, 1.0)) * rise

            return rate
        rise = round(self.warmup)
        span, end = self.decay_steps - rise, self.final * self.lr
        after = {
            "constant": lambda: optax.constant_schedule(self.lr),
            "cosine": lambda: optax.cosine_decay_schedule(self.lr, span, self.final),
            "linear": lambda: optax.linear_schedule(self.lr, end, span),
        }[self.schedule]()
        return optax.join_schedules([optax.linear_schedule(0.0, self.lr, rise), after], [rise]) if rise else after

    def transform(self) -> optax.GradientTransformation:
        """The optax chain: clip, then AdamW under the schedule."""
        adamw = optax.adamw(self._schedule(), *self.betas, eps=self.eps, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip), adamw) if self.clip else adamw


def begin(
    params: Mapping[str, Any],
    optimizers: Mapping[str, OptimConfig],
    averages: Mapping[str, Decay] | None = None,
    aux: Mapping[str, Any] | None = None,
) -> State:
    """The state at the start of a stage: copies of `params`, fresh optimisers, averages equal to the parameters.

    Args:
      params: parameters by network name.
      optimizers: by network name; networks without one are never updated.
      averages: decays by ``"<network>"`` or ``"<network>@<label>"``.
      aux: further arrays of the state, by name.
    """
    own = {name: tree_copy(tree) for name, tree in params.items()}
    opt = {
        name: {"updates": jnp.zeros((), jnp.int32), "state": config.transform().init(own[name])}
        for name, config in optimizers.items()
    }
    ema = {name: tree_copy(params[name.partition("@")[0]]) for name in averages or {}}
    return State(step=jnp.zeros((), jnp.int32), params=own, opt=opt, ema=ema, aux=tree_copy(dict(aux or {})))


def update(
    state: State,
    name: str,
    loss_fn: LossFn,
    data: Any,
    optimizer: OptimConfig,
    averages: Mapping[str, Decay] | None = None,
) -> tuple[State, dict[str, Any]]:
    """One optimiser step of one network: gradients (accumulated), clipping, NaN guard, averages.

    When the loss or the gradient norm is not finite, nothing of the network's state changes and the metric
    ``skipped`` is 1: the engine counts those and stops the run after too many in a row.

    Args:
      state: the whole state; only the entries of `name` change.
      name: the network trained; the loss is differentiated with respect to ``state.params[name]``.
      loss_fn: (params, data) -> (loss () float32, metrics). The loss is a mean over the batch; metrics is a
        dict of float arrays, averaged over microbatches.
      data: any tree of arrays with leading axis B. Everything random (times, noise, per-sample keys) is drawn
        for the whole batch beforehand and stands in here, so that the result does not depend on accumulation.
      optimizer: the one given to `begin` for this network.
      averages: the decays given to `begin`; those of other networks are ignored.

    Returns:
      The new state, and a dict with ``loss``, ``grad_norm`` (before clipping), ``skipped`` and the metrics.
    """
    params, entry = state.params[name], state.opt[name]
    loss, metrics, grads = _gradients(loss_fn, params, data)
    norm = optax.tree.norm(grads)
    ok = jnp.isfinite(loss) & jnp.isfinite(norm)
    steps, inner = optimizer.transform().update(grads, entry["state"], params)
    new_params = optax.apply_updates(params, steps)
    updates = entry["updates"] + 1
    batch = jax.tree.leaves(data)[0].shape[0]
    new_ema = {
        key: average(state.ema[key], new_params, decay.weight(updates, batch))
        for key, decay in (averages or {}).items()
        if key.partition("@")[0] == name
    }
    new_entry = {"updates": updates, "state": inner}
    old_ema = {key: state.ema[key] for key in new_ema}
    kept = keep_if(ok, (new_params, new_entry, new_ema), (params, entry, old_ema))
    state = dataclasses.replace(
        state, params=state.params | {name: kept[0]}, opt=state.opt | {name: kept[1]}, ema=state.ema | kept[2]
    )
    return state, {**metrics, "loss": loss, "grad_norm": norm, "skipped": 1.0 - ok.astype(jnp.float32)}


def keep_if(ok: jax.Array, new: Any, old: Any) -> Any:
    """`new` where `ok` () bool, else `old`, leaf by leaf: for the parts of a state a task updates itself."""
    return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)


_MICROBATCHES: contextvars.ContextVar[int] = contextvars.ContextVar("microbatches", default=1)


@contextlib.contextmanager
def microbatches(count: int) -> Iterator[None]:
    """While a program is traced inside, `update` cuts its batch into `count` parts and averages their gradients.

    Like the mesh, this is where a computation runs and not what it computes, so it is ambient.
    """
    token = _MICROBATCHES.set(count)
    try:
        yield
    finally:
        _MICROBATCHES.reset(token)


def _gradients(loss_fn: LossFn, params: Any, data: Any) -> tuple[jax.Array, Any, Any]:
    grad = jax.value_and_grad(loss_fn, has_aux=True)
    count = _MICROBATCHES.get()
    if count == 1:
        (loss, metrics), grads = grad(params, data)
        return loss, metrics, grads

    def cut(x: jax.Array) -> jax.Array:
        # Rows i, i + count, ... form microbatch i: each device keeps its own rows.
        parts = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return constrain(parts, axis=1)

    def body(total: Any, part: Any) -> tuple[Any, None]:
        (loss, metrics), grads = grad(params, part)
        return jax.tree.map(lambda t, v: t + v / count, total, (loss, metrics, grads)), None

    parts = jax.tree.map(cut, data)
    shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), ((shapes[0][0]), shapes[0][1], shapes[1]))
    (loss, metrics, grads), _ = jax.lax.scan(body, zeros, parts)
    return loss, metrics, grads
