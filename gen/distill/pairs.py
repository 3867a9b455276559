"""Stored pairs of a teacher: starting noise and where its solver takes it, made once and read by regressions."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gen.data.caches import Cache, seal
from gen.nn.conditions import class_count
from gen.sampling.generator import DiffusionGenerator
from gen.sampling.noise import prior
from gen.training.indexed import ArrayWriter, run_indexed, sample_keys

__all__ = ["store_pairs"]

SEED = 1  # images are sampled with seed 0: no pair shares its noise with one of them


def store_pairs(
    generator: DiffusionGenerator,
    params: Any,
    path: str | Path,
    *,
    count: int,
    origin: str,
    batch: int = 1024,
    mesh: Mesh | None = None,
) -> Cache:
    """Writes `count` pairs as a cache: "noise" as the solver was given it, "latent" where it ends, "label" in turn.

    Interrupted and called again it goes on where it was; once all is there it does nothing.

    Args:
      generator, params: the teacher; latents stay normalised as it was trained on them.
      path: the cache folder.
      origin: identity of the teacher's weights and settings, kept with the cache.
      batch: pairs at a time; changes nothing but speed and memory.
      mesh: devices to share the work.

    Raises GenError for a folder that holds pairs of another teacher or number, and a disk that does not take them.
    """
    path, classes = Path(path), class_count(generator.conditions)

    def draw(arguments: Any, indices: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
        del weight
        keys = sample_keys(SEED, indices)
        cond = {} if classes is None else {"label": indices % classes}
        noise = prior(generator.sampler.times(generator.denoiser.process), keys, generator.latent)
        rows = {"noise": noise, "latent": generator.latents(arguments, keys, cond), **cond}
        return {name: value.astype(jnp.int32 if name == "label" else jnp.float32) for name, value in rows.items()}

    writer = ArrayWriter(path, count, origin)
    if not (path / "cache.json").exists():
        run_indexed(
            draw, range(count), batch=min(batch, count), writer=writer, arguments=params, mesh=mesh, label="pairs"
        )
    return seal(path, tokenizer=origin, data=f"seed {SEED}", shift=(0.0,), scale=(1.0,))
