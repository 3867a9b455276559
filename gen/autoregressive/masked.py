"""Masked token modelling: which tokens training hides, what it costs to name them wrongly, how many stay hidden.

MaskGIT (Chang et al. 2022, arXiv 2202.04200) with the loss and the schedule of TiTok's generator (Yu et al. 2024, arXiv
2406.07550, section 4.3). When the share r of a generation is done, a schedule says which share of the tokens is still
masked. Training draws r and hides that share of random positions; sampling (`gen.autoregressive.unmasking`) follows the
same curve.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gen.autoregressive.base import Draws, TokenModel
from gen.config import check_choices
from gen.errors import GenError
from gen.nn.network import Cond, Params
from gen.training.task import Schedule

__all__ = [
    "MaskSchedule",
    "MaskedModel",
    "entering",
    "hidden",
    "masked_accuracy",
    "masked_share",
    "smoothed_cross_entropy",
    "weighted",
]

MaskSchedule = Literal["arccos", "cosine", "linear", "root"]


def masked_share(schedule: MaskSchedule, done: Any, whole: int = 1) -> Any:
    """Gives the share of the tokens that is masked when the share r = done / whole in [0, 1] of the generation is over.

    It falls from 1 to 0: arccos(r) 2 / pi, cos(pi r / 2), 1 - r, or 1 - sqrt(r). NumPy in, NumPy out; JAX in, JAX out.
    """
    # in the order of the official codes: a share of a whole number of tokens is rounded down, whatever its last digit
    xp = jnp if isinstance(done, jax.Array) else np
    match schedule:
        case "arccos":
            return xp.arccos(done / whole) / (0.5 * math.pi)
        case "cosine":
            return xp.cos(0.5 * math.pi * done / whole)
        case "linear":
            return 1.0 - done / whole
        case "root":
            return 1.0 - xp.sqrt(done / whole)


def hidden(schedule: MaskSchedule, ratio: jax.Array, order: jax.Array) -> jax.Array:
    """Tells which tokens of a training batch are masked: (B, K) bool, at least one in each row.

    Args:
      ratio: (B,) uniform in [0, 1): how far each row's generation has come.
      order: (B, K) uniform in [0, 1): position j is hidden where argsort(order)[j] < number to mask.
    """
    tokens = order.shape[1]
    share = jnp.clip(masked_share(schedule, ratio), 1e-6, 1.0)
    count = jnp.maximum(jnp.round(tokens * share), 1.0)
    return jnp.argsort(order, axis=-1) < count[:, None]


def smoothed_cross_entropy(logits: jax.Array, tokens: jax.Array, smoothing: float) -> jax.Array:
    """Gives -(1 - s) log p(token) - s mean log p over the vocabulary, (B, K), of logits (B, K, V); float32."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    named = jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
    return -(1.0 - smoothing) * named - smoothing * log_p.mean(-1)


def weighted(losses: jax.Array, mask: jax.Array, unmasked: float) -> jax.Array:
    """Gives (B,) whose mean is sum(w loss) / (sum(w) + 1e-8) over the batch, w = 1 where masked and else `unmasked`.

    Args:
      losses: (B, K) float32; mask: (B, K) bool.
    """
    weights = jnp.where(mask, 1.0, unmasked)
    return len(losses) * (weights * losses).sum(-1) / (weights.sum() + 1e-8)


def masked_accuracy(logits: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Gives the share (B,) of the masked tokens that have the largest logit."""
    right = (logits.argmax(-1) == tokens) & mask
    return right.sum(-1) / mask.sum(-1)


def entering(schedule: MaskSchedule, tokens: int, steps: int) -> tuple[int, ...]:
    """Tells how many of `tokens` are masked as each of `steps` steps begins.

    floor(tokens x share((i + 1) / steps)) stay masked after step i, but at least one, and where there are two or more
    at least one fewer than before. A generation of more steps than tokens draws its last one again and again.

    Raises GenError for no step.
    """
    if steps < 1:
        raise GenError(f"masked decoding in {steps} steps; expected at least 1")
    counts = [tokens]
    for i in range(steps - 1):
        share = float(masked_share(schedule, np.float64(i + 1), steps))
        counts.append(max(1, min(counts[-1] - 1, math.floor(tokens * share))))
    return tuple(counts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedModel(TokenModel):
    """What the masked models of tokens share: their masks and their loss.

    A subclass is the configuration of a network called as ``net(tokens, cond)`` with tokens (B, N) int32, in which the
    number `vocabulary` stands for a masked one; it gives logits (B, N, vocabulary) float32.

    Attributes:
      schedule: the share of masked tokens over the generation.
      smoothing: share of each target that is spread over the vocabulary.
      unmasked: weight of the tokens that were not masked, beside 1 of those that were.
      cond_dropout, dropout: as `TokenModel` says.
    """

    schedule: MaskSchedule = "arccos"
    smoothing: float = 0.1
    unmasked: float = 0.1
    cond_dropout: float = 0.1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_choices(self)
        if self.length < 1 or self.vocabulary < 2:
            raise GenError(f"{self.length} tokens of a vocabulary of {self.vocabulary}; expected at least 1, and 2")
        if not 0 <= self.smoothing < 1 or self.unmasked < 0:
            raise GenError(
                f"smoothing {self.smoothing} and a weight {self.unmasked} of unmasked tokens; expected a share in "
                "[0, 1) and a weight of at least 0"
            )

    @property
    def groups(self) -> tuple[int, ...]:
        """Gives all tokens as one group: in which round each is decided is the sampler's choice."""
        return (self.length,)

    def logits(self, params: Params, tokens: jax.Array, cond: Cond) -> jax.Array:
        """Gives what the network says of every position, (B, N, vocabulary) float32, from the tokens not masked."""
        found: jax.Array = self.net(params, tokens, cond)
        return found

    def draw(self, key: jax.Array, tokens: jax.Array, schedule: Schedule) -> Draws:
        """Gives what `TokenModel.draw` gives, and ``ratio`` (B,) and ``order`` (B, N), see `hidden`."""
        key, ratio_key, order_key = jax.random.split(key, 3)
        ratio = jax.random.uniform(ratio_key, tokens.shape[:1])
        order = jax.random.uniform(order_key, tokens.shape)
        return {**super().draw(key, tokens, schedule), "ratio": ratio, "order": order}

    def loss(
        self, params: Params, tokens: jax.Array, cond: Cond, draws: Draws
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Gives losses (B,), whose mean over the batch is the loss, and the ``accuracy`` at masked tokens (B,).

        Args:
          tokens: (B, N) int32, the true ones; cond: conditions; draws: see `draw`.
        """
        mask = hidden(self.schedule, draws["ratio"], draws["order"])
        logits = self.logits(params, jnp.where(mask, self.vocabulary, tokens), self.trained_on(params, cond, draws))
        losses = weighted(smoothed_cross_entropy(logits, tokens, self.smoothing), mask, self.unmasked)
        return losses, {"accuracy": masked_accuracy(logits, tokens, mask)}
