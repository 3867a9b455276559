"""Images from flow maps: a few jumps along given times, with fresh noise between them or without."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.diffusion.flowmap import FlowMap
from gen.errors import GenError
from gen.nn.network import Cond, Params
from gen.sampling.generator import GeneratorParams, LatentGenerator, changes, decode
from gen.sampling.grids import Grid
from gen.sampling.noise import Noise, per_sample_noise, prior
from gen.training.task import Model

__all__ = ["FlowMapGenerator", "FlowMapSampler", "jumps"]


def jumps(
    flow_map: FlowMap,
    params: Params,
    x: jax.Array,
    times: np.ndarray,
    noise: Noise,
    cond: Cond,
    gamma: float = 0.0,
    clip: bool = False,
) -> jax.Array:
    """Gives x at the last of `times`, by one jump between neighbours (gamma-sampling, arXiv 2310.02279, alg. 3).

    The jump from t towards t' goes to s = e + sqrt(1 - gamma^2) (t' - e), where e is the last time, and noise brings
    x_s back to t': x' = (a' / a_s) x_s + sqrt(sigma'^2 - (a' / a_s)^2 sigma_s^2) z. With gamma 0 it goes straight to
    t'; with gamma 1 to e, as consistency models do (arXiv 2303.01469, alg. 1).

    Args:
      x: (B, ...) the state at times[0].
      times: (N + 1,) float64, falling.
      noise: noise(i) is jump i's standard normal noise, shaped like x; not called with gamma 0.
      clip: whether what a jump gives is clipped to [-1, 1], for jumps to images.
    """
    process, after, end = flow_map.process, times[1:], times[-1]
    s = end + np.sqrt(1.0 - gamma**2) * (after - end)
    s[-1] = end
    keep = process.alpha(after) / process.alpha(s)
    spread = np.sqrt(np.maximum(process.sigma(after) ** 2 - (keep * process.sigma(s)) ** 2, 0.0))
    columns = {"t": times[:-1], "s": s, "keep": keep, "spread": spread}
    rows: dict[str, Any] = {k: jnp.asarray(v, x.dtype) for k, v in columns.items()}

    def jump(x: jax.Array, row: Any) -> tuple[jax.Array, None]:
        x = flow_map(params, x, row["t"], row["s"], cond)
        x = jnp.clip(x, -1.0, 1.0) if clip else x
        if gamma > 0.0:
            x = row["keep"] * x + row["spread"] * noise(row["i"])
        return x, None

    return jax.lax.scan(jump, x, rows | {"i": jnp.arange(len(after))})[0]


@dataclasses.dataclass(frozen=True)
class FlowMapSampler:
    """How a flow map is sampled: jumps along `times`.

    Attributes:
      times: from where the noise starts to where the last jump ends; None for `steps` jumps from the process's t_max to
        its t_min.
      gamma: share of fresh noise between the jumps, in [0, 1]; see `jumps`. A map that knows the jump to the data end
        alone needs 1 where it makes more than one.
      clip: whether the image that a jump to the data end gives is clipped to [-1, 1] before it is noised again, as the
        published consistency models do.
      steps: number of jumps where no times are given, at equal spacing of the process's uniform time.
      decoding: as in `gen.sampling.generator.Sampler`.

    Raises GenError for neither times nor a positive number of steps.
    """

    times: tuple[float, ...] | None = None
    gamma: float = 0.0
    clip: bool = False
    steps: int = 1
    decoding: Any = None

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.times is not None and self.steps != 1):
            raise GenError(f"{self.steps} jumps along {self.times or 'no times'}; give times, or a positive number")

    def changed(self, **settings: Any) -> "FlowMapSampler":
        """Gives this sampler with another number of jumps, ``steps``. Raises GenError for solver, grid or guidance."""
        given = changes(None, settings)
        if set(given) - {"steps"}:
            raise GenError("a flow map jumps along its own times; change steps, sampler.times or sampler.gamma")
        return dataclasses.replace(self, times=None, **given) if given else self

    def generator(self, models: Mapping[str, Model], tokenizer: Any) -> "FlowMapGenerator":
        """Gives the Generator that samples the flow map ``net`` of a run."""
        return FlowMapGenerator(models["net"].config, self, tokenizer)


@dataclasses.dataclass(frozen=True)
class FlowMapGenerator(LatentGenerator):
    """Prior noise -> jumps along the sampler's times -> inverse normaliser -> tokenizer decode.

    Attributes:
      flow_map: the sampled `FlowMap`.
      sampler: times and noise.
      tokenizer: a tokenizer config, or None for pixel models.

    Raises GenError for times that do not fall within the process's, a gamma outside [0, 1], clipping of jumps that end
    before the data, and of a consistency model several jumps without noise.
    """

    flow_map: FlowMap
    sampler: FlowMapSampler = FlowMapSampler()
    tokenizer: Any = None

    def __post_init__(self) -> None:
        process, times, gamma = self.flow_map.process, self.ends, self.sampler.gamma
        if len(times) < 2 or not np.all(np.diff(times) < 0.0):
            raise GenError(f"flow map with times {times.tolist()}; expected at least two, falling from noise to data")
        if times[0] > process.t_max * (1.0 + 1e-9) or times[-1] < 0.0:
            raise GenError(
                f"flow map with times from {times[0]:g} to {times[-1]:g}; expected times within 0 and "
                f"{process.t_max:g} of {type(process).__name__}"
            )
        if not 0.0 <= gamma <= 1.0:
            raise GenError(f"flow map with gamma {gamma:g}; expected a number between 0 (no fresh noise) and 1")
        if self.sampler.clip and gamma < 1.0:
            raise GenError(
                "only jumps to the data end give images that can be clipped; set gamma to 1, or clip to false"
            )
        if not self.flow_map.parameterization.anywhere:
            if gamma < 1.0 and len(times) > 2:
                raise GenError(
                    f"{len(times) - 1} jumps of a consistency model, which knows the jump to the data end alone; set "
                    "gamma to 1 for fresh noise after each"
                )
            if times[-1] != process.t_min:
                raise GenError(
                    f"a consistency model ends at its process's {process.t_min:g}, not at {times[-1]:g}; change the "
                    "last time"
                )

    @property
    def subject(self) -> FlowMap:
        """Gives the flow map."""
        return self.flow_map

    @property
    def options(self) -> Any:
        """Gives settings of the tokenizer's decoder, as the sampler states them."""
        return self.sampler.decoding

    @property
    def ends(self) -> np.ndarray:
        """Gives (N + 1,) float64: where the jumps start and end."""
        process, sampler = self.flow_map.process, self.sampler
        if sampler.times is not None:
            return np.asarray(sampler.times, np.float64)
        between = [process.at(np.float64(1.0 - i / sampler.steps)) for i in range(1, sampler.steps)]
        return np.asarray([process.t_max, *between, process.t_min], np.float64)

    @property
    def nfe(self) -> int:
        """Gives the network calls per sample: one for each jump."""
        return len(self.ends) - 1

    def latents(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> jax.Array:
        """Gives the sampled latents (B, *latent) on the normalised scale that the flow map was trained on."""
        x = prior(Grid(self.ends, self.flow_map.process), keys, self.latent)
        noise = per_sample_noise(keys, self.latent)
        return jumps(self.flow_map, params["net"], x, self.ends, noise, cond, self.sampler.gamma, self.sampler.clip)

    def __call__(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> jax.Array:
        """Does what `gen.sampling.generator.Generator.__call__` says."""
        latents = self.latents(params, keys, cond)
        return decode(self.tokenizer, params, latents, keys=keys, cond=cond, options=self.options)
