"""Guidance: functions from Denoise to Denoise. Scale w = 1 means none.

Conditional and unconditional inputs run as one batched network call.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from gen.diffusion.denoiser import Denoise, Prediction
from gen.nn.network import Cond

__all__ = ["ClassifierFree", "Guidance"]

Null = Callable[[Cond], Cond]


class Guidance(Protocol):
    """Wraps a Denoise; `null` maps a condition to the unconditional one."""

    def __call__(self, denoise: Denoise, null: Null) -> Denoise:
        """The guided Denoise."""
        ...

    def init(self, x: jax.Array) -> Any:
        """The initial carry for a batch shaped like x; ``()`` for stateless guidance."""
        ...


@dataclasses.dataclass(frozen=True)
class ClassifierFree:
    """u + w (c - u) in the network's own output space (Ho & Salimans 2022).

    Attributes:
      scale: w; 1 is the conditional model, and then no unconditional call is made.
      channels: guide only the first k channels, as the official DiT and SiT scripts do (k = 3); None guides all.
    """

    scale: float = 1.0
    channels: int | None = None

    def init(self, x: jax.Array) -> Any:
        """No state."""
        del x
        return ()

    def __call__(self, denoise: Denoise, null: Null) -> Denoise:
        """See `Guidance`."""
        if self.scale == 1.0:
            return denoise

        def guided(x: jax.Array, t: jax.Array, cond: Cond, step: jax.Array, carry: Any) -> tuple[Prediction, Any]:
            both = {k: jnp.concatenate([v, null(cond)[k]]) for k, v in cond.items()}
            t2 = jnp.concatenate([t, t]) if jnp.ndim(t) else t
            double, carry = denoise(jnp.concatenate([x, x]), t2, both, step, carry)
            c, u = jnp.split(double.value, 2)
            value = u + self.scale * (c - u)
            if self.channels is not None:
                value = jnp.concatenate([value[..., : self.channels], c[..., self.channels :]], axis=-1)
            first = jax.tree.map(lambda v: v[: x.shape[0]] if jnp.ndim(v) else v, double)
            return first.with_value(value), carry

        return guided
