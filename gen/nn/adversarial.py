"""Adversarial training: losses and their weights, and discriminator heads on a network's features.

Networks that judge images are in `gen.nn.discriminators`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gen.errors import GenError
from gen.nn.convolution import general_convolution
from gen.nn.layers import layer_norm, linear

__all__ = [
    "GAN_LOSSES",
    "AdaptiveWeight",
    "ConvHead",
    "GANLoss",
    "Heads",
    "PooledHead",
    "TokenLogits",
    "hinge_discriminator_loss",
    "lecam",
    "linear_generator_loss",
    "logistic_discriminator_loss",
    "logistic_generator_loss",
    "r1_penalty",
    "torch_uniform",
    "vanilla_discriminator_loss",
]

GANLoss = Literal["hinge", "vanilla", "non-saturating"]


def logistic_generator_loss(fake: jax.Array) -> jax.Array:
    """Gives mean softplus(-logit) of generated samples, over logits of any shape.

    This is the non-saturating loss (Goodfellow et al. 2014).
    """
    return jax.nn.softplus(-fake).mean()


def logistic_discriminator_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Gives mean softplus(fake logit) + mean softplus(-real logit), each over logits of any shape."""
    return jax.nn.softplus(fake).mean() + jax.nn.softplus(-real).mean()


def hinge_discriminator_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Gives (mean relu(1 - real logit) + mean relu(1 + fake logit)) / 2 (Lim & Ye 2017, halved as in VQGAN)."""
    return 0.5 * (jax.nn.relu(1.0 - real).mean() + jax.nn.relu(1.0 + fake).mean())


def vanilla_discriminator_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Gives half of `logistic_discriminator_loss`, as in VQGAN."""
    return 0.5 * logistic_discriminator_loss(real, fake)


def linear_generator_loss(fake: jax.Array) -> jax.Array:
    """Gives the negative mean logit of generated samples."""
    return -fake.mean()


# name -> (discriminator's loss of real and fake logits, generator's of fake logits)
GAN_LOSSES: dict[GANLoss, tuple[Callable[..., jax.Array], Callable[..., jax.Array]]] = {
    "hinge": (hinge_discriminator_loss, linear_generator_loss),
    "vanilla": (vanilla_discriminator_loss, linear_generator_loss),
    "non-saturating": (logistic_discriminator_loss, logistic_generator_loss),
}


def lecam(real: jax.Array, fake: jax.Array, average_real: jax.Array, average_fake: jax.Array) -> jax.Array:
    """Gives relu(real - average_fake)^2 + relu(average_real - fake)^2, LeCAM in the form of the image tokenizers.

    Tseng et al. 2021 (arXiv 2104.03310) square each logit's distance; TiTok and others that of the means.

    Args:
      real, fake: () means of the batch's logits.
      average_real, average_fake: () running averages of both.
    """
    return jnp.square(jax.nn.relu(real - average_fake)) + jnp.square(jax.nn.relu(average_real - fake))


def r1_penalty(logits: Callable[[jax.Array], jax.Array], real: jax.Array) -> jax.Array:
    """Gives E ||d D / d x||^2 / 2 on real images (B, ...), D the mean of an image's logits (Mescheder et al. 2018)."""

    def judged(x: jax.Array) -> jax.Array:
        found = logits(x)
        return found.reshape(found.shape[0], -1).mean(1).sum()

    return 0.5 * jnp.square(jax.grad(judged)(real)).sum() / real.shape[0]


@dataclasses.dataclass(frozen=True)
class AdaptiveWeight:
    """The weight that makes a second loss pull as hard as the first at one layer (Esser et al. 2021, arXiv 2012.09841).

    min(||first|| / (||second|| + eps), limit), of both losses' gradients; no gradient passes it.

    Attributes:
      limit: largest ratio.
      eps: see the formula.
    """

    limit: float = 1e4
    eps: float = 1e-4

    def __call__(self, first: jax.Array, second: jax.Array) -> jax.Array:
        """Gives the weight () from the two gradients of one layer."""
        ratio = jnp.linalg.norm(first.ravel()) / (jnp.linalg.norm(second.ravel()) + self.eps)
        return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, self.limit))


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
        """Makes the module, which takes (B, h, w, channels), or parts of its channels, to logits (B, positions)."""
        return _ConvHead(self, rngs)


def torch_uniform(key: jax.Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> jax.Array:
    """Draws U(-1, 1) / sqrt(fan-in) for a kernel (..., in, out): the default of the official layers."""
    del out_sharding
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
                kernel_init=torch_uniform,
                conv_general_dilated=general_convolution,
                rngs=rngs,
            )
            norm = nnx.GroupNorm(c, num_groups=config.groups, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"norm{i}", norm)
        self.out = linear(c, 1, rngs=rngs, init=torch_uniform)

    def __call__(self, *features: jax.Array) -> jax.Array:
        x = _joined(features)
        for i in range(self.downs + 1):
            x = jax.nn.silu(getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x)))
        return self.out(x).reshape(x.shape[0], -1)


@dataclasses.dataclass(frozen=True)
class TokenLogits:
    """A discriminator head on transformer tokens: LayerNorm, a hidden SiLU layer, one logit per token.

    Attributes:
      width: channels of the tokens (all taps together).
      hidden: width of the hidden layer.
    """

    width: int
    hidden: int = 64

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Makes the module, which takes (B, ..., width), or parts of its width, to logits (B, tokens)."""
        return _TokenHead(self, rngs)


class _TokenHead(nnx.Module):
    def __init__(self, config: TokenLogits, rngs: nnx.Rngs) -> None:
        self.fc1 = linear(config.width, config.hidden, rngs=rngs, init=torch_uniform)
        self.fc2 = linear(config.hidden, 1, rngs=rngs, init=torch_uniform)

    def __call__(self, *features: jax.Array) -> jax.Array:
        x = _joined(features)
        return self.fc2(jax.nn.silu(self.fc1(layer_norm(x)))).reshape(x.shape[0], -1)


@dataclasses.dataclass(frozen=True)
class PooledHead:
    """A light head on a feature map or on the tokens of a square image: one logit for the whole.

    A convolution of 4x4 with stride 2 to half the channels, GroupNorm, LeakyReLU, a convolution of 1x1 to one logit,
    and the mean over positions. It is the head on diffusion transformers of NVlabs/FastGen's LADD.

    Attributes:
      channels: of the features, even; groups of four share a norm.

    Raises GenError for an odd number of channels.
    """

    channels: int

    def __post_init__(self) -> None:
        if self.channels < 2 or self.channels % 2:
            raise GenError(f"a pooled head on {self.channels} channels; it halves them, so give an even number")

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Makes the module, which takes (B, h, w, channels) or (B, h w, channels) to logits (B, 1)."""
        return _PooledHead(self, rngs)


class _PooledHead(nnx.Module):
    def __init__(self, config: PooledHead, rngs: nnx.Rngs) -> None:
        c = config.channels // 2
        self.conv = nnx.Conv(
            2 * c,
            c,
            (4, 4),
            strides=2,
            padding=((1, 1), (1, 1)),
            kernel_init=torch_uniform,
            conv_general_dilated=general_convolution,
            rngs=rngs,
        )
        groups = math.gcd(c, max(1, c // 4))
        self.norm = nnx.GroupNorm(c, num_groups=groups, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.out = linear(c, 1, rngs=rngs, init=torch_uniform)

    def __call__(self, *features: jax.Array) -> jax.Array:
        x = _joined(features)
        if x.ndim == 3:
            side = math.isqrt(x.shape[1])
            if side**2 != x.shape[1]:
                raise GenError(f"a pooled head on {x.shape[1]} tokens, which are no square image; use a token head")
            x = x.reshape(x.shape[0], side, side, -1)
        return self.out(jax.nn.leaky_relu(self.norm(self.conv(x)), 0.2)).mean((1, 2))


@dataclasses.dataclass(frozen=True)
class Heads:
    """Several heads, one for each tapped feature, in the order of the taps: projected discriminators.

    Attributes:
      heads: configurations of the heads.

    Raises GenError for no heads.
    """

    heads: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.heads:
            raise GenError("a discriminator of no heads; give one for each tapped feature")

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Makes the module, which takes one feature for each head to logits (B, all positions)."""
        return _Heads(self, rngs)


class _Heads(nnx.Module):
    def __init__(self, config: Heads, rngs: nnx.Rngs) -> None:
        self.heads = nnx.Dict({f"head{i}": head.build(rngs) for i, head in enumerate(config.heads)})

    def __call__(self, *features: jax.Array) -> jax.Array:
        if len(features) != len(self.heads):
            raise GenError(f"{len(features)} tapped features for {len(self.heads)} heads; give one head for each tap")
        return jnp.concatenate([self.heads[f"head{i}"](x) for i, x in enumerate(features)], axis=-1)


def _joined(features: tuple[jax.Array, ...]) -> jax.Array:
    """Features (B, ..., c_i) of one size as one float32 array."""
    return jnp.concatenate([x.astype(jnp.float32) for x in features], axis=-1)
