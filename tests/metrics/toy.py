"""A feature network small enough to check by hand, for the tests of this folder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gen.metrics.sources import ImageSet


@dataclasses.dataclass(frozen=True)
class Toy:
    """Random rectified projections of 6x5x3 images: 12 features, 4 logits."""

    shift: float = 0.0

    @property
    def name(self):
        return "toy"

    @property
    def image(self):
        return (6, 5, 3)

    @property
    def resize(self):
        return "none"

    @property
    def precision(self):
        return "float32-highest"

    @property
    def outputs(self):
        return ("features", "logits")

    @property
    def classes(self):
        return 4

    def load(self):
        return {"weight": np.random.default_rng(3).normal(size=(90, 16)).astype(np.float32)}

    def fingerprint(self):
        return f"toy{self.shift}"

    def __call__(self, params, images):
        hidden = jnp.dot(images.reshape(len(images), -1) / 255, params["weight"], precision="highest")
        return {"features": jax.nn.relu(hidden[:, :12]) + self.shift, "logits": hidden[:, 12:]}


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 6, 5, 3), dtype=np.uint8)


def features(pixels):
    return np.asarray(Toy()(Toy().load(), jnp.asarray(pixels, jnp.float32))["features"], np.float64)


def draw(params, keys, cond):
    """A generator: noise around a class mean, in [-1, 1] and a little beyond."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (6, 5, 3)))(keys)
    return params["scale"] * noise + params["means"][cond["label"]][:, None, None, None]


PARAMS = {"scale": np.float32(0.4), "means": np.linspace(-0.5, 0.5, 4, dtype=np.float32)}


def poisoned(count, index):
    """Images of which one has a NaN pixel."""
    pixels = images(count).astype(np.float32) / 127.5 - 1
    pixels[index, 2, 3, 1] = np.nan
    return ImageSet(lambda a, i: {"image": a[i]}, pixels, count, "poisoned")
