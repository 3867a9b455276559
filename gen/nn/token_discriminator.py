"""Discriminator heads on the tokens of a frozen vision transformer, as StyleGAN-T and RAE train against DINO.

Sauer et al. 2023 (arXiv 2301.09515, section 4.1): projected discriminators, one head for each of several blocks. The
features are given as arrays (B, N, width): who computes them stands a floor above.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from gen.errors import GenError
from gen.nn.adversarial import torch_uniform
from gen.nn.discriminators import Statistics
from gen.nn.network import Buffer

__all__ = ["TokenDiscriminator"]


@dataclasses.dataclass(frozen=True)
class TokenDiscriminator:
    """Heads on a frozen network's tokens: spectrally normalised 1-d convolutions over them, one logit each.

    A head is a pointwise layer, a residual layer over `kernel` neighbouring tokens in a circle, and a pointwise layer
    to one logit; the first two are normalised over the tokens of each image and channel.

    Attributes:
      width: of the tokens.
      heads: how many arrays of tokens are judged, each by its own head.
      kernel: odd; neighbours of the residual layer.

    Raises GenError for no heads, and an even kernel.
    """

    width: int = 384
    heads: int = 5
    kernel: int = 9

    def __post_init__(self) -> None:
        if min(self.width, self.heads) < 1 or self.kernel % 2 == 0:
            raise GenError(
                f"{self.heads} heads of width {self.width} and kernel {self.kernel}; expected at least one of each and "
                "an odd kernel"
            )

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Makes the module, which takes `heads` arrays (B, N, width) to logits (B, heads N) and statistics."""
        return _TokenDiscriminator(self, rngs)


class SpectralConv(nnx.Module):
    """A 1-d convolution, circular over tokens, whose kernel is divided by its largest singular value.

    The value is followed by one power iteration a call (Miyato et al. 2018, arXiv 1802.05957).
    """

    def __init__(self, inputs: int, outputs: int, size: int, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(torch_uniform(rngs.params(), (size, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.left = Buffer(_unit(jax.random.normal(rngs.params(), (outputs,))))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Takes (B, N, inputs) to (B, N, outputs), and gives the new left singular vector beside."""
        size, _, outputs = self.kernel.shape
        matrix = self.kernel[...].reshape(-1, outputs).T
        fixed = jax.lax.stop_gradient(matrix)
        right = _unit(fixed.T @ self.left[...])
        left = _unit(fixed @ right)
        kernel = self.kernel[...] / (left @ matrix @ right)
        pad = size // 2
        x = jnp.concatenate([x[:, x.shape[1] - pad :], x, x[:, :pad]], 1) if pad else x
        y = jax.lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
        return y + self.bias[...], left


class TokenNorm(nnx.Module):
    """Mean 0 and variance 1 over the tokens of each image and channel, then gain and bias."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        del rngs
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        centred = x - x.mean(1, keepdims=True)
        return centred * jax.lax.rsqrt(x.var(1, keepdims=True) + 1e-5) * self.scale[...] + self.bias[...]


class _Head(nnx.Module):
    def __init__(self, config: TokenDiscriminator, rngs: nnx.Rngs) -> None:
        width = config.width
        self.first, self.norm1 = SpectralConv(width, width, 1, rngs), TokenNorm(width, rngs)
        self.second, self.norm2 = SpectralConv(width, width, config.kernel, rngs), TokenNorm(width, rngs)
        self.out = SpectralConv(width, 1, 1, rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Statistics]:
        x, first = self.first(x.astype(jnp.float32))
        x = jax.nn.leaky_relu(self.norm1(x), 0.2)
        y, second = self.second(x)
        x = (x + jax.nn.leaky_relu(self.norm2(y), 0.2)) / math.sqrt(2.0)
        x, out = self.out(x)
        return x[..., 0], {"first/left": first, "second/left": second, "out/left": out}


class _TokenDiscriminator(nnx.Module):
    def __init__(self, config: TokenDiscriminator, rngs: nnx.Rngs) -> None:
        self.heads = nnx.Dict({f"head{i}": _Head(config, rngs) for i in range(config.heads)})

    def __call__(self, features: Sequence[jax.Array]) -> tuple[jax.Array, Statistics]:
        if len(features) != len(self.heads):
            raise GenError(f"{len(features)} arrays of tokens for {len(self.heads)} heads; give one for each")
        logits: list[jax.Array] = []
        statistics: Statistics = {}
        for i, x in enumerate(features):
            found, new = self.heads[f"head{i}"](x)
            logits.append(found)
            statistics |= {f"heads/head{i}/{path}": value for path, value in new.items()}
        return jnp.concatenate(logits, 1), jax.lax.stop_gradient(statistics)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x), 1e-12)
