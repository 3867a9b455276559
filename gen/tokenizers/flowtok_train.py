"""Training FlowTok on image latents and their captions' features (He et al. 2025, arXiv 2503.10772, section 3.3)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gen.diffusion.times import TimeSampler
from gen.errors import GenError
from gen.nn.conditions import Conditions
from gen.nn.network import Network, Params
from gen.tokenizers.flowtok import FlowTokConfig, contrastive, flat_kl, flow_loss, paired, velocity_denoiser
from gen.training.method import Method
from gen.training.part import Aux, Part
from gen.training.task import Batch, Frozen, Metrics, Model, Schedule, State

__all__ = ["FlowTokTask"]

Draws = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class FlowTokTask(Method):
    """Trains both networks: flow + kl KL(text latents) + contrast L_align, see `gen.tokenizers.flowtok`.

    Attributes:
      config: the projector and the velocity network.
      kl: weight of the text latents' `flat_kl`, a mean over the batch.
      contrast: weight of the `contrastive` loss.
      null: share of samples whose text says nothing of their image.
      group: rows that the contrastive loss compares; None for the batch.
    """

    config: FlowTokConfig
    kl: float = 1e-4
    contrast: float = 1.0
    null: float = 0.1
    group: int | None = None

    takes = ("latent",)

    def __post_init__(self) -> None:
        if not 0 <= self.null < 1 or self.kl < 0 or self.contrast < 0:
            raise GenError(
                f"null {self.null}, kl {self.kl}, contrast {self.contrast}; expected a share in [0, 1), and weights of "
                "at least 0"
            )

    @property
    def parts(self) -> tuple[Part, ...]:
        """Gives the only part, both networks."""
        return (Part("net", self.config, self.optim, self.emas),)

    def models(self) -> Mapping[str, Model]:
        """Gives both networks as ``net``."""
        return {"net": Model(self.config)}

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Gives fresh parameters, or those of the previous stage."""
        del frozen
        return {"net": Network(self.config).init(key) if previous is None else previous.params["net"]}

    @property
    def shape(self) -> tuple[int, ...]:
        """Gives the shape of one image's latents."""
        return self.config.shape

    @property
    def conditions(self) -> Conditions:
        """Gives the caption's features."""
        return self.config.conditions

    def draw(self, key: jax.Array, images: jax.Array) -> Draws:
        """Gives the times ``t`` (B,) on our clock, ``eps`` of the text latents, and ``null`` (B,) bool."""
        time_key, eps_key, null_key = jax.random.split(key, 3)
        process = velocity_denoiser(self.config.velocity).process
        return {
            "t": TimeSampler("logit-normal")(time_key, process, len(images)),
            "eps": jax.random.normal(eps_key, images.shape),
            "null": jax.random.bernoulli(null_key, self.null, (len(images),)),
        }

    def loss(self, params: Params, images: jax.Array, text: jax.Array, draws: Draws) -> tuple[jax.Array, Aux]:
        """Gives the loss of a batch, (), and its terms.

        Args:
          images: (B, tokens, channels) latents; text: (B, length, width) features of the captions.
        """
        projector = Network(self.config.text).module(params["text"])
        posterior, _ = projector(text)
        start = posterior.mean + jnp.exp(0.5 * posterior.logvar) * draws["eps"]
        targets, null = paired(images, draws["null"])
        flow = flow_loss(self.config.velocity, params["velocity"], start, targets, draws["t"], null).mean()
        kl = flat_kl(posterior).mean()
        aligned = contrastive(start, projector.target(text), projector.log_scale[...], self.group)
        total = flow + self.kl * kl + self.contrast * aligned
        return total, Aux({"flow": flow, "kl": kl, "contrast": aligned})

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one step with fresh draws."""
        del frozen
        images, text = self.data(batch), batch["text"].astype(jnp.float32)
        data = (images, text, self.draw(key, images))
        state, metrics, _ = self.parts[0].update(state, lambda p, d: self.loss(p, *d), data, schedule)
        return state, metrics
