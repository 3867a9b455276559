"""VA-VAE: a KL autoencoder whose latents are trained towards the patch features of a frozen encoder.

Yao, Yang & Wang 2025, "Reconstruction vs. Generation" (arXiv 2501.01423). The network is that of latent diffusion, and
so is the training but for one term (`gen.tokenizers.alignment`): a learned projection of the latents is compared with
the encoder's features. Neither the encoder nor the projection is part of the trained tokenizer.
"""

import dataclasses
from collections.abc import Mapping
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
from gen.training.part import Aux, Part, with_buffers
from gen.training.task import Batch, Frozen, Metrics, Schedule, State

__all__ = ["Projection", "VAVAETask", "VisionFoundation"]


@dataclasses.dataclass(frozen=True)
class Projection:
    """The matrix, without bias, that takes latents of `channels` to features of `width`."""

    channels: int
    width: int

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module with freshly drawn parameters."""
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
        """The features (B, side^2, width) of images (B, H, W, C) in [-1, 1]."""
        found = patch_features(
            self.encoder, params, images, side, resampling="torch-bilinear", standardised=self.standardised
        )
        return jax.lax.stop_gradient(found)

    def loss(self, projection: Params, latents: jax.Array, features: jax.Array) -> jax.Array:
        """The term () without its weight, of latents (B, side, side, channels)."""
        flat = latents.reshape(len(latents), -1, latents.shape[-1])
        z = Network(Projection(latents.shape[-1], features.shape[-1]))(projection, flat)
        terms = vf_loss(z, features, cosine_margin=self.cosine_margin, distance_margin=self.distance_margin)
        return jnp.sum(terms["cosine"].mean() + terms["distance"].mean())


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAVAETask(AdversarialTask):
    """`AdversarialTask` with the term of `VisionFoundation`; the projection is a part of its own.

    Attributes:
      alignment: the encoder and the weights of the term.
    """

    alignment: VisionFoundation

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = self.tokenizer.spec.shape
        if self.tokenizer.spec.kind != "continuous" or len(shape) != 3 or shape[0] != shape[1]:
            raise GenError(f"VA-VAE aligns square maps of continuous latents; got {self.tokenizer.spec.kind} {shape}")

    @property
    def parts(self) -> tuple[Part, ...]:
        """The tokenizer, the discriminator and the projection."""
        projection = Projection(self.tokenizer.spec.shape[-1], self.alignment.encoder.width)
        return (*super().parts, Part("projection", projection, self.optim))

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Fresh parameters, or those of the previous stage. Raises GenError where the encoder is not given."""
        if "encoder" not in frozen:
            raise GenError(
                "VA-VAE needs the frozen role 'encoder', the weights of a foundation encoder (gen convert dinov2 FILE)"
            )
        started = dict(super().start(key, frozen, previous))
        if previous is not None and "projection" in previous.params:
            return started | {"projection": previous.params["projection"]}
        return started | {"projection": Network(self.parts[2].network).init(jax.random.fold_in(key, 2))}

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """One step of the tokenizer and the projection without a discriminator."""
        moved, metrics = super().update(state, self._given(frozen, state), batch, schedule, key)
        return self._project(state, moved, metrics, frozen, batch, schedule, key)

    def update_both(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """One step of the tokenizer, the discriminator and the projection."""
        moved, metrics = super().update_both(state, self._given(frozen, state), batch, schedule, key)
        return self._project(state, moved, metrics, frozen, batch, schedule, key)

    def updates(self, part: str, steps: int) -> int:
        """The projection moves with the tokenizer."""
        return super().updates("tokenizer" if part == "projection" else part, steps)

    def loss(self, params: Params, rows: Rows, frozen: Frozen) -> tuple[jax.Array, Aux]:
        """The whole loss () before there is a discriminator; ``frozen`` has the projection too."""
        return self._aligned(*super().loss(params, rows, frozen), params, rows, frozen)

    def adversarial_loss(
        self, params: Params, critic: Params, rows: Rows, frozen: Frozen, share: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """The tokenizer's loss () with a discriminator; ``frozen`` has the projection too."""
        total, aux = super().adversarial_loss(params, critic, rows, frozen, share)
        return self._aligned(total, aux, params, rows, frozen)

    def _given(self, frozen: Frozen, state: State) -> Frozen:
        return {**frozen, "projection": state.params["projection"]}

    def _aligned(self, total: jax.Array, aux: Aux, params: Params, rows: Rows, frozen: Frozen) -> tuple[jax.Array, Aux]:
        """The loss with the weighted term. What it repeats of the loss's own computation, the compiler joins."""
        alignment = self.alignment
        _, latents = self.encode(params, rows)
        features = alignment.features(frozen["encoder"], rows.images, latents.shape[1])
        term = alignment.loss(frozen["projection"], latents, features)
        weight = jnp.asarray(alignment.weight, jnp.float32)
        if alignment.adaptive is not None:
            weight = weight * self.alignment_ratio(params, rows, frozen, latents, features)
        metrics = {**aux.metrics, "vf": term, "vf_weight": weight}
        return total + weight * term, dataclasses.replace(aux, metrics=metrics)

    def alignment_ratio(
        self, params: Params, rows: Rows, frozen: Frozen, latents: jax.Array, features: jax.Array
    ) -> jax.Array:
        """The adaptive weight (), from the gradients of the image loss and of the term at the encoder's last layer."""
        assert self.alignment.adaptive is not None
        params, latents, path = *jax.lax.stop_gradient((params, latents)), self.alignment.layer
        if path not in flatten(params):
            raise GenError(f"the tokenizer has no parameter '{path}' to compare gradients at; set alignment.layer")
        images = jax.grad(lambda z: self.image_loss(frozen, rows.images, self.decode(params, z, rows))[0])(latents)
        term = jax.grad(lambda z: self.alignment.loss(frozen["projection"], z, features))(latents)
        pull = jax.vjp(lambda last: self.encode(with_buffers(params, {path: last}), rows)[1], flatten(params)[path])[1]
        return self.alignment.adaptive(pull(images)[0], pull(term)[0])

    def _project(
        self,
        before: State,
        state: State,
        metrics: Metrics,
        frozen: Frozen,
        batch: Batch,
        schedule: Schedule,
        key: jax.Array,
    ) -> tuple[State, Metrics]:
        """One step of the projection on the latents that the tokenizer's step saw."""
        _, rows = self.drawn(before, batch, key)
        _, latents = self.encode(before.params["tokenizer"], rows)
        features = self.alignment.features(frozen["encoder"], rows.images, latents.shape[1])
        part = self.parts[2]

        def loss(params: Params, pairs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Aux]:
            return self.alignment.loss(params, *pairs), Aux()

        state, more, _ = part.update(state, loss, (latents, features), schedule)
        return state, {**metrics, **part.named(more)}
