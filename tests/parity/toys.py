"""The toy network of the loss fixtures: a two-level convolutional net that stands in for a real backbone.

    emb = tanh(c wt + bt + y wy [+ c_s ws]);  h = silu(conv_in(x) + emb);  mid = silu(conv_mid(avgpool(h)))
    F = conv_out(silu(h + conv_up(upsample(mid))))

Official arrays are NCHW with OIHW kernels; ours NHWC with HWIO.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Toy:
    """Channels of the image, of the full-size and of the half-size level; width of the condition "y"; times."""

    channels: int
    hidden: int
    middle: int
    cond: int
    times: int = 1

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return _Toy(self, rngs)


class _Toy(nnx.Module):
    def __init__(self, config: Toy, rngs: nnx.Rngs) -> None:
        c, h, m = config.channels, config.hidden, config.middle
        self.wt = nnx.Param(jax.random.normal(rngs.params(), (h,)))
        self.bt = nnx.Param(jnp.zeros((h,)))
        self.wy = nnx.Param(jax.random.normal(rngs.params(), (config.cond, h)))
        if config.times == 2:
            self.ws = nnx.Param(jax.random.normal(rngs.params(), (h,)))
        self.conv_in = nnx.Conv(c, h, (3, 3), rngs=rngs)
        self.conv_mid = nnx.Conv(h, m, (3, 3), rngs=rngs)
        self.conv_up = nnx.Conv(m, h, (1, 1), rngs=rngs)
        self.conv_out = nnx.Conv(h, c, (3, 3), rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        times: tuple[jax.Array, ...],
        cond: Mapping[str, jax.Array],
        *,
        controls: Any = None,
        taps: tuple[str, ...] = (),
        stop: bool = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        emb = times[0][:, None] * self.wt[...] + self.bt[...] + cond["y"] @ self.wy[...]
        if len(times) == 2:
            emb = emb + times[1][:, None] * self.ws[...]
        emb = jnp.tanh(emb)
        h = jax.nn.silu(self.conv_in(x) + emb[:, None, None])
        mid = jax.nn.silu(self.conv_mid(nnx.avg_pool(h, (2, 2), (2, 2))))
        features = {name: value for name, value in {"h": h, "mid": mid}.items() if name in taps}
        if stop:
            return x, features
        up = self.conv_up(jnp.repeat(jnp.repeat(mid, 2, axis=1), 2, axis=2))
        return self.conv_out(jax.nn.silu(h + up)), features

    def null(self, cond: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        """The unconditional embedding travels in the condition."""
        return {"y": cond["null"], "null": cond["null"]}


def nhwc(x: np.ndarray) -> np.ndarray:
    """(..., C, H, W) -> (..., H, W, C)."""
    return np.moveaxis(x, -3, -1)


def nchw(x: Any) -> np.ndarray:
    """(..., H, W, C) -> (..., C, H, W)."""
    return np.moveaxis(np.asarray(x), -1, -3)


def ours(weights: Mapping[str, np.ndarray], prefix: str) -> dict[str, Any]:
    """The official arrays below `prefix` as our nested dict."""
    out: dict[str, Any] = {}
    for name, value in weights.items():
        if not name.startswith(prefix):
            continue
        *path, leaf = name[len(prefix) :].split(".")
        if leaf == "weight" and value.ndim == 4:
            leaf, value = "kernel", value.transpose(2, 3, 1, 0)
        elif leaf == "weight":
            leaf = "scale"
        node = out
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = jnp.asarray(value)
    return out


def official(params: Mapping[str, Any], prefix: str) -> dict[str, np.ndarray]:
    """Our nested dict under official names and layouts: the inverse of `ours`."""
    out: dict[str, np.ndarray] = {}
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        *names, leaf = [str(p.key) for p in path]
        value = np.asarray(value)
        if leaf == "kernel":
            leaf, value = "weight", value.transpose(3, 2, 0, 1)
        out[prefix + ".".join([*names, "weight" if leaf == "scale" else leaf])] = value
    return out


def walk(solver: Any, problem: Any) -> Any:
    """The states after each step, by a loop in Python: a network that is compiled once serves every solver."""
    columns = dict(solver.rows(problem.grid))
    i = np.asarray(columns.pop("i", np.arange(problem.grid.steps)))
    state, found = solver.start(problem), []
    for row, step in enumerate(i):
        ends = {"first": row == 0 or i[row - 1] != step, "last": row + 1 == len(i) or i[row + 1] != step}
        values = {name: jnp.asarray(column[row], jnp.float32) for name, column in columns.items()}
        state = solver.step(
            problem, state, values | {"i": jnp.int32(step)} | {k: jnp.asarray(v) for k, v in ends.items()}
        )
        if ends["last"]:
            found.append(state.x)
    return jnp.stack(found)
