"""Noise on bits: a sibling of `gen.diffusion.process.Process` without Gaussian noise and without a score.

Wang et al. 2023, "Binary Latent Diffusion", arXiv 2304.04820, section 3.2: a bit keeps its value with a share k(t) and
is a fair coin otherwise.
"""

import dataclasses
from typing import Any, Literal

import numpy as np

from gen.config import check_choices
from gen.diffusion.process import array_module, expand

__all__ = ["Bernoulli", "posterior"]

_END, _TAU = 3.0, 0.8  # of the sigmoid schedule


@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """P(x_t = 1 given x) = k(t) x + (1 - k(t)) / 2, t in [0, 1]; time 0 is data, and k falls from 1 to 0.

    Attributes:
      schedule: k(t) = 1 - t ("linear"), (1 + cos(pi t)) / 2 ("cosine"), or (S(3 / 0.8) - S(3 t / 0.8)) / (S(3 / 0.8) -
        S(0)), S the logistic function ("sigmoid").
    """

    schedule: Literal["linear", "cosine", "sigmoid"] = "linear"

    def __post_init__(self) -> None:
        check_choices(self)

    def keep(self, t: Any) -> Any:
        """Gives k(t); NumPy in -> float64 out, JAX in -> JAX out."""
        xp = array_module(t)
        if self.schedule == "linear":
            return 1.0 - t
        if self.schedule == "cosine":
            return 0.5 + 0.5 * xp.cos(np.pi * t)

        def logistic(x: Any) -> Any:
            return 1.0 / (1.0 + xp.exp(-x))

        end = 1.0 / (1.0 + np.exp(-_END / _TAU))
        return (end - logistic(_END * t / _TAU)) / (end - 0.5)

    def chance(self, p: Any, t: Any) -> Any:
        """P(x_t = 1) where P(x = 1) is p (B, ...), at times t that broadcast as a prefix of p."""
        keep = expand(self.keep(t), p)
        return keep * p + (1.0 - keep) / 2.0


def posterior(chance: Any, x_t: Any, keep: Any) -> Any:
    """P(x_s = 1 given x_t), s before t, by Bayes' rule (arXiv 2304.04820, equation 8).

    Args:
      chance: P(x_s = 1), (B, ...).
      x_t: bits, (B, ...) of 0.0 and 1.0.
      keep: the share of bits that are kept from s to t, k(t) / k(s); broadcasts with the others.
    """
    one = chance * (keep * x_t + (1.0 - keep) / 2.0)
    zero = (1.0 - chance) * (keep * (1.0 - x_t) + (1.0 - keep) / 2.0)
    return one / (one + zero)
