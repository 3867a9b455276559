"""Diffusion over bits: a network that is shown noisy bits and says which of them were flipped.

Wang et al. 2023, "Binary Latent Diffusion", arXiv 2304.04820; Instella-T2I, arXiv 2506.21022, section 3.3.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gen.autoregressive.base import Draws, TokenModel
from gen.autoregressive.bernoulli import Bernoulli, posterior
from gen.config import check_choices
from gen.errors import GenError
from gen.nn.conditions import Conditions
from gen.nn.network import Cond, Params
from gen.training.task import Schedule

__all__ = ["BinaryDiffusion", "bit_entropy", "focal"]


def bit_entropy(logits: jax.Array, bits: jax.Array) -> jax.Array:
    """-log p(bit) in nats of logits and bits (or probabilities) in [0, 1], of equal shape."""
    return jax.nn.softplus(logits) - logits * bits


def focal(logits: jax.Array, targets: jax.Array, gamma: float) -> jax.Array:
    """Balanced focal loss, (B, ...): w (1 - p)^gamma (-log p), p the probability of the target.

    With f the share of ones in a sample's targets, ones weigh 1 - f and zeros f. Lin et al. 2017, arXiv 1708.02002,
    with the weights of the official code of binary latent diffusion.
    """
    share = targets.mean(axis=tuple(range(1, targets.ndim)), keepdims=True)
    weight = (1.0 - share) * targets + share * (1.0 - targets)
    p = jax.nn.sigmoid(logits)
    wrong = jnp.clip(1.0 - (p * targets + (1.0 - p) * (1.0 - targets)), 1e-6, 1.0 - 1e-6)
    return weight * bit_entropy(logits, targets) * wrong**gamma


@dataclasses.dataclass(frozen=True)
class BinaryDiffusion(TokenModel):
    """A denoiser of bits and its loss; a `gen.autoregressive.base.TokenModel` that decides all bits together.

    The loss is the mean over the bits of -log p(bit), or `focal` of what the network says.

    Attributes:
      backbone: the network, whose `shape` is that of the bits, (..., K); it is called with bits (B, N, K), times (B,)
        and conditions.
      process: the noise.
      levels: number T of times 1/T, ..., 1 that there are; the network then hears t - 1/T, as it counts from 0. None
        for all times from 0 to 1.
      target: what the network gives: the logit that a bit was flipped, or the logit of the clean bit.
      times: law of the times in training: uniform, or the logistic function of a standard normal number.
      gamma: of the balanced focal loss; None for -log p.
      falling: samples weigh 1 - (what the network hears of t).
      posterior: weight of a further term: cross-entropy between the true and the predicted probabilities of the bits
        at the level before.
      cond_dropout: share of samples that training gives the null condition.

    Raises GenError where the settings do not fit together.
    """

    kind: ClassVar[Literal["tokens", "bits"]] = "bits"

    backbone: Any
    process: Bernoulli = Bernoulli()
    levels: int | None = None
    target: Literal["flip", "bits"] = "flip"
    times: Literal["uniform", "logit-normal"] = "uniform"
    gamma: float | None = None
    falling: bool = False
    posterior: float = 0.0
    cond_dropout: float = 0.1

    def __post_init__(self) -> None:
        check_choices(self)
        if self.levels is not None and (self.levels < 1 or self.times != "uniform"):
            raise GenError(f"{self.levels} levels with {self.times} times; give at least one level, and uniform times")
        if self.posterior and self.levels is None:
            raise GenError("the posterior term compares neighbouring levels; give levels, or leave it out")

    @property
    def vocabulary(self) -> int:  # type: ignore[override]
        """Gives 2: a bit has two values."""
        return 2

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Gives the shape of one image's bits, the bits of a position last."""
        shape: tuple[int, ...] = self.backbone.shape
        return shape

    @property
    def conditions(self) -> Conditions:
        """Gives what the network is conditioned on."""
        found: Conditions = self.backbone.conditions
        return found

    @property
    def classes_at(self) -> str:
        """Gives the path of the network's number of classes."""
        return "backbone.num_classes"

    @property
    def groups(self) -> tuple[int, ...]:
        """Gives all positions as one group."""
        return (self.length,)

    def build(self, rngs: nnx.Rngs) -> Any:
        """Gives the backbone with freshly drawn parameters."""
        return self.backbone.build(rngs)

    def heard(self, t: Any) -> Any:
        """Tells what the network hears of times t."""
        return t if self.levels is None else t - 1.0 / self.levels

    def output(self, params: Params, x_t: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
        """Gives the network's output (B, N, K) float32 at bits x_t (B, N, K) and times t (B,)."""
        found: jax.Array = self.net.apply(params, x_t.astype(jnp.float32), self.heard(t), cond)
        return found

    def clean(self, output: jax.Array, x_t: jax.Array) -> jax.Array:
        """Gives the logits of the clean bits."""
        return jnp.where(x_t > 0.5, -output, output) if self.target == "flip" else output

    def logits(self, params: Params, tokens: jax.Array, cond: Cond) -> jax.Array:
        """Gives the logits of the clean bits (B, N, K) where `tokens` are noisy ones at times ``cond["time"]`` (B,)."""
        return self.clean(self.output(params, tokens, cond["time"], cond), tokens)

    def draw(self, key: jax.Array, tokens: jax.Array, schedule: Schedule) -> Draws:
        """Gives the base's draws; ``t`` (B,), and ``uniforms`` (B, N, K) that make the noisy bits."""
        base_key, time_key, noise_key = jax.random.split(key, 3)
        shape = tokens.shape[:1]
        if self.levels is not None:
            t = jax.random.randint(time_key, shape, 1, self.levels + 1) / self.levels
        elif self.times == "uniform":
            t = 1.0 - jax.random.uniform(time_key, shape)  # never 0, at which nothing is left to say
        else:
            t = jax.nn.sigmoid(jax.random.normal(time_key, shape))
        uniforms = jax.random.uniform(noise_key, tokens.shape)
        return {**super().draw(base_key, tokens, schedule), "t": t, "uniforms": uniforms}

    def loss(
        self, params: Params, tokens: jax.Array, cond: Cond, draws: Draws
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Gives the loss (B,), and ``bce``, its first term without weights, and ``accuracy`` of the clean bits (B,)."""
        x, t = tokens.astype(jnp.float32), draws["t"]
        x_t = (draws["uniforms"] < self.process.chance(x, t)).astype(jnp.float32)
        output = self.output(params, x_t, t, self.trained_on(params, cond, draws))
        return self.terms(output, x, x_t, t)

    def terms(
        self, output: jax.Array, x: jax.Array, x_t: jax.Array, t: jax.Array
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Gives what `loss` says, of the network's output; x clean and x_t noisy bits, all (B, N, K); t (B,)."""
        clean, axes = self.clean(output, x_t), tuple(range(1, x.ndim))
        if self.gamma is None:
            found = bit_entropy(clean, x)
        else:
            found = focal(output, jnp.abs(x - x_t) if self.target == "flip" else x, self.gamma)
        weight = 1.0 - self.heard(t) if self.falling else jnp.ones_like(t)
        plain = found.mean(axes)
        right = ((clean > 0) == (x > 0.5)).astype(jnp.float32).mean(axes)
        terms = {"bce": plain, "accuracy": right}
        if not self.posterior:
            return weight * plain, terms
        terms["posterior"] = weight * self._posterior_term(jax.nn.sigmoid(clean), x, x_t, t).mean(axes)
        return weight * plain + self.posterior * terms["posterior"], terms

    def _posterior_term(self, p: jax.Array, x: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """Cross-entropy at the level before t, (B, N, K); at the first level, of p itself."""
        before = jnp.maximum(self.heard(t), 0.0)
        shares = (self.process.keep(t) / self.process.keep(before)).reshape(-1, *(1,) * (x.ndim - 1))
        true, said = (posterior(self.process.chance(q, before), x_t, shares) for q in (x, p))
        first = (t < 1.5 / (self.levels or 1)).reshape(shares.shape)
        said = jnp.clip(jnp.where(first, p, said), 1e-6, 1.0 - 1e-6)
        return -true * jnp.log(said) - (1.0 - true) * jnp.log1p(-said)
