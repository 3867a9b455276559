"""Adversarial training parts: discriminator heads on a network's features, and the logistic GAN losses."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gen.nn.layers import layer_norm, linear

__all__ = ["ConvHead", "TokenHead", "logistic_discriminator_loss", "logistic_generator_loss"]


def logistic_generator_loss(fake: jax.Array) -> jax.Array:
    """mean softplus(-logit) of generated samples: the non-saturating loss (Goodfellow et al. 2014)."""
    return jax.nn.softplus(-fake).mean()


def logistic_discriminator_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
    """mean softplus(fake logit) + mean softplus(-real logit)."""
    return jax.nn.softplus(fake).mean() + jax.nn.softplus(-real).mean()


@dataclasses.dataclass(frozen=True)
class ConvHead:
    """DMD2's discriminator head on a feature map (Yin et al. 2024; the official ``cls_pred_branch``).

    `downs` convolutions of 4x4 with stride 2, one of `kernel` x `kernel` with that stride and no padding, each
    followed by GroupNorm and SiLU, then 1x1 to one logit per remaining position. Choose `downs` and `kernel` so
    that the map ends at 1x1, and `groups` so that a group holds at least two values there: one value normalises to 0.

    Attributes:
      channels: of the feature map (all taps together) and of every hidden layer.
      kernel: of the last reduction; feature size / 2^downs reduces to one position.
      downs: number of stride-2 convolutions.
      groups: of the normalisations.
    """

    channels: int
    kernel: int = 4
    downs: int = 1
    groups: int = 32

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module (B, h, w, channels) -> logits (B, positions)."""
        return _ConvHead(self, rngs)


def _torch_uniform(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    """U(-1, 1) / sqrt(fan-in) for a kernel (..., in, out): the default of the official layers."""
    bound = 1.0 / math.sqrt(math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class _ConvHead(nnx.Module):
    def __init__(self, config: ConvHead, rngs: nnx.Rngs) -> None:
        self.downs = config.downs
        c = config.channels
        for i in range(config.downs + 1):
            last = i == config.downs
            kernel, stride, pad = (config.kernel, config.kernel, 0) if last else (4, 2, 1)
            conv = nnx.Conv(
                c,
                c,
                (kernel, kernel),
                strides=stride,
                padding=((pad, pad), (pad, pad)),
                kernel_init=_torch_uniform,
                rngs=rngs,
            )
            norm = nnx.GroupNorm(c, num_groups=config.groups, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"norm{i}", norm)
        self.out = linear(c, 1, rngs=rngs, init=_torch_uniform)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        for i in range(self.downs + 1):
            x = jax.nn.silu(getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x)))
        return self.out(x).reshape(x.shape[0], -1)


@dataclasses.dataclass(frozen=True)
class TokenHead:
    """A discriminator head on transformer tokens: LayerNorm, a hidden SiLU layer, one logit per token.

    Attributes:
      width: channels of the tokens (all taps together).
      hidden: width of the hidden layer.
    """

    width: int
    hidden: int = 64

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module (B, ..., width) -> logits (B, tokens)."""
        return _TokenHead(self, rngs)


class _TokenHead(nnx.Module):
    def __init__(self, config: TokenHead, rngs: nnx.Rngs) -> None:
        self.fc1 = linear(config.width, config.hidden, rngs=rngs, init=_torch_uniform)
        self.fc2 = linear(config.hidden, 1, rngs=rngs, init=_torch_uniform)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.silu(self.fc1(layer_norm(x)))).reshape(x.shape[0], -1)
