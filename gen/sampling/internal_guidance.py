"""Internal guidance: an early head of the network is the weaker model that its last one is guided away from (RAEv2)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gen.diffusion.clamped import early_of
from gen.diffusion.prediction import Denoise, Prediction
from gen.diffusion.process import expand
from gen.nn.network import Cond
from gen.sampling.guidance import Carry, Null

__all__ = ["Internal"]


@dataclasses.dataclass(frozen=True)
class Internal:
    """u + w (c - u) where u is an early head's prediction of the same network, from the same call (RAEv2).

    The network returns its early head's output (``gen.diffusion.backbones.rae_v2``); no further call is made. Chained
    before classifier-free guidance it acts on the conditional and on the unconditional prediction.

    Attributes:
      scale: w; 1 leaves the early head out.
      null_scale: w of samples whose condition is the null one; None for the same.
    """

    scale: float = 1.78
    null_scale: float | None = None

    def init(self, x: jax.Array) -> Carry:
        """Carries no state from call to call."""
        del x
        return {}

    def __call__(self, denoise: Denoise, null: Null, weak: Denoise | None = None) -> Denoise:
        """Does what `Guidance.__call__` says. Raises GenError for a network without an early head."""
        del weak
        if self.scale == 1.0 and self.null_scale in (None, 1.0):
            return denoise

        def guided(x: jax.Array, t: jax.Array, cond: Cond, step: jax.Array, carry: Any) -> tuple[Prediction, Any]:
            first, carry = denoise(x, t, cond, step, carry)
            c, u = first.value, early_of(first).as_kind(first.kind)
            scale: Any = self.scale
            if self.null_scale is not None:
                dropped = jnp.stack([_same(cond[k], v) for k, v in null(cond).items()]).all(0)
                scale = expand(jnp.where(dropped, self.null_scale, self.scale), x)
            return first.with_value(u + scale * (c - u)), carry

        return guided


def _same(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a == b).reshape(len(a), -1).all(1)
