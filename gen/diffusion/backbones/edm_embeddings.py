"""The embeddings of time, class and augmentation of EDM's U-Nets: a vector (B, width emb) for each time.

Karras et al. 2022 (arXiv 2206.00364), after Song et al. 2021 (`SongMapping`) and Dhariwal & Nichol 2021
(`DhariwalMapping`). A second time (CTM, arXiv 2310.02279) has layers of its own, which start like those of the first.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.diffusion.backbones.edm_blocks import EDMLinear, law_of
from gen.nn.network import Buffer, Cond

__all__ = ["DhariwalMapping", "SongMapping", "positional"]


def positional(t: jax.Array, width: int, *, endpoint: bool) -> jax.Array:
    """Gives [cos(t f), sin(t f)] with f_k = 10000^(-k / (width / 2 - endpoint)); (B,) -> (B, width) float32."""
    half = width // 2
    exponents = np.arange(half, dtype=np.float32) / max(half - endpoint, 1)
    angles = t.astype(jnp.float32)[:, None] * np.power(np.float32(1e-4), exponents)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class SongMapping(nnx.Module):
    """The embedding of a `SongUNetConfig`: class and augmentation are added to the noise features before the MLP."""

    def __init__(self, config: Any, rngs: nnx.Rngs) -> None:
        self.config = config
        law, width = law_of(*config.style.law), config.width * config.noise
        emb = config.width * config.emb
        if config.embedding == "fourier":
            self.freqs = Buffer(config.frequencies * jax.random.normal(rngs.params(), (width // 2,)))
        if config.num_classes:
            self.label = EDMLinear(config.num_classes, width, law, 0.0, rngs)
        if config.augment:
            self.augment = EDMLinear(config.augment, width, law, None, rngs)
        for s in ("", "_s")[: config.times]:
            setattr(self, f"layer0{s}", EDMLinear(width, emb, law, 0.0, rngs))
            setattr(self, f"layer1{s}", EDMLinear(emb, emb, law, 0.0, rngs))

    def __call__(self, times: tuple[jax.Array, ...], cond: Cond) -> tuple[jax.Array, ...]:
        """Gives one conditioning vector (B, width emb) float32 per time."""
        config = self.config
        extra: Any = 0.0
        if config.num_classes:
            extra = self.label(jax.nn.one_hot(cond["label"], config.num_classes) * math.sqrt(config.num_classes))
        if config.augment and "augment" in cond:
            extra = extra + self.augment(cond["augment"])
        out = []
        for t, s in zip(times, ("", "_s"), strict=False):
            # the official code swaps the halves: sines first
            e = jnp.roll(self.noise(t), config.width * config.noise // 2, axis=-1) + extra
            e = jax.nn.silu(getattr(self, f"layer0{s}")(e))
            out.append(jax.nn.silu(getattr(self, f"layer1{s}")(e)))
        return tuple(out)

    def noise(self, t: jax.Array) -> jax.Array:
        """Maps (B,) -> (B, width noise): [cos, sin] features of the noise conditioning."""
        if self.config.embedding == "positional":
            return positional(t, self.config.width * self.config.noise, endpoint=True)
        # the frequencies are drawn once and never trained
        angles = t[:, None] * (2.0 * math.pi * jax.lax.stop_gradient(self.freqs[...]))
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class DhariwalMapping(nnx.Module):
    """The embedding of a `DhariwalUNetConfig`: the class is added after the MLP, to that of the first time only."""

    def __init__(self, config: Any, rngs: nnx.Rngs) -> None:
        self.config = config
        style, emb = config.style, config.width * config.emb
        law = law_of(*style.law)
        if config.augment:
            self.augment = EDMLinear(config.augment, config.width, law_of(*style.zero), None, rngs)
        for s in ("", "_s")[: config.times]:
            setattr(self, f"layer0{s}", EDMLinear(config.width, emb, law, style.bias, rngs))
            setattr(self, f"layer1{s}", EDMLinear(emb, emb, law, style.bias, rngs))
        if config.num_classes:
            unit = law_of("kaiming-normal", math.sqrt(config.num_classes))
            self.label = EDMLinear(config.num_classes, emb, unit, None, rngs)

    def __call__(self, times: tuple[jax.Array, ...], cond: Cond) -> tuple[jax.Array, ...]:
        """Gives one conditioning vector (B, width emb) float32 per time."""
        config = self.config
        out = []
        for t, s in zip(times, ("", "_s"), strict=False):
            e = self.noise(t)
            if config.augment and "augment" in cond:
                e = e + self.augment(cond["augment"])
            e = getattr(self, f"layer1{s}")(jax.nn.silu(getattr(self, f"layer0{s}")(e)))
            if config.num_classes and not s:
                e = e + self.label(jax.nn.one_hot(cond["label"], config.num_classes))
            out.append(jax.nn.silu(e))
        return tuple(out)

    def noise(self, t: jax.Array) -> jax.Array:
        """Maps (B,) -> (B, width): [cos, sin] features of the noise conditioning."""
        return positional(t, self.config.width, endpoint=False)
