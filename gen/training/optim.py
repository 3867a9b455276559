"""Optimisers from optax, under learning-rate schedules that the host evaluates."""

import dataclasses
import math
from typing import Literal

import optax

from gen.errors import GenError

__all__ = ["OptimConfig"]


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with a learning-rate schedule and clipping by the global norm.

    A cosine or linear schedule is as long as the network's own updates in its stage: it has no length of its own.

    Attributes:
      lr: peak learning rate.
      betas, eps: Adam's.
      rectified: RAdam instead of Adam (Liu et al. 2020, arXiv 1908.03265), which rests while its second moment is still
        an average of few steps; consistency models are trained with it.
      weight_decay: decoupled, multiplied by the learning rate, on all trained parameters, as in PyTorch's AdamW.
      schedule: "constant"; "cosine" or "linear" decay from `lr` to `final` x lr over the updates of the stage (warm-up
        included); "inverse-sqrt": lr / sqrt(max(update / knee, 1)), EDM2's (its ref_batches is `knee`).
      warmup: updates over which the rate rises linearly from 0; EDM2's 10 M images are 10e6 / batch.
      knee: update from which "inverse-sqrt" falls.
      final: see `schedule`.
      clip: largest global norm of the gradient; 0 for no clipping.

    Raises GenError for negative numbers, and a knee of a schedule that has none.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    rectified: bool = False
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine", "linear", "inverse-sqrt"] = "constant"
    warmup: float = 0
    knee: int = 0
    final: float = 0.0
    clip: float = 0.0

    def __post_init__(self) -> None:
        if self.lr < 0 or self.warmup < 0 or self.clip < 0 or self.weight_decay < 0:
            raise GenError(f"negative value in {self}; lr, warmup, clip and weight_decay are >= 0")
        if (self.schedule == "inverse-sqrt") != (self.knee >= 1):
            raise GenError(
                f"schedule '{self.schedule}' with knee {self.knee}; inverse-sqrt needs a knee of at least 1 update, "
                "the other schedules have none"
            )

    @property
    def derived(self) -> bool:
        """Tells whether the schedule is as long as the stage."""
        return self.schedule in ("cosine", "linear")

    def rate(self, update: int, total: int) -> float:
        """Gives the learning rate of update number `update` (0 for the first) of `total` in the stage.

        A stage that is shorter than the warm-up ends within it.
        """
        rise = self.warmup if self.schedule == "inverse-sqrt" else round(self.warmup)
        risen = self.lr * min(update / rise, 1.0) if rise else self.lr
        if self.schedule == "inverse-sqrt":
            return risen / math.sqrt(max(update / self.knee, 1.0))
        if self.schedule == "constant" or update < rise:
            return risen
        done = min((update - rise) / max(total - rise, 1), 1.0)
        left = 0.5 * (1.0 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1.0 - done
        return self.lr * (self.final + (1.0 - self.final) * left)

    def transform(self) -> optax.GradientTransformation:
        """Gives the optax chain (clip, Adam, decay) that gives the direction; the caller multiplies it by -rate."""
        scale = optax.scale_by_radam if self.rectified else optax.scale_by_adam
        adam = [scale(*self.betas, eps=self.eps), optax.add_decayed_weights(self.weight_decay)]
        return optax.chain(optax.clip_by_global_norm(self.clip), *adam) if self.clip else optax.chain(*adam)
