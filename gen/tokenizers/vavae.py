"""VA-VAE: a KL autoencoder whose latents are trained towards the patch features of a frozen encoder.

Yao, Yang & Wang 2025, "Reconstruction vs. Generation" (arXiv 2501.01423). The network is that of latent diffusion, and
so is the training but for one term (`gen.tokenizers.alignment`): a learned projection of the latents is compared with
the encoder's features. Neither the encoder nor the projection is part of the trained tokenizer.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gen.arrays import flatten
from gen.errors import GenError
from gen.features.alignment import patch_features
from gen.features.vit import ViTConfig
from gen.nn.adversarial import AdaptiveWeight
from gen.nn.layers import linear
from gen.nn.network import Network, Params
from gen.tokenizers.adversarial import AdversarialTask
from gen.tokenizers.alignment import vf_loss
from gen.tokenizers.train import Rows
from gen.training.part import Part, with_buffers
from gen.training.task import Frozen, State

__all__ = ["Projection", "VAVAETask", "VisionFoundation", "WithProjection"]


@dataclasses.dataclass(frozen=True)
class Projection:
    """The matrix, without bias, that takes latents of `channels` to features of `width`."""

    channels: int
    width: int

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Gives the module with freshly drawn parameters."""
        return linear(self.channels, self.width, bias=False, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class VisionFoundation:
    """What latents are aligned with, and how strongly. The defaults are those of the paper's f16d32.

    Attributes:
      encoder: the frozen encoder, whose weights are the frozen role "encoder". It sees the image resized to as many of
        its patches as there are latents.
      weight: of the term.
      cosine_margin, distance_margin: of its two parts.
      adaptive: multiplies the weight by the ratio of the gradients of the image loss and the term at `layer`; None for
        a constant weight.
      layer: path of the encoder's last weights in the tokenizer.
      standardised: images have ImageNet's mean and deviation removed, as the encoder expects; the published runs did
        without.

    Raises GenError for a negative weight or margin.
    """

    encoder: ViTConfig
    weight: float = 0.1
    cosine_margin: float = 0.5
    distance_margin: float = 0.25
    adaptive: AdaptiveWeight | None = AdaptiveWeight(limit=1e8, eps=1e-4)
    layer: str = "encoder/conv_out/kernel"
    standardised: bool = True

    def __post_init__(self) -> None:
        if min(self.weight, self.cosine_margin, self.distance_margin) < 0:
            raise GenError(
                f"weight {self.weight}, margins {self.cosine_margin} and {self.distance_margin}; all are at least 0"
            )

    def features(self, params: Params, images: jax.Array, side: int) -> jax.Array:
        """Gives the features (B, side^2, width) of images (B, H, W, C) in [-1, 1]."""
        found = patch_features(
            self.encoder, params, images, side, resampling="torch-bilinear", standardised=self.standardised
        )
        return jax.lax.stop_gradient(found)

    def loss(self, projection: Params, latents: jax.Array, features: jax.Array) -> jax.Array:
        """Gives the term () without its weight, of latents (B, side, side, channels)."""
        flat = latents.reshape(len(latents), -1, latents.shape[-1])
        z = Network(Projection(latents.shape[-1], features.shape[-1]))(projection, flat)
        terms = vf_loss(z, features, cosine_margin=self.cosine_margin, distance_margin=self.distance_margin)
        return jnp.sum(terms["cosine"].mean() + terms["distance"].mean())


@dataclasses.dataclass(frozen=True)
class WithProjection:
    """A tokenizer with the projection beside its own parameters, under "projection"."""

    tokenizer: Any
    projection: Projection

    def build(self, rngs: nnx.Rngs) -> Any:
        """Gives the module with freshly drawn parameters."""
        module: Any = self.tokenizer.build(rngs)
        module.projection = self.projection.build(rngs)
        return module


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAVAETask(AdversarialTask):
    """`AdversarialTask` with the term of `VisionFoundation`, whose projection is trained with the tokenizer.

    Attributes:
      alignment: the encoder and the weights of the term.

    Raises GenError for a tokenizer whose latents are no square map of numbers.
    """

    alignment: VisionFoundation

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = self.tokenizer.spec.shape
        if self.tokenizer.spec.kind != "continuous" or len(shape) != 3 or shape[0] != shape[1]:
            raise GenError(f"VA-VAE aligns square maps of continuous latents; got {self.tokenizer.spec.kind} {shape}")

    @property
    def parts(self) -> tuple[Part, ...]:
        """Gives the tokenizer with its projection, and the discriminator."""
        first, *others = super().parts
        projection = Projection(self.tokenizer.spec.shape[-1], self.alignment.encoder.width)
        return (dataclasses.replace(first, network=WithProjection(self.tokenizer, projection)), *others)

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Fresh parameters, or those of the previous stage. Raises GenError where the encoder is not given."""
        if "encoder" not in frozen:
            raise GenError(
                "VA-VAE needs the frozen role 'encoder', the weights of a foundation encoder (gen convert dinov2 FILE)"
            )
        started = dict(super().start(key, frozen, previous))
        if "projection" not in started["tokenizer"]:
            projection = Network(self.parts[0].network.projection).init(jax.random.fold_in(key, 2))
            started["tokenizer"] = {**started["tokenizer"], "projection": projection}
        return started

    def export(self, state: State) -> Mapping[str, Any]:
        """Gives the tokenizer without the projection."""
        return {"tokenizer": _own(self.parts[0].averaged(state))}

    def encode(self, params: Params, rows: Rows) -> tuple[Any, jax.Array]:
        """Does what `TokenizerTask` says."""
        return super().encode(_own(params), rows)

    def decode(self, params: Params, latents: jax.Array, rows: Rows) -> jax.Array:
        """Does what `TokenizerTask` says."""
        return super().decode(_own(params), latents, rows)

    def beside(
        self, params: Params, rows: Rows, frozen: Frozen, encoded: Any, latents: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Gives the weighted term () and its parts."""
        alignment = self.alignment
        features = alignment.features(frozen["encoder"], rows.images, latents.shape[1])
        term = alignment.loss(params["projection"], latents, features)
        weight = jnp.asarray(alignment.weight, jnp.float32)
        if alignment.adaptive is not None:
            fixed, encoded, z = jax.lax.stop_gradient((params, encoded, latents))
            images = jax.grad(lambda z: self.image_loss(frozen, rows.images, self.decode(fixed, z, rows))[0])(z)
            own = jax.grad(lambda z: alignment.loss(fixed["projection"], z, features))(z)
            pull = self._to_encoder(fixed, rows, encoded, z)
            weight = weight * alignment.adaptive(pull(images), pull(own))
        return weight * term, {"vf": term, "vf_weight": weight}

    def _to_encoder(
        self, params: Params, rows: Rows, encoded: Any, latents: jax.Array
    ) -> Callable[[jax.Array], jax.Array]:
        """What takes a gradient in the latents to the encoder's last layer, at the noise that they were sampled with.

        The compiler joins this pass through the encoder with that of the loss.
        """
        own, path = _own(params), self.alignment.layer
        if path not in flatten(own):
            raise GenError(f"the tokenizer has no parameter '{path}' to compare gradients at; set alignment.layer")
        noise = (latents - encoded.mean) / encoded.std

        def sampled(last: jax.Array) -> jax.Array:
            posterior = self.tokenizer.encode(with_buffers(own, {path: last}), rows.images, cond=rows.cond)
            found: jax.Array = posterior.mean + posterior.std * noise
            return found

        pull = jax.vjp(sampled, flatten(own)[path])[1]
        return lambda gradient: pull(gradient)[0]


def _own(params: Params) -> Params:
    """The tokenizer's parameters."""
    return {name: tree for name, tree in params.items() if name != "projection"}
