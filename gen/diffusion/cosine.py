"""The cosine schedule between two log-SNRs, in which progressive and guided distillation are written."""

import dataclasses
import math
from typing import Any

from gen.diffusion.process import Time, array_module, as_times, logsnr_of
from gen.errors import GenError

__all__ = ["Cosine"]


@dataclasses.dataclass(frozen=True)
class Cosine:
    """The cosine schedule between two log-SNRs (arXiv 2202.00512, app. A): -2 ln tan(c t + b), t in [0, 1].

    alpha = cos(c t + b) and sigma = sin(c t + b), with c and b such that the log-SNR is ``logsnr_max``
    at t = 0 and ``logsnr_min`` at t = 1.

    Raises GenError for log-SNRs in the wrong order.
    """

    logsnr_min: float = -20.0
    logsnr_max: float = 20.0

    t_min = 0.0
    t_max = 1.0

    def __post_init__(self) -> None:
        if not self.logsnr_min < self.logsnr_max:
            raise GenError(
                f"log-SNRs from {self.logsnr_min:g} to {self.logsnr_max:g}; the first is to be the lower one"
            )

    @property
    def _ends(self) -> tuple[float, float, float]:
        """The angle at t = 0, what is missing to pi / 2 at t = 1, and the way between."""
        low, high = math.atan(math.exp(-0.5 * self.logsnr_max)), math.atan(math.exp(0.5 * self.logsnr_min))
        return low, high, 0.5 * math.pi - high - low

    def alpha(self, t: Time) -> Any:
        _, high, way = self._ends
        return array_module(t).sin(way * (1.0 - as_times(t)) + high)  # as the sine, whose small values are exact

    def sigma(self, t: Time) -> Any:
        low, _, way = self._ends
        return array_module(t).sin(way * as_times(t) + low)

    def dalpha(self, t: Time) -> Any:
        return -self._ends[2] * self.sigma(t)

    def dsigma(self, t: Time) -> Any:
        return self._ends[2] * self.alpha(t)

    def logsnr(self, t: Time) -> Any:
        return logsnr_of(self, t)

    def time_of(self, logsnr: Any) -> Any:
        low, _, way = self._ends
        xp = array_module(logsnr)
        return xp.clip((xp.arctan(xp.exp(-0.5 * as_times(logsnr))) - low) / way, 0.0, 1.0)

    def at(self, u: Any) -> Any:
        return as_times(u)
