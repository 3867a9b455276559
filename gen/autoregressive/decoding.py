"""How a token is chosen from logits: temperature, filters, guidance by step. Pure functions, shared by all samplers."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gen.errors import GenError

__all__ = [
    "ConstantScale",
    "LinearScale",
    "Pick",
    "PowerCosineScale",
    "ScaleSchedule",
    "drawn",
    "filtered",
    "gumbel",
    "mix",
    "top_k",
    "top_p",
]

Pick = Callable[[jax.Array, Any], jax.Array]  # (logits (B, n, V), number of the step) -> ids (B, n) int32


def top_k(logits: jax.Array, k: int) -> jax.Array:
    """Puts -inf where a logit (..., V) is below the k-th largest; ties with it stay. k = 0 keeps all."""
    if not 0 < k < logits.shape[-1]:
        return logits
    least = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def top_p(logits: jax.Array, p: float) -> jax.Array:
    """Puts -inf on the tokens of logits (..., V) before which, from the most probable on, more than p is gathered.

    The token that crosses the threshold stays, so one always does (Holtzman et al. 2020, arXiv 1904.09751). p = 1 keeps
    all.
    """
    if p >= 1.0:
        return logits
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    before = before.at[..., 0].set(0.0)
    kept = jnp.take_along_axis(before <= p, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, logits, -jnp.inf)


def filtered(logits: jax.Array, *, temperature: float = 1.0, k: int = 0, p: float = 1.0) -> jax.Array:
    """Divides logits (..., V) by the temperature, then keeps the k largest, then the nucleus of mass p."""
    return top_p(top_k(logits.astype(jnp.float32) / max(temperature, 1e-5), k), p)


def gumbel(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Gives Gumbel noise (B, *shape): row i depends on keys[i] alone."""
    return jax.vmap(lambda key: jax.random.gumbel(key, shape))(keys)


def drawn(keys: jax.Array, logits: jax.Array, step: Any) -> jax.Array:
    """Draws ids (B, ...) int32 from logits (B, ..., V), of sample i by keys[i] and the number of the step alone."""
    own = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
    return jnp.argmax(logits + gumbel(own, logits.shape[1:]), axis=-1).astype(jnp.int32)


def mix(conditional: jax.Array, null: jax.Array, scale: Any) -> jax.Array:
    """Gives null + w (conditional - null): classifier-free guidance of logits; w = 1 means none."""
    return null + scale * (conditional - null)


class ScaleSchedule(Protocol):
    """How the guidance scale w changes over the steps of a decoding."""

    @property
    def guides(self) -> bool:
        """Tells whether any step is guided, so that the null condition is evaluated too."""
        ...

    def scales(self, steps: int) -> np.ndarray:
        """Gives w (steps,) float64 of each step; 1 means no guidance."""
        ...


@dataclasses.dataclass(frozen=True)
class ConstantScale:
    """w at all steps, or at the first `until`, and none after them (LlamaGen's cfg_interval is until - 2).

    Attributes:
      scale: w; 1 for no guidance.
      until: number of guided steps; None for all.
    """

    scale: float = 1.0
    until: int | None = None

    @property
    def guides(self) -> bool:
        """Does what `ScaleSchedule.guides` says."""
        return self.scale != 1.0 and self.until != 0

    def scales(self, steps: int) -> np.ndarray:
        """Does what `ScaleSchedule.scales` says."""
        return np.where(np.arange(steps) < (steps if self.until is None else self.until), self.scale, 1.0)


@dataclasses.dataclass(frozen=True)
class LinearScale:
    """Rises from no guidance at the first step to w at the last: w_i = 1 + (w - 1) i / (steps - 1).

    VAR (Tian et al. 2024, arXiv 2404.02905), whose scripts call w - 1 ``cfg``.
    """

    scale: float = 1.0

    @property
    def guides(self) -> bool:
        """Does what `ScaleSchedule.guides` says."""
        return self.scale != 1.0

    def scales(self, steps: int) -> np.ndarray:
        """Does what `ScaleSchedule.scales` says."""
        return 1.0 + (self.scale - 1.0) * np.arange(steps) / max(steps - 1, 1)


@dataclasses.dataclass(frozen=True)
class PowerCosineScale:
    """Gives w_i = 1 + (w - 1) (1 - cos(pi (i / steps)^power)) / 2: MDT's schedule, as RAR uses it (arXiv 2411.00776).

    A power of 0 gives w at every step. A negative one raises GenError.
    """

    scale: float = 1.0
    power: float = 0.0

    def __post_init__(self) -> None:
        if self.power < 0:
            raise GenError(f"power {self.power} of a guidance schedule; expected 0 (constant) or more")

    @property
    def guides(self) -> bool:
        """Does what `ScaleSchedule.guides` says."""
        return self.scale != 1.0

    def scales(self, steps: int) -> np.ndarray:
        """Does what `ScaleSchedule.scales` says."""
        done = (np.arange(steps) / steps) ** self.power
        return 1.0 + (self.scale - 1.0) * (1.0 - np.cos(np.pi * done)) / 2.0
