"""The reverse SDE of interpolants with a freely chosen diffusion coefficient (Ma et al. 2024, SiT, sec. 2.4)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gen.diffusion.prediction import Denoise
from gen.diffusion.transport import DiffusionForm, diffusion
from gen.errors import GenError
from gen.nn.network import Cond
from gen.sampling.grids import Grid
from gen.sampling.solvers import Noise

__all__ = ["EulerMaruyama"]


@dataclasses.dataclass(frozen=True)
class EulerMaruyama:
    """dx = (velocity - w score) dt + sqrt(2 w) dB from noise to data; every w(t) >= 0 gives the same marginals.

    A step of length h: x' = x + h b(x, t) + sqrt(2 w |h|) z with b = velocity - w score, h < 0. With `second_order` the
    noise comes first and Heun's method with b follows. The last step of the grid, where the score is steep, adds no
    noise: see `last`. SiT's grid is ``Uniform(end=0.04)``.

    Attributes:
      form, norm: the coefficient w(t), see `gen.diffusion.transport.diffusion`.
      last: ``mean``: one Euler step with b; ``euler``: with the velocity alone; ``tweedie``: the denoised prediction;
        ``none``: a step like the others.
      second_order: SiT's stochastic Heun method.
    """

    form: DiffusionForm = "sigma"
    norm: float = 1.0
    last: Literal["mean", "tweedie", "euler", "none"] = "mean"
    second_order: bool = False

    order: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.norm < 0.0:
            raise GenError(f"euler-maruyama has norm {self.norm:g}; expected 0 (the probability flow) or more")

    def nfe(self, grid: Grid) -> int:
        """One call a step; with `second_order` two, except for a special last step."""
        return len(self._rows(grid)["t"])

    def __call__(
        self,
        denoise: Denoise,
        x: jax.Array,
        grid: Grid,
        noise: Noise,
        cond: Cond,
        carry: Any = (),
        *,
        trajectory: bool = False,
    ) -> jax.Array:
        """See `Solver`. The score is evaluated at every time but the grid's last (with last "none", there too)."""
        rows = {k: jnp.asarray(v, jnp.int32 if k == "i" else x.dtype) for k, v in self._rows(grid).items()}

        def stage(state: Any, row: Any) -> Any:
            base, point, slope, carry = state
            if self.second_order:
                base = base + row["kick"] * noise(row["i"])
                point = jnp.where(row["old"] > 0, point, base)
            prediction, carry = denoise(point, row["t"], cond, row["i"], carry)
            drift = prediction.velocity
            drift = jnp.where(row["w"] > 0, drift - row["w"] * prediction.score, drift)
            point = base + row["h"] * (row["old"] * slope + row["new"] * drift)
            if not self.second_order:
                point = point + row["kick"] * noise(row["i"])
            if self.last == "tweedie":
                point = jnp.where(row["jump"] > 0, prediction.denoised, point)
            base = jnp.where(row["last"] > 0, point, base)
            return (base, point, drift, carry), base if trajectory else None

        start: Any = (x, x, jnp.zeros_like(x), carry)
        (x, *_), states = jax.lax.scan(stage, start, rows)
        return states[np.flatnonzero(self._rows(grid)["last"])] if trajectory else x

    def _rows(self, grid: Grid) -> dict[str, Any]:
        """One row per network call: time, step length, weights of the two slopes, w, noise scale, flags."""
        xp, n = grid.xp, grid.steps
        t, h = grid.times[:-1], grid.times[1:] - grid.times[:-1]
        final = np.arange(n) == n - 1 if self.last != "none" else np.zeros(n, bool)
        with np.errstate(divide="ignore"):
            w = diffusion(grid.process, t, self.form, self.norm)
        if xp is np and not np.isfinite(w).all():
            raise GenError(
                f"euler-maruyama with form {self.form} is infinite at pure noise; start the grid below time 1"
            )
        zeros, ones = np.zeros(n), np.ones(n)
        first = {
            "i": np.arange(n),
            "t": t,
            "h": h,
            "old": zeros,
            "new": ones,
            "w": xp.where(final, 0.0, w) if self.last == "euler" else w,
            "kick": xp.where(final, 0.0, xp.sqrt(2.0 * w * xp.abs(h))),
            "jump": 1.0 * final,
            "last": 1.0 * final if self.second_order else ones,
        }
        if not self.second_order:
            return first
        ends = grid.times[1:]
        with np.errstate(divide="ignore", invalid="ignore"):
            w_end = xp.where(final, 0.0, diffusion(grid.process, xp.where(final, t, ends), self.form, self.norm))
        second = first | {
            "t": ends,
            "old": 0.5 * ones,
            "new": 0.5 * ones,
            "w": w_end,
            "kick": zeros,
            "jump": zeros,
            "last": ones,
        }
        kept = np.flatnonzero(np.stack([ones, ~final], axis=1).reshape(-1))

        def both(a: Any, b: Any) -> Any:
            host = isinstance(a, np.ndarray) and isinstance(b, np.ndarray)
            return (np if host else jnp).stack([a, b], axis=1).reshape(-1)[kept]

        return {k: both(first[k], second[k]) for k in first}
