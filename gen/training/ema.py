"""Exponential moving averages of parameters: constant and power-function decays, post-hoc reconstruction.

The power-function average and its reconstruction after training are those of EDM2 (Karras et al. 2023,
arXiv 2312.02696, section 3 and appendix C). Formulas on the host are NumPy float64.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from gen.errors import GenError

__all__ = [
    "Constant",
    "Decay",
    "HalfLife",
    "PowerFunction",
    "average",
    "combine",
    "exponent_to_std",
    "numbered",
    "posthoc_coefficients",
    "power_function_beta",
    "power_function_response",
    "std_to_exponent",
]

Float64 = NDArray[np.float64]


class Decay(Protocol):
    """How fast an average forgets: a frozen dataclass."""

    def weight(self, updates: jax.Array, batch: int) -> jax.Array:
        """Gives 1 - beta, the weight of the newest parameters.

        Args:
          updates: () int, updates of this network so far, the one being averaged included (>= 1).
          batch: global batch size, for decays that count images.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Constant:
    """ema <- decay ema + (1 - decay) params.

    Attributes:
      decay: in [0, 1); 0.9999 is the habit of the field.
      warmup: use min(decay, (1 + n) / (10 + n)) at update n, so that short runs forget their start.

    Raises GenError for a decay outside [0, 1).
    """

    decay: float = 0.9999
    warmup: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise GenError(f"EMA decay is {self.decay}; expected a number in [0, 1)")

    def weight(self, updates: jax.Array, batch: int) -> jax.Array:
        """Does what `Decay.weight` says."""
        full = jnp.asarray(1 - self.decay, jnp.float32)
        return jnp.maximum(full, 9.0 / (10.0 + updates.astype(jnp.float32))) if self.warmup else full


@dataclasses.dataclass(frozen=True)
class HalfLife:
    """Halves the past every `images`, less at the start (EDM, Karras et al. 2022, training loop).

    Attributes:
      images: half-life in images.
      rampup: the half-life is at most this fraction of the images seen; 0 for none.

    Raises GenError for a half-life that is not positive, and a negative ramp.
    """

    images: float = 500_000.0
    rampup: float = 0.05

    def __post_init__(self) -> None:
        if self.images <= 0 or self.rampup < 0:
            raise GenError(f"EMA half-life {self.images}, rampup {self.rampup}; expected > 0 and >= 0")

    def weight(self, updates: jax.Array, batch: int) -> jax.Array:
        """Does what `Decay.weight` says. The images seen are counted before the update, as EDM does."""
        seen = (updates.astype(jnp.float32) - 1) * batch
        half = jnp.minimum(self.images, seen * self.rampup) if self.rampup else jnp.asarray(self.images)
        return -jnp.expm1(-jnp.log(2.0) * batch / jnp.maximum(half, 1e-8))


@dataclasses.dataclass(frozen=True)
class PowerFunction:
    """The average with profile (tau / t)^gamma, given by its relative width (EDM2).

    Attributes:
      std: standard deviation of the profile relative to the training length; EDM2 tracks 0.05 and 0.10.

    Raises GenError for a width outside (0, 0.28).
    """

    std: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.std < 0.28:
            raise GenError(f"EMA std is {self.std}; expected a relative width in (0, 0.28)")

    def weight(self, updates: jax.Array, batch: int) -> jax.Array:
        """Does what `Decay.weight` says. beta = (1 - 1/n)^(gamma + 1); the batch size cancels."""
        gamma = float(std_to_exponent(self.std))
        return -jnp.expm1((gamma + 1) * jnp.log1p(-1.0 / updates.astype(jnp.float32)))


def numbered(name: str, decays: Sequence[Decay]) -> dict[str, Decay]:
    """Averages of one network as the state names them: `name` the first, ``name@i`` the i-th further one."""
    return {name if i == 0 else f"{name}@{i}": decay for i, decay in enumerate(decays)}


def average(ema: Any, params: Any, weight: jax.Array) -> Any:
    """Gives ema + weight (params - ema), in the average's dtype (float32)."""
    return jax.tree.map(lambda e, p: e + weight.astype(e.dtype) * (p.astype(e.dtype) - e), ema, params)


def std_to_exponent(std: ArrayLike) -> Float64:
    """Gives the exponent gamma of a profile of relative width `std`: the largest real root of

    gamma^3 + 7 gamma^2 + (16 - std^-2) gamma + (12 - std^-2) = 0 (EDM2 appendix C, eq. 126-128).
    """
    std = np.asarray(std, np.float64)
    inverse = std.reshape(-1) ** -2.0
    roots = [np.roots([1.0, 7.0, 16.0 - v, 12.0 - v]).real.max() for v in inverse]
    return np.asarray(roots, np.float64).reshape(std.shape)


def exponent_to_std(exponent: ArrayLike) -> Float64:
    """Gives sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))): inverse of `std_to_exponent`."""
    g = np.asarray(exponent, np.float64)
    return np.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3)))


def power_function_beta(std: ArrayLike, t_next: ArrayLike, t_delta: ArrayLike) -> Float64:
    """Gives the decay (1 - t_delta / t_next)^(gamma + 1) of one step that ends at `t_next` (any unit of time)."""
    ratio = np.asarray(t_delta, np.float64) / np.asarray(t_next, np.float64)
    return (1 - ratio) ** (std_to_exponent(std) + 1)


def power_function_response(times: ArrayLike, end: ArrayLike, std: ArrayLike) -> Float64:
    """Gives discrete weights (t / end)^gamma for t <= end, else 0, summing to one over `times`.

    Args:
      times: (T,) times of the averaged parameters.
      end, std: (N,) end time and relative width of each profile.

    Returns:
      (T, N) float64.
    """
    t = np.asarray(times, np.float64)[:, None]
    end_, gamma = np.asarray(end, np.float64)[None], std_to_exponent(std)[None]
    profile = np.where(t <= end_, (t / end_) ** gamma, 0.0)
    return profile / profile.sum(axis=0)


def posthoc_coefficients(in_times: ArrayLike, in_std: ArrayLike, out_times: ArrayLike, out_std: ArrayLike) -> Float64:
    """Gives weights that turn stored averages into averages of other widths and times (EDM2 appendix C, least squares).

    Solves A X = B with A_ij = <p_i, p_j> and B_ij = <p_i, q_j>, the inner products of the profiles, then
    divides each column by its sum.

    Args:
      in_times, in_std: (M,) times and relative widths of the stored averages; times in any one unit, > 0.
      out_times, out_std: (N,) those wanted.

    Returns:
      (M, N) float64.
    """
    ti, gi = np.asarray(in_times, np.float64)[:, None], std_to_exponent(in_std)[:, None]
    to, go = np.asarray(out_times, np.float64)[None], std_to_exponent(out_std)[None]
    solution = np.linalg.solve(_inner(ti, gi, ti.T, gi.T), _inner(ti, gi, to, go))
    return solution / solution.sum(axis=0)


def _inner(ta: Float64, ga: Float64, tb: Float64, gb: Float64) -> Float64:
    ratio = (ta / tb) ** np.where(ta < tb, gb, -ga)
    return (ga + 1) * (gb + 1) * ratio / ((ga + gb + 1) * np.maximum(ta, tb))


def combine(snapshots: Sequence[Any], weights: ArrayLike) -> Any:
    """Gives the weighted sum of M trees (one column of `posthoc_coefficients`), summed in float64, given in their
    dtype.

    Raises GenError for another number of weights than of snapshots.
    """
    weights = np.asarray(weights, np.float64)
    if weights.shape != (len(snapshots),):
        raise GenError(f"{len(snapshots)} snapshots but weights of shape {weights.shape}; give one weight each")

    def one(*leaves: Any) -> Any:
        total = sum(w * np.asarray(leaf, np.float64) for w, leaf in zip(weights, leaves, strict=True))
        return np.asarray(total).astype(leaves[0].dtype)

    return jax.tree.map(one, *snapshots)
