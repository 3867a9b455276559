"""What every model of tokens offers to training, sampling and likelihoods, whatever the order in which it writes them.

A token model is a frozen dataclass, the configuration of one network, whose functions take parameters and arrays. Rows
of a token cache come to it as sequences (`TokenModel.sequence`); it writes them in `TokenModel.groups`, and the tokens
of one group are independent given those before.
"""

import abc
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from gen.diffusion.denoiser import drop
from gen.errors import GenError
from gen.nn.conditions import Conditions, label
from gen.nn.network import Cond, Network, Params
from gen.training.task import Frozen, Schedule

__all__ = ["Cache", "CachedModel", "Draws", "TokenModel", "cross_entropy"]

Draws = Mapping[str, jax.Array]  # all randomness of a training step by name, with leading axis B
Cache = Any  # a tree of arrays: what a network keeps of the tokens that it has read


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Gives -log p(token) in nats, (...) float32, of logits (..., V) and tokens (...) int32."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


class TokenModel(abc.ABC):
    """The base of token models. A subclass is a frozen dataclass with the fields below; `build` gives its module.

    Attributes:
      shape: what a cache keeps of one image: sides of a grid of tokens, (N,), or (..., K) of bits.
      vocabulary: number of token ids; 2 for bits.
      num_classes: number of labels; 0 for none.
      cond_dropout: share of samples that training gives the null condition.
      dropout: share of activations that training drops.
      kind: what the model writes, as in `gen.tokenizers.base.TokenizerSpec`.
      exact: whether `logits` of all tokens belong to one order of writing, so that the product of the tokens'
        probabilities is that of the image.
      scales: sides of the token maps of a model of several scales, coarse to fine; () for all others.
    """

    kind: ClassVar[Literal["tokens", "bits"]] = "tokens"
    exact: ClassVar[bool] = False

    shape: Any
    vocabulary: int
    num_classes: int = 0
    cond_dropout: float = 0.1
    dropout: float = 0.0
    scales: Any = ()

    @abc.abstractmethod
    def build(self, rngs: Any) -> Any:
        """Gives the module with freshly drawn parameters; it has a method ``null(cond)`` where it has conditions."""

    @abc.abstractmethod
    def logits(self, params: Params, tokens: jax.Array, cond: Cond) -> jax.Array:
        """Gives what the network says of each token when it is shown the earlier ones: (B, N, vocabulary) float32.

        Args:
          params: of the network.
          tokens: (B, N) int32, in the order of a cache.
          cond: conditions by name, and what `forced` gives.
        """

    @property
    def length(self) -> int:
        """Tells how many tokens an image has; of bits, how many positions."""
        return math.prod(self.shape[:-1] if self.kind == "bits" else self.shape)

    @property
    def groups(self) -> tuple[int, ...]:
        """Gives the numbers of tokens that are decided together, in order; one at a time by default."""
        return (1,) * self.length

    @property
    def conditions(self) -> Conditions:
        """Gives what the model is conditioned on, by name."""
        return label(self.num_classes)

    @property
    def classes_at(self) -> str:
        """Gives the path of the setting that says how many classes there are."""
        return "num_classes"

    @property
    def network(self) -> "TokenModel":
        """Gives the configuration of the network, which is the model itself."""
        return self

    @property
    def net(self) -> Network:
        """Gives the network as a parameter-free callable."""
        return Network(self)

    def sequence(self, stored: jax.Array) -> jax.Array:
        """Gives rows of a cache (B, *shape) as sequences (B, N) int32; bits as (B, N, K)."""
        ids = stored.astype(jnp.int32)
        return ids.reshape(len(ids), self.length, -1) if self.kind == "bits" else ids.reshape(len(ids), self.length)

    def stored(self, sequences: jax.Array) -> jax.Array:
        """Gives sequences as rows of a cache: the inverse of `sequence`."""
        return sequences.reshape(len(sequences), *self.shape)

    def forced(self, frozen: Frozen, tokens: jax.Array) -> Cond:
        """Gives what the network reads beside tokens and conditions, and what follows from the tokens by frozen arrays.

        None by default. A model of several scales reads the codes of the coarser ones, which its tokenizer knows
        (role ``tokenizer``). The entries have leading axis B and join the conditions.
        """
        del frozen, tokens
        return {}

    def null(self, params: Params, cond: Cond) -> Cond:
        """Gives the unconditional input of classifier-free guidance."""
        found: Cond = self.net.apply(params, cond, method="null")
        return found

    def schedules(self, step: int, steps: int) -> Mapping[str, Any]:
        """Gives host-side schedules that `draw` reads at a training step; none by default."""
        del step, steps
        return {}

    def draw(self, key: jax.Array, tokens: jax.Array, schedule: Schedule) -> Draws:
        """Gives everything random about a training step: ``dropped`` (B,) bool, samples that lose their condition, and
        with dropout ``dropout``, keys (B,).

        Args:
          tokens: (B, N), of which the shape is used.
          schedule: the step's `schedules`.
        """
        del schedule
        drop_key, dropout_key = jax.random.split(key)
        draws = {"dropped": jax.random.bernoulli(drop_key, self.cond_dropout, tokens.shape[:1])}
        return draws | ({"dropout": jax.random.split(dropout_key, len(tokens))} if self.dropout else {})

    def loss(
        self, params: Params, tokens: jax.Array, cond: Cond, draws: Draws
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Gives what is minimised, (B,) float32, and further terms (B,) by name; by default -log p per token in nats.

        Args:
          tokens: (B, N) int32; cond: conditions and `forced`; draws: see `draw`.
        """
        logits = self.logits(params, tokens, self.trained_on(params, cond, draws))
        return self.surprise(logits, tokens).reshape(len(tokens), -1).mean(axis=-1), {}

    def surprise(self, logits: jax.Array, tokens: jax.Array) -> jax.Array:
        """Gives -log p in nats of each token (B, N) under its logits, of each bit (B, N, K) for bits."""
        return cross_entropy(logits, tokens)

    def trained_on(self, params: Params, cond: Cond, draws: Draws) -> Cond:
        """Gives the conditions of a training step: null where they were dropped, with the keys of dropout as
        ``dropout``.
        """
        if self.conditions and self.cond_dropout:
            cond = drop(self.net, params, cond, draws["dropped"])
        return {**cond, "dropout": draws["dropout"]} if "dropout" in draws else cond

    def check_tokens(self, what: str, kind: str, shape: tuple[int, ...], vocabulary: int | None, scales: Any) -> None:
        """Raises GenError where tokens of a tokenizer or a cache, which `what` names, are not those of this model.

        Args:
          kind, shape, vocabulary, scales: as in `gen.tokenizers.base.TokenizerSpec`; scales None where nobody knows.
        """
        if kind != self.kind:
            raise GenError(f"{what} has {kind}, and this is a model of {self.kind}; give what was encoded to those")
        if scales is not None and tuple(scales) != tuple(self.scales):
            raise GenError(
                f"{what} has token maps of the sides {tuple(scales) or 'none'}, and the model "
                f"{tuple(self.scales) or 'none'}; "
                "give the tokenizer that it was trained on, or train it on this one's tokens"
            )
        if tuple(shape) != tuple(self.shape):
            raise GenError(
                f"{what} has {kind} {tuple(shape)} of an image, and the model {tuple(self.shape)}; give the tokenizer "
                "that it was trained on, or a model of that shape"
            )
        if kind == "tokens" and vocabulary != self.vocabulary:
            raise GenError(
                f"{what} has a vocabulary of {vocabulary}, and the model one of {self.vocabulary}; give the tokenizer "
                "that it was trained on, or a model with that vocabulary"
            )


class CachedModel(TokenModel):
    """A model that writes one token at a time and keeps what it has read, so that a token costs one short call."""

    exact: ClassVar[bool] = True

    def prefill(self, params: Params, cond: Cond, batch: int) -> tuple[Cache, jax.Array]:
        """Reads the conditions (batch, ...). Gives the cache, of full length, and logits (batch, 1, vocabulary) of the
        first token.
        """
        found: tuple[Cache, jax.Array] = self.net.apply(params, cond, batch, method="prefill")
        return found

    def step(self, params: Params, cache: Cache, ids: jax.Array, at: jax.Array, cond: Cond) -> tuple[Cache, jax.Array]:
        """Reads n tokens from `at` on. Gives the cache with them and logits (B, n, vocabulary) of the token after each.

        Args:
          cache: of the tokens before.
          ids: (B, n) int32; at: () int32, from 0. A model may take one at a time only (n = 1).
        """
        found: tuple[Cache, jax.Array] = self.net.apply(params, cache, ids, at, cond, method="step")
        return found
