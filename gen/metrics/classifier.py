"""The classification accuracy score (CAS): a classifier is trained on samples and tested on real images.

Ravuri & Vinyals 2019. It falls when classes are confused, when samples are poor and when they lack variety. The
published score trains a ResNet-50 on ImageNet; here the classifier is a configuration, part of the protocol, small by
default so that a score takes minutes. Train it on real images for the score that perfect samples would get.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from gen.arrays import map_paths
from gen.errors import GenError
from gen.features.resize import resize
from gen.nn.layers import linear
from gen.nn.network import Network, Params, count, param_shapes
from gen.training.indexed import placed
from gen.training.sharding import constrain, replicated

__all__ = ["Classified", "Classifier", "classification_accuracy"]

_TESTED = 512  # real images looked at together


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A small residual network and how it is trained.

    Attributes:
      size: larger images are shrunk to this side (antialiased bicubic).
      width: channels of the first stage; every further stage has twice as many on half the side, down to 4 pixels.
      blocks: residual blocks per stage.
      steps, batch, rate, decay: of AdamW under a cosine schedule with 5 % of warmup.
      shift: images are moved by up to this share of the side while training, the border repeated.
      runs: trainings from other weights and orders; the score is their mean.

    Raises GenError for numbers that are not positive, and a width that 8 does not divide.
    """

    size: int = 64
    width: int = 32
    blocks: int = 1
    steps: int = 1500
    batch: int = 128
    rate: float = 1e-3
    decay: float = 0.05
    shift: float = 0.125
    runs: int = 3

    def __post_init__(self) -> None:
        if min(self.size, self.width, self.blocks, self.steps, self.batch, self.runs) < 1 or self.width % 8:
            raise GenError(f"{self} cannot be trained; sizes and counts are positive, and 8 divides the width")


@dataclasses.dataclass(frozen=True)
class _Network:
    """Architecture for given images."""

    size: tuple[int, int]
    channels: int
    width: int
    blocks: int
    classes: int

    def build(self, rngs: nnx.Rngs) -> "_Residual":
        return _Residual(self, rngs)


def _conv(width: int, out: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(width, out, (3, 3), strides=stride, use_bias=False, rngs=rngs)


class _Block(nnx.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), the first convolution with the stage's stride."""

    def __init__(self, width: int, out: int, stride: int, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = nnx.GroupNorm(width, 8, rngs=rngs), nnx.GroupNorm(out, 8, rngs=rngs)
        self.conv1, self.conv2 = _conv(width, out, stride, rngs), _conv(out, out, 1, rngs)
        self.skip = None if (width, stride) == (out, 1) else _conv(width, out, stride, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(self.norm1(x))
        skip = x if self.skip is None else self.skip(y)
        return skip + self.conv2(jax.nn.relu(self.norm2(self.conv1(y))))


class _Residual(nnx.Module):
    def __init__(self, config: _Network, rngs: nnx.Rngs) -> None:
        width, side = config.width, min(config.size)
        self.stem = _conv(config.channels, width, 1, rngs)
        blocks = [_Block(width, width, 1, rngs) for _ in range(config.blocks)]
        while side >= 8:
            blocks += [_Block(width, 2 * width, 2, rngs)]
            width, side = 2 * width, side // 2
            blocks += [_Block(width, width, 1, rngs) for _ in range(config.blocks - 1)]
        self.blocks = nnx.List(blocks)
        self.norm = nnx.GroupNorm(width, 8, rngs=rngs)
        self.head = linear(width, config.classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) float32 in [-1, 1] -> logits (B, classes)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(jax.nn.relu(self.norm(x)).mean((1, 2)))


class Classified(NamedTuple):
    """Accuracy on real images, mean and deviation (N - 1) over the trainings, and by class (None without images)."""

    accuracy: float
    spread: float
    per_class: tuple[float | None, ...]


def classification_accuracy(
    samples: np.ndarray,
    labels: np.ndarray,
    real: np.ndarray,
    real_labels: np.ndarray,
    *,
    classifier: Classifier = Classifier(),
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Classified:
    """Trains on samples, tests on real images.

    Args:
      samples, labels: (N, H, W, C) uint8 and (N,) integers: what is trained on.
      real, real_labels: (M, H, W, C) uint8 and (M,) integers: held-out images.
      classifier: the network and its training.
      seed: of weights, order and shifts; run k uses seed + k.
      mesh: batches are split over its data axes; the default device without.

    Raises:
      GenError: labels that do not match or are negative, images of other sizes, a class of real images of which there
        is no sample.
    """
    _check(samples, labels, real, real_labels)
    classes = int(max(labels.max(), real_labels.max())) + 1
    size = tuple(min(side, classifier.size) for side in samples.shape[1:3])
    network = _Network(size, samples.shape[3], classifier.width, classifier.blocks, classes)
    shrink = functools.partial(_shrunk, size=size)
    data = placed({"image": shrink(samples), "label": np.asarray(labels, np.int32)}, mesh)
    tested = shrink(real)
    right = []
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        for run in range(classifier.runs):
            params = _trained(classifier, network, data, jax.random.key(seed + run), mesh)
            right.append(_predicted(network, params, tested) == real_labels)
    hits = np.asarray(right, np.float64)
    scores = hits.mean(1)
    means = [hits[:, real_labels == k] for k in range(classes)]
    return Classified(
        float(scores.mean()),
        float(scores.std(ddof=1)) if len(scores) > 1 else 0.0,
        tuple(float(m.mean()) if m.size else None for m in means),
    )


def _check(samples: np.ndarray, labels: np.ndarray, real: np.ndarray, real_labels: np.ndarray) -> None:
    for name, images, given in (("samples", samples, labels), ("real images", real, real_labels)):
        if images.ndim != 4 or images.dtype != np.uint8 or np.shape(given) != (len(images),) or not len(images):
            raise GenError(
                f"{name} {images.dtype} {images.shape} with labels {np.shape(given)}; a classifier takes uint8 "
                "(N, H, W, C) with one label each"
            )
        if given.min() < 0:
            raise GenError(f"the {name} hold the label {given.min()}; expected classes from 0 on")
    if samples.shape[1:] != real.shape[1:]:
        raise GenError(f"samples are {samples.shape[1:]}, real images {real.shape[1:]}; expected one size; resize one")
    absent = sorted(set(real_labels.tolist()) - set(labels.tolist()))
    if absent:
        raise GenError(f"no sample of class {absent[0]}; expected some of every class of the real images; make more")


def _shrunk(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if images.shape[1:3] == size:
        return images
    call = jax.jit(lambda x: jnp.clip(jnp.round(resize(x, size, "pil-bicubic")), 0, 255).astype(jnp.uint8))
    return np.concatenate([np.asarray(call(images[i : i + _TESTED])) for i in range(0, len(images), _TESTED)])


def _scaled(images: jax.Array) -> jax.Array:
    return images.astype(jnp.float32) / 127.5 - 1


def _trained(
    config: Classifier, network: _Network, data: dict[str, jax.Array], key: jax.Array, mesh: Mesh | None
) -> Params:
    """The parameters after training; step i draws its batch with fold_in(key, i)."""
    start, step = _program(config, network, mesh)
    carry = start(key)
    for i in range(config.steps):  # on the host: XLA's convolutions crawl inside a loop on CPU
        carry = step(carry, data, key, i)
    params: Params = carry[0]
    return params


@functools.lru_cache(maxsize=8)
def _program(config: Classifier, network: _Network, mesh: Mesh | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(key -> fresh parameters and optimiser state, one step of training), each compiled once for all runs."""
    net = Network(network)
    schedule = optax.warmup_cosine_decay_schedule(0, config.rate, config.steps // 20, config.steps)
    optimiser = optax.adamw(schedule, weight_decay=config.decay)
    reach = [round(config.shift * side) for side in network.size]

    def start(key: jax.Array) -> Any:
        params = _fresh(network, jax.random.fold_in(key, config.steps))
        return params, optimiser.init(params)

    def loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(net(params, images), labels).mean()

    def moved(image: jax.Array, by: jax.Array) -> jax.Array:
        padded = jnp.pad(image, [(r, r) for r in reach] + [(0, 0)], mode="edge")
        return jax.lax.dynamic_slice(padded, (by[0], by[1], 0), image.shape)

    def step(carry: Any, data: Mapping[str, jax.Array], key: jax.Array, i: int) -> Any:
        params, opt = carry
        rows_key, move_key = jax.random.split(jax.random.fold_in(key, i))
        rows = jax.random.randint(rows_key, (config.batch,), 0, len(data["label"]))
        by = jax.random.randint(move_key, (config.batch, 2), 0, 2 * jnp.asarray(reach) + 1)
        images = constrain(_scaled(jax.vmap(moved)(data["image"][rows], by)))
        grads = jax.grad(loss)(params, images, data["label"][rows])
        changes, opt = optimiser.update(grads, opt, params)
        return optax.apply_updates(params, changes), opt

    whole = None if mesh is None else replicated(mesh)
    return jax.jit(start, out_shardings=whole), jax.jit(step, donate_argnums=0, out_shardings=whole)


def _fresh(network: _Network, key: jax.Array) -> Params:
    """He-normal kernels, norms of scale 1 and biases of 0; cut from one draw, which compiles in a tenth of the time."""
    shapes: Params = param_shapes(network)
    noise, taken = jax.random.normal(key, (count(shapes),)), 0

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        nonlocal taken
        values = noise[taken : (taken := taken + leaf.size)].reshape(leaf.shape)
        if leaf.ndim > 1:
            return values * np.sqrt(2 * leaf.shape[-1] / leaf.size)
        return jnp.full(leaf.shape, 1.0 if path.endswith("/scale") else 0.0, jnp.float32)

    params: Params = map_paths(draw, shapes)
    return params


@functools.partial(jax.jit, static_argnums=0)
def _classes(network: _Network, params: Params, images: jax.Array) -> jax.Array:
    return Network(network)(params, _scaled(images)).argmax(-1)


def _predicted(network: _Network, params: Params, images: np.ndarray) -> np.ndarray:
    """(M,) the most likely class of every image."""
    size = min(_TESTED, len(images))
    starts = range(0, len(images), size)
    rows = [np.minimum(np.arange(start, start + size), len(images) - 1) for start in starts]
    return np.concatenate([np.asarray(_classes(network, params, images[r])) for r in rows])[: len(images)]
