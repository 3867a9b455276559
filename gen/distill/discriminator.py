"""The discriminator of adversarial distillation: light heads on a diffusion model's features of noised data.

DMD2 puts them on its fake score (Yin et al. 2024, arXiv 2405.14867, section 4.3), f-distill and LADD on the frozen
teacher (Xu et al. 2025, arXiv 2502.15681; Sauer et al. 2024, arXiv 2403.12015). Logits of several heads or positions
are averaged in every loss.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gen.diffusion.objectives import Draws, noised
from gen.diffusion.times import Levels, TimeSampler
from gen.errors import GenError
from gen.nn.adversarial import logistic_discriminator_loss, logistic_generator_loss
from gen.nn.network import Cond, Network, Params
from gen.training.method import StudentMethod

__all__ = ["AdversarialStudent", "ApproximateR1"]


@dataclasses.dataclass(frozen=True)
class ApproximateR1:
    """weight mean (D(x_t) - D(x_t + spread n))^2 on real data: R1 without a second derivative.

    Source: APT (Lin et al. 2025, arXiv 2501.08316).

    Attributes:
      weight: in the discriminator's loss.
      spread: standard deviation of the disturbance.
      clean: disturb the data before they are noised, and judge them unnoised at the noised data's time, as
        NVlabs/FastGen does.

    Raises GenError for numbers that are not positive.
    """

    weight: float = 100.0
    spread: float = 0.1
    clean: bool = False

    def __post_init__(self) -> None:
        if self.weight <= 0.0 or self.spread <= 0.0:
            raise GenError(f"R1 of weight {self.weight} and spread {self.spread}; give positive numbers, or no R1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialStudent(StudentMethod):
    """A student that a discriminator judges, which sees noised data through a diffusion model's features.

    Attributes:
      head: the discriminator's head, or `gen.nn.adversarial.Heads` with one for each tap; None for no GAN loss.
      taps: names of the features; a single head gets several joined on the channel axis.
      gan_levels: how the times are drawn at which it judges (`gen.diffusion.times`).
      r1: keeps it smooth around real data; None for DMD2's, which is not.

    Raises GenError for a head without taps, or taps without a head.
    """

    head: Any = None
    taps: tuple[str, ...] = ()
    gan_levels: Levels | TimeSampler = Levels()
    r1: ApproximateR1 | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.head is None) != (not self.taps):
            raise GenError("a discriminator head reads taps: give both `head` and `taps`, or neither")

    def judging(self, key: jax.Array, x: jax.Array) -> Draws:
        """Draws times and noise for data shaped like x (B, ...), and the disturbance ``r1`` where one is used."""
        time, noise, r1 = jax.random.split(key, 3)
        extra = {} if self.r1 is None else {"r1": jax.random.normal(r1, x.shape)}
        times = self.gan_levels(time, self.teacher.process, x.shape[0])
        return Draws(times, jax.random.normal(noise, x.shape), extra)

    def judged(self, features: Params, head: Params, x_t: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
        """Gives the logits (B, positions) of noised data.

        Args:
          features: parameters of the network that looks, in the teacher's architecture.
          head: parameters of the head.
        """
        found = self.teacher.features(features, x_t, t, cond, self.taps)
        return Network(self.head)(head, *(found[name] for name in self.taps))

    def logits(self, features: Params, head: Params, x: jax.Array, cond: Cond, draws: Draws) -> jax.Array:
        """Gives the logits (B, positions) of x noised by `draws`."""
        return self.judged(features, head, noised(self.teacher.process, x, draws), draws.t, cond)

    def gan_loss(self, features: Params, head: Params, x: jax.Array, cond: Cond, draws: Draws) -> jax.Array:
        """Gives the student's loss mean softplus(-logit) of generated x, differentiable through the features."""
        return logistic_generator_loss(self.logits(features, head, x, cond, draws))

    def head_loss(
        self,
        features: Params,
        head: Params,
        fake: tuple[jax.Array, Cond, Draws],
        real: tuple[jax.Array, Cond, Draws],
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Gives mean softplus(fake logit) + mean softplus(-real logit), with R1 where there is one, and its terms.

        Args:
          fake, real: data (B, ...), their conditions, and the draws that noise them.
        """
        plain = [(x, cond, Draws(draws.t, draws.eps)) for x, cond, draws in (fake, real)]
        on_fake, on_real = jnp.split(
            self.logits(features, head, *jax.tree.map(lambda *v: jnp.concatenate(v), *plain)), 2
        )
        loss = logistic_discriminator_loss(on_real, on_fake)
        terms = {
            "head_loss": loss,
            "p_real": jax.nn.sigmoid(on_real).mean(),
            "p_fake": jax.nn.sigmoid(on_fake).mean(),
        }
        if self.r1 is not None:
            x, cond, draws = real
            start = x if self.r1.clean else noised(self.teacher.process, x, draws)
            moved = self.judged(features, head, start + self.r1.spread * draws.extra["r1"], draws.t, cond)
            terms["r1"] = jnp.square(on_real - moved).mean()
            loss = loss + self.r1.weight * terms["r1"]
        return loss, terms
