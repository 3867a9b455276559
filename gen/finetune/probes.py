"""Classifiers on a denoiser's features: pooled linear heads, attention heads, and the denoiser itself.

A noisy image x_t is put through the network up to one of its blocks; the activation, pooled, is a representation of the
image (Mukhopadhyay et al. 2023, arXiv 2307.08702 and 2311.17921). Middle blocks at little noise are the best of them.
The zero-shot classifier needs no head: the class under which the denoiser predicts best (Li et al. 2023, arXiv
2303.16203).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from gen.diffusion.denoiser import Denoiser
from gen.diffusion.objectives import Draws, noised
from gen.errors import GenError
from gen.nn.layers import linear
from gen.nn.network import Cond, Network, Params
from gen.nn.vit import ViTBlock

__all__ = [
    "AttentionHead",
    "Fit",
    "LinearHead",
    "accuracy",
    "class_losses",
    "fit_head",
    "flattened",
    "noisy_features",
    "pooled",
]

Features = Mapping[str, jax.Array]  # (B, *places, C) float32, by name


def pooled(x: jax.Array, side: int) -> jax.Array:
    """Averages x (B, *places, C) over `side` cells along each axis of places: (B, side, ..., C).

    Cell i of an axis of n places is the mean of places floor(i n / side) to ceil((i + 1) n / side) - 1; cells overlap
    where `side` does not divide n. An axis of fewer places keeps them.
    """
    for axis in range(1, x.ndim - 1):
        n = x.shape[axis]
        if n <= side:
            continue
        cells, places = np.arange(side)[:, None], np.arange(n)
        inside = (places >= cells * n // side) & (places < -(-(cells + 1) * n // side))
        weights = jnp.asarray(inside / inside.sum(1, keepdims=True), x.dtype)
        x = jnp.moveaxis(jnp.tensordot(weights, x, (1, axis)), 0, axis)
    return x


def flattened(x: jax.Array) -> jax.Array:
    """Gives x (B, *places, C) as rows (B, C places), channel by channel, as the official linear head has them."""
    return jnp.moveaxis(x, -1, 1).reshape(len(x), -1)


@dataclasses.dataclass(frozen=True)
class LinearHead:
    """Logits that are linear in one pooled feature.

    Attributes:
      feature: (*places, C) of the feature.
      classes: how many.
      side: cells of the pooling along each axis.
    """

    feature: tuple[int, ...]
    classes: int
    side: int = 2

    def build(self, rngs: nnx.Rngs) -> "_Linear":
        """Gives the module with freshly drawn parameters."""
        return _Linear(self, rngs)


class _Linear(nnx.Module):
    def __init__(self, config: LinearHead, rngs: nnx.Rngs) -> None:
        self.config = config
        cells = [min(n, config.side) for n in config.feature[:-1]]
        self.out = linear(int(np.prod(cells)) * config.feature[-1], config.classes, rngs=rngs)

    def __call__(self, features: Features) -> jax.Array:
        (x,) = features.values()
        return self.out(flattened(pooled(x, self.config.side)))


@dataclasses.dataclass(frozen=True)
class AttentionHead:
    """A small transformer over the features of several blocks, at several noise levels: the official "DifFormer".

    Each block's map is pooled, normed over places and channels together and brought to the head's width. The tokens of
    all blocks at one noise level, after a class token, go through the transformer; its class tokens of all levels, side
    by side, give the logits.

    Attributes:
      blocks: (name, (*places, C)) of each block's feature.
      levels: number of noise levels; the feature of block b at level i is called ``<i>/<b>``.
      classes: how many.
      side: cells of the pooling along each axis, at most.
      width, heads, depth: of the transformer.
    """

    blocks: tuple[tuple[str, tuple[int, ...]], ...]
    levels: int
    classes: int
    side: int = 16
    width: int = 1024
    heads: int = 8
    depth: int = 2

    def build(self, rngs: nnx.Rngs) -> "_Attending":
        """Gives the module with freshly drawn parameters."""
        return _Attending(self, rngs)


class _Entrance(nnx.Module):
    """LayerNorm over all of a map, with a gain and a bias for each number, and a linear layer of its channels."""

    def __init__(self, shape: tuple[int, ...], width: int, rngs: nnx.Rngs) -> None:
        self.scale, self.bias = nnx.Param(jnp.ones(shape)), nnx.Param(jnp.zeros(shape))
        self.proj = linear(shape[-1], width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        axes = tuple(range(1, x.ndim))
        centred = x - x.mean(axes, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(axes, keepdims=True) + 1e-5)
        tokens: jax.Array = self.proj(normed * self.scale[...] + self.bias[...])
        return tokens.reshape(len(x), -1, tokens.shape[-1])


class _Attending(nnx.Module):
    def __init__(self, config: AttentionHead, rngs: nnx.Rngs) -> None:
        self.config, width = config, config.width
        self.enter = nnx.Module()
        for name, (*places, channels) in config.blocks:
            shape = (*(min(n, config.side) for n in places), channels)
            setattr(self.enter, name, _Entrance(shape, width, rngs))
        self.token = nnx.Param(jnp.zeros(width))
        self.blocks = nnx.Module()
        for i in range(config.depth):
            block = ViTBlock(width, config.heads, 4 * width, eps=1e-5, qkv_bias=False, rngs=rngs)
            setattr(self.blocks, f"block_{i}", block)
        self.out = linear(config.levels * width, config.classes, rngs=rngs)

    def __call__(self, features: Features) -> jax.Array:
        config, seen = self.config, []
        for level in range(config.levels):
            maps = {name: pooled(features[f"{level}/{name}"], config.side) for name, _ in config.blocks}
            tokens = [getattr(self.enter, name)(x) for name, x in maps.items()]
            first = jnp.broadcast_to(self.token[...], (len(tokens[0]), 1, config.width))
            x = jnp.concatenate([first, *tokens], axis=1)
            for i in range(config.depth):
                x = getattr(self.blocks, f"block_{i}")(x)
            seen.append(x[:, 0])
        return self.out(jnp.concatenate(seen, axis=-1))


def noisy_features(
    denoiser: Denoiser, params: Params, x: jax.Array, t: float, eps: jax.Array, cond: Cond, taps: tuple[str, ...]
) -> dict[str, jax.Array]:
    """Gives the features named by `taps` of x_t = alpha(t) x + sigma(t) eps, float32.

    Args:
      x: (B, *shape) clean data on the scale that the denoiser was trained on.
      eps: like x, standard normal.
      cond: of the network; its null condition where it has one, so that no label is seen.
    """
    draws = Draws(jnp.full(len(x), t, jnp.float32), eps)
    found = denoiser.features(params, noised(denoiser.process, x, draws), draws.t, cond, taps)
    return {name: found[name].astype(jnp.float32) for name in taps}


def class_losses(denoiser: Denoiser, params: Params, x: jax.Array, draws: Draws, classes: int) -> jax.Array:
    """Gives the denoiser's own loss of x (B, *shape) under every class, (B, classes), at the same times and noise.

    The class of the least loss, averaged over several draws, is the zero-shot diffusion classifier's answer.
    """

    def under(label: jax.Array) -> jax.Array:
        cond = {"label": jnp.full(len(x), label, jnp.int32)}
        taps = denoiser.objective.taps
        losses, _ = denoiser.objective.loss(
            lambda x_t, t, c: denoiser(params, x_t, t, c, taps=taps), denoiser.process, x, cond, draws
        )
        return losses

    return jax.lax.map(under, jnp.arange(classes)).T


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a head is trained: AdamW under a cosine.

    Attributes:
      steps, batch, rate, decay: of the optimiser.
      seed: of initial weights and order.

    Raises GenError for numbers that are not positive.
    """

    steps: int = 1500
    batch: int = 128
    rate: float = 3e-3
    decay: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1 or self.rate <= 0.0:
            raise GenError(f"{self} trains nothing; steps, batch and rate are positive")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fitted(head: Any, fit: Fit, features: Features, labels: jax.Array) -> Params:
    network, (init_key, order_key) = Network(head), jax.random.split(jax.random.key(fit.seed))
    optimiser = optax.adamw(optax.cosine_decay_schedule(fit.rate, fit.steps), weight_decay=fit.decay)
    params = network.init(init_key)

    def step(state: Any, key: jax.Array) -> tuple[Any, None]:
        params, memory = state
        rows = jax.random.randint(key, (fit.batch,), 0, len(labels))

        def loss(params: Params) -> jax.Array:
            logits = network(params, {name: feature[rows] for name, feature in features.items()})
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

        updates, memory = optimiser.update(jax.grad(loss)(params), memory, params)
        return (optax.apply_updates(params, updates), memory), None

    keys = jax.random.split(order_key, fit.steps)
    return jax.lax.scan(step, (params, optimiser.init(params)), keys)[0][0]


def fit_head(head: Any, features: Features, labels: np.ndarray, fit: Fit = Fit()) -> Params:
    """Trains a head on features (N, ...) by name and labels (N,), and gives its parameters.

    Raises GenError for labels that the head has no class for, and for features and labels of different number.
    """
    count = len(next(iter(features.values())))
    if len(labels) != count or labels.min() < 0 or labels.max() >= head.classes:
        raise GenError(
            f"{count} features with {len(labels)} labels from {labels.min()} to {labels.max()}; expected one for each, "
            f"below {head.classes}"
        )
    params: Params = _fitted(head, fit, dict(features), jnp.asarray(labels))
    return params


@functools.partial(jax.jit, static_argnums=0)
def _answers(head: Any, params: Params, features: Features) -> jax.Array:
    return Network(head)(params, features).argmax(-1)


def accuracy(head: Any, params: Params, features: Features, labels: np.ndarray, batch: int = 1024) -> float:
    """Gives the share, in [0, 1], of features (N, ...) that the head gives their label (N,)."""
    right = 0
    for start in range(0, len(labels), batch):
        rows = slice(start, start + batch)
        found = _answers(head, params, {name: feature[rows] for name, feature in features.items()})
        right += int((np.asarray(found) == labels[rows]).sum())
    return right / len(labels)
