"""Training a continuous tokenizer: reconstruction and a weak pull of the posterior towards the standard normal."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.errors import GenError
from gen.nn.network import Network, Params
from gen.training.optim import OptimConfig, begin, update
from gen.training.task import Batch, Frozen, Metrics, Program, State

__all__ = ["TokenizerTask"]


@dataclasses.dataclass(frozen=True)
class TokenizerTask:
    """Trains ``tokenizer``: mean (x - y)^2 + l1 mean |x - y| + kl KL(q || N(0, 1)), y decoded from a posterior sample.

    The single-stage loss of TA-TiTok without its perceptual and adversarial terms (Kim et al. 2025, section 3): x and
    y are on the [0, 1] scale, the KL is summed over one image's latents and averaged over the batch.
    Batches: "image" (B, H, W, C) uint8.

    Attributes:
      tokenizer: the tokenizer (a config such as `gen.tokenizers.kl1d.KL1DConfig`).
      optim, ema: its optimiser and its average (`gen.training.ema`, None for none).
      kl, l1: weights of the terms.
      augment: (key, images) -> images on [-1, 1], such as `gen.data.augment.RandomAffine`, or None.
      augmented: fraction of the images that are augmented. Resampled images are smoother than real ones: a share of
        real ones keeps their sharpness.
      pictures: images shown in previews.
    """

    tokenizer: Any
    optim: OptimConfig = OptimConfig()
    ema: Any = None
    kl: float = 1e-6
    l1: float = 0.0
    augment: Any = None
    augmented: float = 1.0
    pictures: int = 8

    def __post_init__(self) -> None:
        if self.tokenizer.spec.kind != "continuous":
            raise GenError(f"the KL task trains continuous tokenizers; got one of {self.tokenizer.spec.kind}")
        if min(self.kl, self.l1) < 0 or not 0 <= self.augmented <= 1:
            raise GenError(
                f"kl {self.kl}, l1 {self.l1}, augmented {self.augmented}; weights are >= 0, the fraction in [0, 1]"
            )

    def loss(self, params: Params, images: jax.Array, keys: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss () and its terms of images (B, H, W, C) in [-1, 1] with per-sample keys (B,)."""
        posterior = self.tokenizer.encode(params, images)
        error = 0.5 * (self.tokenizer.decode(params, posterior.sample(keys)) - images)
        mse, l1, kl = jnp.square(error).mean(), jnp.abs(error).mean(), posterior.kl().mean()
        metrics = {"mse": mse, "kl": kl, "psnr": -10.0 * jnp.log10(jnp.maximum(mse, 1e-10))}
        return mse + self.l1 * l1 + self.kl * kl, metrics

    @property
    def _averages(self) -> dict[str, Any]:
        return {} if self.ema is None else {"tokenizer": self.ema}

    def init(self, key: jax.Array, frozen: Frozen, previous: State | None) -> State:
        """Fresh parameters, or those of the previous stage."""
        del frozen
        params = Network(self.tokenizer).init(key) if previous is None else previous.params["tokenizer"]
        shown = jnp.zeros((self.pictures, *self.tokenizer.spec.image), jnp.uint8)
        return begin({"tokenizer": params}, {"tokenizer": self.optim}, self._averages, {"shown": shown})

    @property
    def programs(self) -> Mapping[str, Program]:
        """One program."""
        return {"tokenizer": self.update}

    def select(self, step: int) -> str:
        """Always the tokenizer's."""
        del step
        return "tokenizer"

    def inputs(self, step: int) -> Mapping[str, np.ndarray]:
        """No schedules."""
        del step
        return {}

    def update(self, state: State, frozen: Frozen, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        """One step; the first images of the batch are kept for the preview."""
        del frozen
        augment_key, choose_key, sample_key = jax.random.split(key, 3)
        images = _signed(batch["image"])
        count = images.shape[0]
        if self.augment is not None:
            chosen = jax.random.bernoulli(choose_key, self.augmented, (count, 1, 1, 1))
            images = jnp.where(chosen, self.augment(augment_key, images), images)
        data = (images, jax.random.split(sample_key, count))
        shown = state.aux["shown"].at[:count].set(batch["image"][: self.pictures])
        state = dataclasses.replace(state, aux=state.aux | {"shown": shown})
        return update(state, "tokenizer", lambda p, d: self.loss(p, *d), data, self.optim, self._averages)

    def preview(self, state: State, frozen: Frozen, key: jax.Array) -> Mapping[str, jax.Array]:
        """The newest images and their reconstructions from the posterior mode."""
        del frozen, key
        params, images = self.export(state)["tokenizer"], _signed(state.aux["shown"])
        decoded = self.tokenizer.decode(params, self.tokenizer.encode(params, images).mode())
        return {"images": images, "reconstructions": jnp.clip(decoded, -1.0, 1.0)}

    def export(self, state: State) -> Mapping[str, Any]:
        """The tokenizer, averaged where it is, as ``tokenizer``."""
        return {"tokenizer": state.ema.get("tokenizer", state.params["tokenizer"])}


def _signed(images: jax.Array) -> jax.Array:
    """uint8 -> float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0
