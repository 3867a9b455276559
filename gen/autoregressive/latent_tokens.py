"""Models of continuous tokens: a transformer says z of every masked token, a diffusion head draws the token from it.

The sibling of `gen.autoregressive.base.TokenModel` for latents (Li et al. 2024, arXiv 2406.11838): a MaskGIT without a
codebook, which decides its tokens in a random order, several at a time.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gen.autoregressive.base import Draws
from gen.autoregressive.token_head import HeadConfig, token_denoiser, token_losses
from gen.diffusion import objectives
from gen.diffusion.ddpm import DDPM
from gen.diffusion.denoiser import Denoiser, drop
from gen.errors import GenError
from gen.nn.conditions import Conditions
from gen.nn.network import Cond, Network, Params
from gen.training.task import Frozen

__all__ = ["LatentTokenModel", "masked_first"]


def masked_first(orders: jax.Array, count: Any) -> jax.Array:
    """Gives (B, L) bool, true at the first `count` positions of each row's order (B, L)."""
    return jnp.argsort(orders, axis=-1) < count


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentTokenModel(abc.ABC):
    """What the models of continuous tokens share: their masks, their head and their loss.

    A subclass is the configuration of a network with two parts: a transformer, called as
    ``net(tokens, mask, cond, room)`` with tokens (B, L, C) and the mask (B, L) of those that are not known, which gives
    z (B, L, D); and ``head``, the network of `head`.

    Attributes:
      shape: of one image's latents, channels last.
      process: the chain of the head.
      times: at how many times of the chain a training step tries each token.
      mask_mean, mask_std, mask_least: of the normal law of the share of masked tokens, cut at `mask_least` and 1. One
        share is drawn for a batch.
      cond_dropout: share of samples that training gives the null condition.
      dropout: share of what each block's attention adds that training drops.

    Raises GenError for shares out of [0, 1), masks that are no law on [`mask_least`, 1], and no time.
    """

    shape: tuple[int, ...]
    process: DDPM = DDPM("cosine")
    times: int = 4
    mask_mean: float = 1.0
    mask_std: float = 0.25
    mask_least: float = 0.7
    cond_dropout: float = 0.1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in ("cond_dropout", "dropout")}
        wrong = [f"{name} {share}" for name, share in shares.items() if not 0 <= share < 1]
        if wrong:
            raise GenError(f"a model of latent tokens has {wrong[0]}; expected a share in [0, 1)")
        if not 0 <= self.mask_least <= self.mask_mean <= 1 or self.mask_std <= 0 or self.times < 1:
            raise GenError(
                f"masks of mean {self.mask_mean}, deviation {self.mask_std} and at least {self.mask_least}, at "
                f"{self.times} times; expected 0 <= least <= mean <= 1, a positive deviation and at least one time"
            )

    @abc.abstractmethod
    def build(self, rngs: Any) -> Any:
        """Gives the module with freshly drawn parameters; it has a method ``null(cond)``."""

    @property
    @abc.abstractmethod
    def head(self) -> HeadConfig:
        """Gives the configuration of the head's network, whose parameters are ``params["head"]``."""

    @property
    @abc.abstractmethod
    def conditions(self) -> Conditions:
        """Gives what the model is conditioned on, by name."""

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Tells how many tokens an image has."""

    @abc.abstractmethod
    def sequence(self, latents: jax.Array) -> jax.Array:
        """Gives latents (B, *shape) as tokens (B, L, C)."""

    @abc.abstractmethod
    def stored(self, tokens: jax.Array) -> jax.Array:
        """Gives tokens (B, L, C) as latents (B, *shape): the inverse of `sequence`."""

    @property
    def network(self) -> "LatentTokenModel":
        """Gives the configuration of the network, which is the model itself."""
        return self

    @property
    def net(self) -> Network:
        """Gives the network as a parameter-free callable."""
        return Network(self)

    @property
    def classes_at(self) -> str:
        """Gives the path of the setting that says how many classes there are; "" for a model without labels."""
        return "num_classes" if "label" in self.conditions else ""

    @property
    def denoiser(self) -> Denoiser:
        """Gives the head as a denoiser of single tokens."""
        return token_denoiser(self.head, self.process)

    @property
    def room(self) -> int:
        """Tells how many tokens training leaves unmasked at most."""
        return self.length - math.ceil(self.length * self.mask_least)

    def forced(self, frozen: Frozen, rows: int) -> Cond:
        """Gives what joins the conditions of `rows` samples from frozen arrays by role; none by default."""
        del frozen, rows
        return {}

    def null(self, params: Params, cond: Cond) -> Cond:
        """Gives the unconditional input of classifier-free guidance."""
        found: Cond = self.net.apply(params, cond, method="null")
        return found

    def z(self, params: Params, tokens: jax.Array, mask: jax.Array, cond: Cond, room: int | None = None) -> jax.Array:
        """Gives z (B, L, D) float32 of every position, from the tokens that are not masked.

        Args:
          tokens: (B, L, C); mask: (B, L) bool, true where a token is not known.
          room: how many known tokens a row has at most; the network reads no more. None for all L.
        """
        found: jax.Array = self.net(params, tokens, mask, cond, self.length if room is None else room)
        return found

    def draw(self, key: jax.Array, tokens: jax.Array) -> Draws:
        """Gives everything random about a training step on tokens (B, L, C).

        ``order`` (B, L), random orders; ``count`` (B,), how many of each are masked, ceil(L share), the same for the
        batch; ``t`` (B, M, L) and ``eps`` (B, M, L, C), the head's; ``dropped`` (B,) bool; with dropout ``dropout``,
        keys (B,).
        """
        order_key, share_key, head_key, drop_key, dropout_key = jax.random.split(key, 5)
        rows, length, channels = tokens.shape
        orders = jax.vmap(lambda key: jax.random.permutation(key, length))(jax.random.split(order_key, rows))
        low, high = ((end - self.mask_mean) / self.mask_std for end in (self.mask_least, 1.0))
        share = self.mask_mean + self.mask_std * jax.random.truncated_normal(share_key, low, high)
        # rounding may not leave more tokens than there is room for
        count = jnp.clip(jnp.ceil(length * share), length - self.room, length)
        flat = jnp.zeros((rows * self.times * length, channels))
        head = self.denoiser.objective.draw(head_key, self.process, flat)
        draws = {
            "order": orders,
            "count": jnp.broadcast_to(count.astype(jnp.int32), (rows,)),
            "t": head.t.reshape(rows, self.times, length),
            "eps": head.eps.reshape(rows, self.times, length, channels),
            "dropped": jax.random.bernoulli(drop_key, self.cond_dropout, (rows,)),
        }
        return draws | ({"dropout": jax.random.split(dropout_key, rows)} if self.dropout else {})

    def loss(
        self, params: Params, tokens: jax.Array, cond: Cond, draws: Draws
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Gives losses (B,), whose mean is the head's loss at the batch's masked tokens; no further terms."""
        mask = masked_first(draws["order"], draws["count"][:, None])
        if self.conditions and self.cond_dropout:
            cond = drop(self.net, params, cond, draws["dropped"])
        cond = {**cond, "dropout": draws["dropout"]} if "dropout" in draws else cond
        z = self.z(params, tokens, mask, cond, self.room)
        head = objectives.Draws(draws["t"], draws["eps"])
        return self.masked_mean(token_losses(self.denoiser, params["head"], z, tokens, head), mask), {}

    @staticmethod
    def masked_mean(losses: jax.Array, mask: jax.Array) -> jax.Array:
        """Gives (B,) whose mean is the mean of losses (B, M, L) over the masked tokens (B, L) of the batch."""
        return len(mask) * (mask * losses.mean(axis=1)).sum(axis=-1) / mask.sum()
