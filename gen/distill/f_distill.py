"""f-distill: distribution matching under any f-divergence (Xu et al. 2025, arXiv 2502.15681).

The gradient of D_f(p || q) between the teacher's and the student's noised distributions is DMD2's, weighted for each
sample by h(r) = r^2 f''(r) of the density ratio r = p(x_t) / q(x_t) (section 3). A discriminator on the teacher's
features of x_t knows that ratio: r = exp(logit). Divergences that look for all modes (kl, jeffreys) weigh samples up
where the student has too few; reverse KL, whose h is 1, is DMD2.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from gen.diffusion.objectives import noised
from gen.diffusion.times import Levels
from gen.distill.dmd2 import DMD2Draws, DMD2Task, matching_gradient
from gen.errors import GenError
from gen.nn.network import Cond, Params
from gen.training.part import keep_if
from gen.training.task import State

__all__ = ["DIVERGENCES", "FDistillTask", "RatioBins", "density_ratio", "divergence_weight"]

Divergence = Literal["reverse-kl", "kl", "js", "softened-reverse-kl", "hellinger", "jeffreys", "neyman"]

# h(r) = r^2 f''(r) up to a constant (table 1 of the paper)
DIVERGENCES: dict[Divergence, Callable[[jax.Array], jax.Array]] = {
    "reverse-kl": jnp.ones_like,
    "kl": lambda r: r,
    "js": lambda r: r / (1.0 + r),
    "softened-reverse-kl": lambda r: 1.0 / (1.0 + r),
    "hellinger": jnp.sqrt,
    "jeffreys": lambda r: 1.0 + r,
    "neyman": lambda r: 1.0 / jnp.maximum(r, 1e-8),
}
_TINY = 1e-6


def density_ratio(logits: jax.Array, low: float, high: float) -> jax.Array:
    """Gives r (B,) = exp(mean logit) from a discriminator's logits (B, positions), held within [low, high]."""
    return jnp.clip(jnp.exp(jnp.clip(logits.mean(-1), -10.0, 10.0)), low, high)


def divergence_weight(r: jax.Array, divergence: Divergence) -> jax.Array:
    """Gives h(r) (B,) of density ratios (B,), divided by its mean over the batch."""
    h = DIVERGENCES[divergence](r)
    return h / (h.mean() + _TINY)


@dataclasses.dataclass(frozen=True)
class RatioBins:
    """Running means of the density ratio in bins of time, by which ratios are divided: a discriminator is surer at
    some noise levels than at others.

    Attributes:
      count: of the bins.
      rate: share that a bin keeps of its old mean; 0 takes the batch's own mean, which makes a lone sample's ratio 1.
      spacing: bins of equal width in the ``logsnr`` over the process's times, or in ``time`` itself. On EDM's clock
        the latter, which NVlabs/FastGen takes, puts most draws into the first bin.

    Raises GenError for no bins, and a rate outside [0, 1).
    """

    count: int = 10
    rate: float = 0.5
    spacing: Literal["logsnr", "time"] = "logsnr"

    def __post_init__(self) -> None:
        if self.count < 1 or not 0.0 <= self.rate < 1.0:
            raise GenError(f"{self.count} ratio bins that keep {self.rate}; expected at least one, and 0 <= rate < 1")

    def of(self, t: jax.Array, process: Any, levels: Levels) -> jax.Array:
        """Gives the bin (B,) int32 of each time (B,); the first is at the data end, the last at the noise end.

        Args:
          levels: the times that are drawn, over which bins of log-SNR are laid.
        """
        if self.spacing == "time":
            place, first, last = t, process.t_min, process.t_max
        else:
            place = -process.logsnr(t)
            first, last = -process.logsnr(levels.table(process)[list(levels.ends)])
        share = (place - float(first)) / (float(last) - float(first))
        return jnp.clip(jnp.floor(share * self.count), 0, self.count - 1).astype(jnp.int32)

    def update(self, means: jax.Array, r: jax.Array, index: jax.Array) -> jax.Array:
        """Gives the means (count,) after ratios r (B,) in bins `index` (B,); bins that none fell into stay."""
        total = jnp.zeros(self.count).at[index].add(r)
        number = jnp.zeros(self.count).at[index].add(1.0)
        return jnp.where(number > 0.0, self.rate * means + (1.0 - self.rate) * total / (number + _TINY), means)


@dataclasses.dataclass(frozen=True)
class FDistillTask(DMD2Task):
    """DMD2 whose matching gradient is weighted by an f-divergence's h(r); it needs a head.

    The discriminator judges the very x_t that are matched and denoised. Means over the batch are those of a microbatch
    where gradients are accumulated.

    Attributes:
      divergence: which one is minimised.
      ratio_range: where density ratios are clipped.
      bins: divides ratios by running means before h is taken; None for none.

    Raises GenError for a missing head, and a range of ratios without 1.
    """

    features: Literal["fake", "teacher"] = "teacher"
    head_weight: float = 1.0
    divergence: Divergence = "js"
    ratio_range: tuple[float, float] = (0.1, 20.0)
    bins: RatioBins | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head is None:
            raise GenError("f-distill reads density ratios off a discriminator; give it `head` and `taps`")
        low, high = self.ratio_range
        if not 0.0 < low < 1.0 < high:
            raise GenError(f"ratio_range {self.ratio_range} does not hold 1, the ratio of equal distributions")

    def draw(self, key: jax.Array, x: jax.Array) -> DMD2Draws:
        """Draws as DMD2 does; the discriminator sees the same x_t as the two scores."""
        d = super().draw(key, x)
        return dataclasses.replace(d, gan_student=d.matching, gan_fake=d.fake)

    def aux(self) -> Mapping[str, Any]:
        """Gives the running means of the ratio, 1 at first, where there are any."""
        return {} if self.bins is None else {"ratio_means": jnp.ones(self.bins.count)}

    def weights(self, r: jax.Array, t: jax.Array, aux: Mapping[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Gives h (B,) for ratios r at times t (B,), and what `followed` needs of each sample."""
        out = {"r": r}
        if self.bins is not None:
            out["bin"] = self.bins.of(t, self.teacher.process, self.levels)
            r = r / (self.bins.update(aux["ratio_means"], r, out["bin"])[out["bin"]] + _TINY)
        return divergence_weight(r, self.divergence), out

    def matching(
        self, x: jax.Array, teacher: Params, fake: Params, cond: Cond, draws: DMD2Draws, aux: Mapping[str, Any]
    ) -> tuple[jax.Array, Any]:
        """Gives h(r) times DMD2's gradient on generated x (equation 9), and the ratios."""
        d, process = draws.matching, self.teacher.process
        logits = self.judged(*self.seen(teacher, fake), noised(process, x, d), d.t, cond)
        h, out = self.weights(density_ratio(logits, *self.ratio_range), d.t, aux)
        gradient = matching_gradient(x, *self.scores(teacher, fake, x, cond, d))
        return h.reshape(h.shape + (1,) * (x.ndim - 1)) * gradient, out

    def followed(self, state: State, out: Any, ok: jax.Array) -> State:
        """Gives the state with the running means after a student update, if that was finite."""
        if self.bins is None:
            return state
        old = state.aux["ratio_means"]
        new = keep_if(ok, self.bins.update(old, out["r"], out["bin"]), old)
        return dataclasses.replace(state, aux=state.aux | {"ratio_means": new})
