"""Bits drawn by their probabilities: the Bernoulli quantizer of binary latents.

Wang et al. 2023, "Binary Latent Diffusion", arXiv 2304.04820, section 3.1; Instella-T2I, arXiv 2506.21022. The noise of
the draws keeps the bits in use, without any entropy loss.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gen.config import check_choices
from gen.errors import GenError
from gen.tokenizers.base import Quantized

__all__ = ["Binary", "BinaryModule"]


@dataclasses.dataclass(frozen=True)
class Binary:
    """Bits of logits z; itself a `gen.tokenizers.quantizers.base.Quantizer`.

    A bit is 1 where z > 0. While training, given keys, it is drawn with the probability sigmoid(z / temperature); the
    gradient is that of the activation of z at temperature 1. Loss: ``commitment``, the mean of p (1 - p) with
    p = sigmoid(z), which is small where bits are decided.

    Attributes:
      width: number of bits.
      activation: "sigmoid" for codes 0 and 1, "tanh" for codes -1 and 1 with p = (tanh(z) + 1) / 2.
      temperature: of the draws.
      squashed_loss: the loss takes the sigmoid of the activation and not of z, as the published code of binary latent
        diffusion does (its weight there is 0).

    Raises GenError for no bit, and a temperature that is not above 0.
    """

    kind: ClassVar[Literal["bits"]] = "bits"
    vocabulary: ClassVar[None] = None

    width: int
    activation: Literal["sigmoid", "tanh"] = "sigmoid"
    temperature: float = 1.0
    squashed_loss: bool = False

    def __post_init__(self) -> None:
        check_choices(self)
        if self.width < 1 or not self.temperature > 0:
            raise GenError(
                f"{self.width} bits drawn at temperature {self.temperature}; expected at least one bit and a "
                "temperature above 0"
            )

    def build(self, rngs: nnx.Rngs) -> "BinaryModule":
        """Gives the module, which has no parameters."""
        del rngs
        return BinaryModule(self)


class BinaryModule(nnx.Module):
    """The quantizer of a `Binary`."""

    def __init__(self, config: Binary) -> None:
        self.config = config

    def embed(self, ids: jax.Array) -> jax.Array:
        """Codes (..., width) float32 of bits (..., width)."""
        codes = ids.astype(jnp.float32)
        return codes if self.config.activation == "sigmoid" else 2.0 * codes - 1.0

    def snap(self, codes: jax.Array) -> Quantized:
        """Gives the nearest bits of vectors (B, ..., width) on the scale of codes, without losses."""
        middle = 0.5 if self.config.activation == "sigmoid" else 0.0
        bits = (codes > middle).astype(jnp.uint8)
        return Quantized(bits, codes + jax.lax.stop_gradient(self.embed(bits) - codes))

    def __call__(self, z: jax.Array, keys: jax.Array | None = None) -> Quantized:
        """Bits of logits z (B, ..., width); `keys` (B,) draw those that training decodes."""
        uniforms = None if keys is None else jax.vmap(lambda key: jax.random.uniform(key, z.shape[1:]))(keys)
        return self.quantize(z, uniforms)

    def quantize(self, z: jax.Array, uniforms: jax.Array | None) -> Quantized:
        """Takes numbers in [0, 1) in place of keys: a drawn bit is 1 where its number is below its probability."""
        config, z = self.config, z.astype(jnp.float32)
        activated = jax.nn.sigmoid(z) if config.activation == "sigmoid" else jnp.tanh(z)

        def through(bits: jax.Array) -> jax.Array:
            return self.embed(bits) + (activated - jax.lax.stop_gradient(activated))

        p = jax.nn.sigmoid(activated) if config.squashed_loss else self._probability(z)
        losses = {"commitment": (p * (1.0 - p)).mean(tuple(range(1, z.ndim)))}
        bits = (z > 0).astype(jnp.uint8)
        drawn = None if uniforms is None else through(uniforms < self._probability(z / config.temperature))
        return Quantized(bits, through(bits), losses, drawn=drawn)

    def _probability(self, z: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(z) if self.config.activation == "sigmoid" else 0.5 * (jnp.tanh(z) + 1.0)
