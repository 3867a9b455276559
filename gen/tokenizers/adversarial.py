"""Training a tokenizer against a discriminator: VQGAN, latent diffusion, TiTok, ViTok.

Esser et al. 2021 (arXiv 2012.09841), Rombach et al. 2022 (arXiv 2112.10752), Yu et al. 2024 (arXiv 2406.07550).
Tokenizer and discriminator are two parts with their own optimisers. A step moves the tokenizer, then the discriminator
on the same reconstructions. Until `AdversarialTask.gan_start` there is no discriminator, and its program is another.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.arrays import flatten
from gen.errors import GenError
from gen.nn.adversarial import GAN_LOSSES, AdaptiveWeight, GANLoss, lecam, r1_penalty
from gen.nn.network import Network, Params
from gen.tokenizers.losses import expect_frozen
from gen.tokenizers.train import Rows, TokenizerTask
from gen.training.optim import OptimConfig
from gen.training.part import Aux, Part, keep_if, with_buffers
from gen.training.task import Batch, Frozen, Metrics, Program, Schedule, State

__all__ = ["AdversarialTask", "LeCAM"]

_NOTHING: Frozen = MappingProxyType({})
_SIDES = ("real", "fake")

LossOf = Callable[[jax.Array], tuple[jax.Array, Any]]  # images -> (loss (), what else it says)


@dataclasses.dataclass(frozen=True)
class LeCAM:
    """The regulariser of discriminators (`gen.nn.adversarial.lecam`) with its running averages, which start at 0.

    Attributes:
      weight: in the discriminator's loss; TiTok's by default.
      decay: of the averages of both mean logits.
    """

    weight: float = 1e-3
    decay: float = 0.999

    def moved(self, average: jax.Array, value: jax.Array) -> jax.Array:
        """Gives the running average after a step."""
        return self.decay * average + (1.0 - self.decay) * value


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialTask(TokenizerTask):
    """Trains ``tokenizer`` and ``discriminator``; the tokenizer's loss is that of `TokenizerTask` and a GAN term.

    Attributes:
      discriminator: the network (`gen.nn.discriminators`): images (B, H, W, C) to logits and batch statistics. Those of
        its buffers follow the discriminator's own steps.
      seen: what it sees of images: a frozen network's tokens (`gen.tokenizers.losses.EncoderTokens`, judged by a
        `gen.nn.token_discriminator.TokenDiscriminator`), or the images themselves where this is None.
      discriminator_optim: its optimiser; its schedule begins with it.
      gan: which losses.
      gan_weight: of the tokenizer's GAN term.
      adaptive: multiplies that weight by the ratio of the gradients of the image loss and the GAN term at the decoder's
        last layer (`tokenizer.last_layer`); None for a constant weight.
      gan_start: first step with a discriminator, counted in batches of the stage. Latent diffusion's ``disc_start``
        counts optimiser steps, two to a batch.
      gan_delay, gan_ramp: steps from there until the tokenizer's GAN term begins, and over which it then rises.
      ratio: discriminator updates per tokenizer update, once it has begun.
      lecam: the discriminator's regulariser, or None.
      r1: weight gamma of gamma / 2 E ||d D / d x||^2 on real images (`gen.nn.adversarial.r1_penalty`).

    Raises GenError for unknown losses, negative weights and steps, and a ratio below 1.
    """

    discriminator: Any
    seen: Any = None
    discriminator_optim: OptimConfig = OptimConfig()
    gan: GANLoss = "hinge"
    gan_weight: float = 0.1
    adaptive: AdaptiveWeight | None = None
    gan_start: int = 0
    gan_delay: int = 0
    gan_ramp: int = 0
    ratio: int = 1
    lecam: LeCAM | None = None
    r1: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gan not in GAN_LOSSES:
            raise GenError(f"unknown GAN loss '{self.gan}'; known: {', '.join(GAN_LOSSES)}")
        if min(self.gan_weight, self.gan_start, self.gan_delay, self.gan_ramp, self.r1) < 0 or self.ratio < 1:
            raise GenError(
                f"gan_weight {self.gan_weight}, r1 {self.r1}, gan_start {self.gan_start}, gan_delay {self.gan_delay}, "
                f"gan_ramp {self.gan_ramp}, ratio {self.ratio}; weights and steps are >= 0, the ratio at least 1"
            )

    @property
    def parts(self) -> tuple[Part, ...]:
        """Gives the tokenizer and the discriminator."""
        return (*super().parts, Part("discriminator", self.discriminator, self.discriminator_optim))

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Fresh parameters, or those of the previous stage where it had them. Raises GenError for weights not given."""
        if self.seen is not None:
            expect_frozen(frozen, self.seen)
        tokenizer = super().start(key, frozen, previous)
        if previous is not None and "discriminator" in previous.params:
            return {**tokenizer, "discriminator": previous.params["discriminator"]}
        return {**tokenizer, "discriminator": Network(self.discriminator).init(jax.random.fold_in(key, 1))}

    def aux(self) -> Mapping[str, Any]:
        """Gives the images that previews show; LeCAM's averages."""
        averages = {} if self.lecam is None else {"lecam_real": jnp.zeros(()), "lecam_fake": jnp.zeros(())}
        return {**super().aux(), **averages}

    @property
    def programs(self) -> Mapping[str, Program]:
        """``tokenizer`` alone, before there is a discriminator; ``adversarial``, both; ``discriminator`` alone."""
        programs: dict[str, Program] = {"adversarial": self.update_both}
        if self.gan_start:
            programs["tokenizer"] = self.update
        if self.ratio > 1:
            programs["discriminator"] = self.update_discriminator
        return programs

    def select(self, step: int) -> str:
        """By the step at which the discriminator begins, and the ratio."""
        if step < self.gan_start:
            return "tokenizer"
        return "discriminator" if (step - self.gan_start) % self.ratio else "adversarial"

    def updates(self, part: str, steps: int) -> int:
        """Lets the discriminator's updates begin with it; the tokenizer then moves at every `ratio`-th step."""
        adversarial = max(steps - self.gan_start, 0)
        return adversarial if part == "discriminator" else min(steps, self.gan_start) - (-adversarial // self.ratio)

    def schedules(self, step: int, steps: int) -> Mapping[str, Any]:
        """``gan``, the share in [0, 1] of the tokenizer's GAN term."""
        done = step - self.gan_start - self.gan_delay
        share = 0.0 if done < 0 else min(done / self.gan_ramp, 1.0) if self.gan_ramp else 1.0
        return {"gan": np.float32(share)}

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """One step of the tokenizer without a discriminator."""
        state, metrics = super().update(state, frozen, batch, schedule, key)
        return state, self.parts[0].named(metrics)

    def update_both(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """One step of the tokenizer, then one of the discriminator on the same reconstructions."""
        state, rows = self.drawn(state, batch, key)
        discriminator, share, part = state.params["discriminator"], schedule["gan"], self.parts[0]

        def loss(params: Params, rows: Rows) -> tuple[jax.Array, Aux]:
            return self.adversarial_loss(params, discriminator, rows, frozen, share)

        state, metrics, decoded = part.update(state, loss, rows, schedule)
        state, more = self._judge(state, frozen, rows.images, decoded, schedule)
        return state, {**part.named(metrics), **more}

    def update_discriminator(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """One step of the discriminator alone."""
        state, rows = self.drawn(state, batch, key)
        decoded = self.reconstruct(state.params["tokenizer"], rows)[2]
        return self._judge(state, frozen, rows.images, decoded, schedule)

    def _judge(
        self, state: State, frozen: Frozen, real: jax.Array, fake: jax.Array, schedule: Schedule
    ) -> tuple[State, dict[str, jax.Array]]:
        """One step of the discriminator, and of LeCAM's averages."""
        averages = {name: value for name, value in state.aux.items() if name.startswith("lecam_")}
        part = self.parts[1]

        def loss(params: Params, pairs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Aux]:
            return self.discriminator_loss(params, *pairs, averages, frozen)

        state, metrics, _ = part.update(state, loss, (real, fake), schedule)
        if self.lecam is not None:
            new = {f"lecam_{name}": self.lecam.moved(averages[f"lecam_{name}"], metrics[name]) for name in _SIDES}
            state = dataclasses.replace(state, aux=state.aux | keep_if(metrics["skipped"] == 0, new, averages))
        return state, part.named(metrics)

    def adversarial_loss(
        self, params: Params, discriminator: Params, rows: Rows, frozen: Frozen, share: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """Gives the tokenizer's loss () with `share` of its GAN term, and the reconstructions as per-sample output.

        The terms are differentiated at the reconstructions once: that gives the adaptive weight, and the
        reconstructions then carry the gradients' weighted sum back.
        """
        encoded, latents, decoded = self.reconstruct(params, rows)
        fixed = jax.lax.stop_gradient(decoded)
        (loss, metrics), image_gradient = _gradient(lambda y: self.image_loss(frozen, rows.images, y), fixed)
        (gan, _), gan_gradient = _gradient(lambda y: self.gan_loss(discriminator, y, frozen), fixed)
        weight = jnp.asarray(self.gan_weight, jnp.float32)
        if self.adaptive is not None:
            pull = self._to_last_layer(params, latents, rows)
            weight = weight * self.adaptive(pull(image_gradient), pull(gan_gradient))
        cost, more = self.latent_loss(encoded)
        further, others = self.beside(params, rows, frozen, encoded, latents)
        gradient = image_gradient + share * weight * gan_gradient
        # in value the last sum is 0; its gradient is that of the terms above
        total = loss + share * weight * gan + cost + further + jnp.sum((decoded - fixed) * gradient)
        metrics = metrics | more | others | {"gan": gan, "gan_weight": share * weight}
        return total, Aux(metrics, encoded.statistics, fixed)

    def _to_last_layer(self, params: Params, latents: jax.Array, rows: Rows) -> Callable[[jax.Array], jax.Array]:
        """What takes a gradient in the reconstructions to the decoder's last layer, at fixed parameters and latents."""
        path = self.tokenizer.last_layer
        params, latents = jax.lax.stop_gradient((params, latents))

        def decoded(last: jax.Array) -> jax.Array:
            return self.decode(with_buffers(params, {path: last}), latents, rows)

        pull = jax.vjp(decoded, flatten(params)[path])[1]
        return lambda gradient: pull(gradient)[0]

    def judged(
        self, discriminator: Params, images: jax.Array, frozen: Frozen
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Gives the discriminator's logits of images (B, H, W, C), and its batch statistics."""
        seen = images if self.seen is None else self.seen(frozen[self.seen.name], images)
        found: tuple[jax.Array, dict[str, jax.Array]] = Network(self.discriminator)(discriminator, seen)
        return found

    def gan_loss(
        self, discriminator: Params, decoded: jax.Array, frozen: Frozen = _NOTHING
    ) -> tuple[jax.Array, jax.Array]:
        """Gives the tokenizer's GAN term () without weight, and the logits."""
        logits, _ = self.judged(discriminator, decoded, frozen)
        return GAN_LOSSES[self.gan][1](logits), logits

    def discriminator_loss(
        self,
        params: Params,
        real: jax.Array,
        fake: jax.Array,
        averages: Mapping[str, jax.Array],
        frozen: Frozen = _NOTHING,
    ) -> tuple[jax.Array, Aux]:
        """Gives the discriminator's loss () on images and reconstructions, each with batch statistics of its own.

        Args:
          averages: LeCAM's, "lecam_real" and "lecam_fake"; {} without.
        """
        on_real, first = self.judged(params, real, frozen)
        on_fake, second = self.judged(with_buffers(params, first), jax.lax.stop_gradient(fake), frozen)
        loss = GAN_LOSSES[self.gan][0](on_real, on_fake)
        metrics = {"real": on_real.mean(), "fake": on_fake.mean()}
        if self.lecam is not None:
            metrics["lecam"] = lecam(*metrics.values(), *(averages[f"lecam_{name}"] for name in _SIDES))
            loss = loss + self.lecam.weight * metrics["lecam"]
        if self.r1:
            metrics["r1"] = r1_penalty(lambda x: self.judged(params, x, frozen)[0], real)
            loss = loss + self.r1 * metrics["r1"]
        return loss, Aux(metrics, second)


def _gradient(loss: LossOf, images: jax.Array) -> tuple[tuple[jax.Array, Any], jax.Array]:
    """((loss, what else it says), its gradient in images)."""
    return jax.value_and_grad(loss, has_aux=True)(images)
