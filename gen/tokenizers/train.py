"""Training a continuous tokenizer: reconstruction and a weak pull of the posterior towards the standard normal."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from gen.errors import GenError
from gen.nn.conditions import Conditions
from gen.nn.network import Network, Params
from gen.sampling.noise import decode_keys
from gen.training.method import Method, signed
from gen.training.part import Aux, Part
from gen.training.task import Batch, Frozen, Metrics, Model, Schedule, State

__all__ = ["TokenizerTask"]


@dataclasses.dataclass(frozen=True)
class TokenizerTask(Method):
    """Trains ``tokenizer``: mean (x - y)^2 + l1 mean |x - y| + kl KL(q || N(0, 1)), y decoded from a posterior sample.

    The single-stage loss of TA-TiTok without its perceptual and adversarial terms (Kim et al. 2025, section 3): x and
    y are on the [0, 1] scale, the KL is summed over one image's latents and averaged over the batch.
    Batches: "image" (B, H, W, C) uint8.

    Attributes:
      tokenizer: the tokenizer (a config such as `gen.tokenizers.titok.TiTokConfig`).
      kl, l1: weights of the terms.
      augment: (key, images) -> images on [-1, 1], such as `gen.data.augment.RandomAffine`, or None.
      augmented: fraction of the images that are augmented. Resampled images are smoother than real ones: a share of
        real ones keeps their sharpness.
      pictures: images shown in previews.
    """

    tokenizer: Any
    kl: float = 1e-6
    l1: float = 0.0
    augment: Any = None
    augmented: float = 1.0
    pictures: int = 8

    takes: ClassVar[tuple[str, ...]] = ("image",)

    def __post_init__(self) -> None:
        if self.tokenizer.spec.kind != "continuous":
            raise GenError(f"the KL task trains continuous tokenizers; got one of {self.tokenizer.spec.kind}")
        if min(self.kl, self.l1) < 0 or not 0 <= self.augmented <= 1:
            raise GenError(
                f"kl {self.kl}, l1 {self.l1}, augmented {self.augmented}; weights are >= 0, the fraction in [0, 1]"
            )

    def loss(self, params: Params, images: jax.Array, keys: jax.Array) -> tuple[jax.Array, Aux]:
        """The loss () and its terms of images (B, H, W, C) in [-1, 1] with per-sample keys (B,)."""
        posterior = self.tokenizer.encode(params, images, keys=keys)
        decoded = self.tokenizer.decode(params, posterior.sample(keys), keys=decode_keys(keys))
        error = 0.5 * (decoded - images)
        mse, l1, kl = jnp.square(error).mean(), jnp.abs(error).mean(), posterior.kl().mean()
        metrics = {"mse": mse, "kl": kl, "psnr": -10.0 * jnp.log10(jnp.maximum(mse, 1e-10))}
        return mse + self.l1 * l1 + self.kl * kl, Aux(metrics)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The tokenizer."""
        return (Part("tokenizer", self.tokenizer, self.optim, self.emas),)

    def models(self) -> Mapping[str, Model]:
        """The tokenizer."""
        return {"tokenizer": Model(self.tokenizer)}

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C) of the images."""
        shape: tuple[int, ...] = self.tokenizer.spec.image
        return shape

    @property
    def conditions(self) -> Conditions:
        """None."""
        return {}

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Fresh parameters, or those of the previous stage."""
        del frozen
        return {"tokenizer": Network(self.tokenizer).init(key) if previous is None else previous.params["tokenizer"]}

    def aux(self) -> Mapping[str, Any]:
        """Room for the images that previews show."""
        return {"shown": jnp.zeros((self.pictures, *self.tokenizer.spec.image), jnp.uint8)}

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """One step; the first images of the batch are kept for the preview."""
        del frozen
        augment_key, choose_key, sample_key = jax.random.split(key, 3)
        images = self.data(batch)
        count = images.shape[0]
        if self.augment is not None:
            chosen = jax.random.bernoulli(choose_key, self.augmented, (count, 1, 1, 1))
            images = jnp.where(chosen, self.augment(augment_key, images), images)
        data = (images, jax.random.split(sample_key, count))
        shown = state.aux["shown"].at[:count].set(batch["image"][: self.pictures])
        state = dataclasses.replace(state, aux=state.aux | {"shown": shown})
        state, metrics, _ = self.parts[0].update(state, lambda p, d: self.loss(p, *d), data, schedule)
        return state, metrics

    def preview(self, state: State, frozen: Frozen, key: jax.Array, generator: Any) -> Mapping[str, jax.Array]:
        """The newest images and their reconstructions from the posterior mode."""
        del frozen, generator
        params, images = self.export(state)["tokenizer"], signed(state.aux["shown"])
        keys = jax.random.split(key, len(images))
        codes = self.tokenizer.encode(params, images, keys=keys).mode()
        decoded = self.tokenizer.decode(params, codes, keys=decode_keys(keys))
        return {"images": images, "reconstructions": jnp.clip(decoded, -1.0, 1.0)}
