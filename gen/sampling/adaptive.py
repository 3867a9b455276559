"""Adaptive integration of the probability flow: Dormand-Prince 5(4) from diffrax.

A sibling of the solvers whose number of network calls is measured, not stated. Every sample chooses its own steps, so
that it does not depend on those integrated beside it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from gen.diffusion.denoiser import Denoiser
from gen.diffusion.prediction import Denoise, PredictionKind
from gen.diffusion.transport import interval
from gen.errors import GenError
from gen.nn.network import Cond
from gen.sampling import likelihood
from gen.sampling.generator import GeneratorParams, SampledGenerator, Sampler, changes, decode
from gen.sampling.grids import Grid
from gen.sampling.guidance import ClassifierFree
from gen.sampling.integrate import Problem
from gen.sampling.noise import prior
from gen.training.task import Model

__all__ = ["AdaptiveGenerator", "AdaptiveSampler", "Dopri5"]

STAGES = 6  # network calls of an attempted step; the seventh stage is the next step's first


@dataclasses.dataclass(frozen=True)
class Dopri5:
    """Dormand and Prince's method of order 5 with adaptive steps (torchdiffeq's and SciPy's ``dopri5`` / ``RK45``).

    Guidance acts as in a solver at step 0, without memory from call to call: no momentum, and intervals by time.

    Attributes:
      rtol, atol: relative and absolute tolerance of a step's error, root mean square over a sample.
      max_steps: attempted steps after which a sample is given up: its entries are NaN.

    Raises GenError for tolerances or a limit that are not positive.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 4096

    def __post_init__(self) -> None:
        if not (self.rtol > 0.0 and self.atol > 0.0 and self.max_steps > 0):
            raise GenError("dopri5 needs positive rtol, atol and max_steps")

    def integrate(
        self, denoise: Denoise, x: jax.Array, process: Any, start: float, end: float, cond: Cond
    ) -> tuple[jax.Array, jax.Array]:
        """Gives the probability flow from time `start` to `end`: sampling downwards, inversion (encoding) upwards.

        Args:
          denoise: a denoiser with parameters bound, guided or not; its velocity must be defined at both ends
            (see `gen.diffusion.transport.interval`).
          x: (B, ...) state at `start`.
          cond: conditioning arrays with leading axis B.

        Returns:
          x at `end` and the network calls of each sample, (B,) int32.
        """
        grid = Grid(_ends(process, start, end), process)
        out, calls = jax.vmap(lambda x, cond: self._solve(denoise, x[None], grid, _batch(cond)))(x, cond)
        return out[:, 0], calls

    def log_likelihood(
        self, denoise: Denoise, x: jax.Array, process: Any, start: float, end: float, keys: jax.Array, cond: Cond
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Gives log p(x) in nats (B,), the latents at `end` and the network calls; see `likelihood.log_likelihood`.

        Args:
          keys: (B,) typed PRNG keys, from which each sample's signs for the divergence are drawn (one set per sample).
        """
        grid, counted = Grid(_ends(process, start, end), process), []

        def integrate(problem: Problem) -> jax.Array:
            out, calls = self._solve(problem.denoise, problem.x, problem.grid, problem.cond)
            counted.append(calls)
            return out

        def one(x: jax.Array, key: jax.Array, cond: Cond) -> tuple[jax.Array, jax.Array, jax.Array]:
            signs = jax.random.rademacher(key, (1, *x.shape), x.dtype)
            problem = Problem(denoise, x[None], grid, lambda i: signs, _batch(cond))
            log_p, latent = likelihood.log_likelihood(problem, integrate)
            return log_p[0], latent[0], counted.pop()

        return jax.vmap(one)(x, keys, cond)

    def _solve(self, denoise: Denoise, x: jax.Array, grid: Grid, cond: Cond) -> tuple[jax.Array, jax.Array]:
        """One error control over the whole of x."""
        start, end = (float(t) for t in grid.times)

        def velocity(t: Any, x: jax.Array, _: Any) -> jax.Array:
            return denoise(x, jnp.asarray(t, x.dtype), cond, jnp.int32(0), ())[0].velocity

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(velocity),
            diffrax.Dopri5(),
            start,
            end,
            (end - start) / 100.0,
            x,
            stepsize_controller=diffrax.PIDController(rtol=self.rtol, atol=self.atol),
            max_steps=self.max_steps,
            throw=False,
        )
        done = solution.result == diffrax.RESULTS.successful
        return jnp.where(done, solution.ys[0], jnp.nan), 1 + STAGES * jnp.asarray(
            solution.stats["num_steps"], jnp.int32
        )


@dataclasses.dataclass(frozen=True)
class AdaptiveSampler:
    """A sampler that integrates adaptively, from the noise that another sampler would start from.

    Attributes:
      solver: the adaptive method.
      guidance: without memory from call to call.
      process, guide: as in `gen.sampling.generator.Sampler`.
      start: the time of the noise end; None for that of the process.
      decoding: as in `gen.sampling.generator.Sampler`.
    """

    solver: Dopri5 = Dopri5()
    guidance: Any = ClassifierFree()
    process: Any = None
    guide: Any = None
    start: float | None = None
    decoding: Any = None

    @classmethod
    def of(cls, sampler: Sampler, denoiser: Denoiser, solver: Dopri5) -> "AdaptiveSampler":
        """Starts from the noise of `sampler`, under its guidance."""
        start = float(sampler.times(denoiser.process).times[0])
        return cls(solver, sampler.guidance, sampler.process, sampler.guide, start, sampler.decoding)

    def changed(self, **settings: Any) -> "AdaptiveSampler":
        """Changes the settings ``solver`` and ``guidance`` that are not None.

        Raises GenError for a number of steps or a grid.
        """
        given = changes(self.guidance, settings)
        if {"steps", "grid"} & set(given):
            raise GenError("an adaptive solver chooses its steps itself; leave out steps and grid")
        return dataclasses.replace(self, **given)

    def generator(self, models: Mapping[str, Model], tokenizer: Any) -> "AdaptiveGenerator":
        """Gives the Generator that samples the denoiser ``net`` of a run."""
        return AdaptiveGenerator(models["net"].config, self, tokenizer)


@dataclasses.dataclass(frozen=True)
class AdaptiveGenerator(SampledGenerator):
    """A `gen.sampling.generator.DiffusionGenerator` that integrates adaptively: its network calls are measured.

    From pure noise to the time nearest to the data at which the prediction's velocity is defined; where that is not
    clean data, one more call gives the denoised prediction there.

    Attributes:
      denoiser, tokenizer: as in `DiffusionGenerator`.
      sampler: solver, guidance, ends.
    """

    denoiser: Denoiser
    sampler: AdaptiveSampler = AdaptiveSampler()
    tokenizer: Any = None

    @property
    def nfe(self) -> None:
        """Gives None: the number of network calls is measured while sampling."""

    def ends(self) -> tuple[float, float]:
        """Gives (start, end): the times between which the flow is followed."""
        process = self.sampler.process or self.denoiser.process
        own = self.sampler.process is None or self.sampler.process == self.denoiser.process
        kind: PredictionKind = self.denoiser.parameterization.output if own else "x"
        low, high = interval(process, kind, "ode")
        low = max(low, process.t_min) if low else process.t_min
        return min(high, process.t_max if self.sampler.start is None else self.sampler.start), low

    def counted(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> tuple[jax.Array, jax.Array]:
        """Gives images as a generator gives them, and the network calls that each sample took, (B,) int32.

        Raises GenError for guidance that remembers.
        """
        process, (start, end) = self.sampler.process or self.denoiser.process, self.ends()
        x = prior(Grid(np.array([start, end]), process), keys, self.latent)
        if self.sampler.guidance.init(x):
            raise GenError("adaptive integration calls the network at times of its own; use guidance without momentum")
        sampler = Sampler(guidance=self.sampler.guidance, process=self.sampler.process, guide=self.sampler.guide)
        denoise = sampler.guided(self.denoiser, params["net"], params.get("guide"))
        x, calls = self.sampler.solver.integrate(denoise, x, process, start, end, cond)
        if end > 0.0:
            x, calls = denoise(x, jnp.float32(end), cond, jnp.int32(0), {})[0].denoised, calls + 1
        images = decode(self.tokenizer, params, x, keys=keys, cond=cond, options=self.options)
        return images, calls

    def __call__(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> jax.Array:
        """Does what `gen.sampling.generator.Generator.__call__` says."""
        return self.counted(params, keys, cond)[0]


def _ends(process: Any, start: float, end: float) -> np.ndarray:
    if not (0.0 <= min(start, end) < max(start, end) <= process.t_max * (1.0 + 1e-9)):
        raise GenError(
            f"integration from time {start:g} to {end:g}; expected two different times within 0 and {process.t_max:g} "
            f"of {type(process).__name__}"
        )
    return np.array([start, end], np.float64)


def _batch(cond: Cond) -> Cond:
    return {k: v[None] for k, v in cond.items()}
