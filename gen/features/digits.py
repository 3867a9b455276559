"""A small digit classifier as the feature extractor of the embedded 8x8 digits.

Trained on the training split by scripts/train_digits_extractor.py and frozen since: distances between sets of
digits are comparable exactly because these weights never change.
"""

import dataclasses
import hashlib
import math
from importlib import resources
from typing import ClassVar

import jax
import jax.numpy as jnp

from gen import arrays
from gen.errors import GenError
from gen.nn.network import Params

__all__ = ["DigitsExtractor", "init_digits"]

_SHA256 = "8e8655f377c11a0b62ffd0a29b4310f33a6bffedb31bdf7e4924db59e682bfb8"
_WIDTHS = (24, 48, 64)


def init_digits(key: jax.Array) -> Params:
    """Gives fresh weights, He-normal: three 3x3 convolutions (HWIO) and a dense layer from 64 features to 10 logits.

    "mean" and "std" (64,) standardise the features; they are set after training.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "conv0": (3, 3, 1, _WIDTHS[0]),
        "conv1": (3, 3, _WIDTHS[0], _WIDTHS[1]),
        "conv2": (3, 3, _WIDTHS[1], _WIDTHS[2]),
        "head": (_WIDTHS[2], 10),
    }
    params = {"mean": jnp.zeros(_WIDTHS[2]), "std": jnp.ones(_WIDTHS[2])}
    for i, (name, shape) in enumerate(shapes.items()):
        scale = math.sqrt(2 / math.prod(shape[:-1]))
        params[f"{name}_kernel"] = jax.random.normal(jax.random.fold_in(key, i), shape) * scale
        params[f"{name}_bias"] = jnp.zeros(shape[-1])
    return params


@dataclasses.dataclass(frozen=True)
class DigitsExtractor:
    """64 penultimate features and 10 logits of 8x8 digits.

    The features have mean 0 and variance 1 on the training split.
    """

    modes: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """Gives the short name for protocols and tables."""
        return "digits"

    @property
    def image(self) -> tuple[int, int, int]:
        """Gives (8, 8, 1), the only shape it takes."""
        return (8, 8, 1)

    @property
    def resize(self) -> str:
        """Does what `Extractor.resize` says."""
        return "none"

    @property
    def precision(self) -> str:
        """Does what `Extractor.precision` says."""
        return "float32-highest"

    @property
    def outputs(self) -> tuple[str, ...]:
        """Does what `Extractor.outputs` says."""
        return ("features", "logits")

    @property
    def classes(self) -> int:
        """Does what `Extractor.classes` says."""
        return 10

    def fingerprint(self) -> str:
        """Gives the SHA-256 of the weights file."""
        return _SHA256

    def load(self) -> Params:
        """Gives the weights that come with the package. Raises GenError when the file is missing or altered."""
        try:
            with resources.as_file(resources.files("gen.features").joinpath("digits.safetensors")) as path:
                if hashlib.sha256(path.read_bytes()).hexdigest() != _SHA256:
                    raise GenError(
                        "the digits extractor's weights (gen/features/digits.safetensors) are not those of this "
                        f"version; expected sha256 {_SHA256[:16]}..., install the package again"
                    )
                return {name: jnp.asarray(array) for name, array in arrays.load(path).items()}
        except OSError as error:
            reason = error.strerror or str(error)
            raise GenError(f"cannot read the digits extractor's weights: {reason}; install the package again") from None

    def __call__(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        """Maps images (B, 8, 8, 1) float32 on the 0..255 grid -> "features" (B, 64), "logits" (B, 10) float32.

        Raises GenError for images of another shape.
        """
        if images.shape[1:] != self.image:
            raise GenError(f"the digits extractor takes images of shape (B, 8, 8, 1), got {images.shape}")
        highest = jax.lax.Precision.HIGHEST
        x = images.astype(jnp.float32) / 127.5 - 1
        for i in range(3):
            x = jax.lax.conv_general_dilated(
                x,
                params[f"conv{i}_kernel"],
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=highest,
            )
            x = jax.nn.silu(x + params[f"conv{i}_bias"])
            if i == 1:
                x = x.reshape(-1, 4, 2, 4, 2, x.shape[-1]).max(axis=(2, 4))
        # Averaged over the image, as in the networks of FID: a dense layer here makes features that are so
        # used to digits that a per-class Gaussian of pixels looks almost real to them.
        x = x.mean(axis=(1, 2))
        logits = jnp.dot(x, params["head_kernel"], precision=highest) + params["head_bias"]
        return {"features": (x - params["mean"]) / params["std"], "logits": logits}
