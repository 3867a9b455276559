"""ResNet-50 (He et al. 2016, arXiv 1512.03385) with batch norms folded in, for losses on its class logits."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from gen.features.classifier import CLASSES, SIDE, ImageNetClassifier, kernels_and_biases
from gen.features.resize import resize
from gen.features.vit import DEVIATION, MEAN
from gen.nn.convolution import convolution
from gen.nn.network import Params

__all__ = ["DEPTHS", "ResNet", "conv_shapes", "resnet"]

DEPTHS = (3, 4, 6, 3)  # bottlenecks of the four stages
_WIDTH = 2048


def conv_shapes(depths: tuple[int, ...] = DEPTHS) -> dict[str, tuple[int, int, int, int]]:
    """Gives the kernel (height, width, inputs, outputs) of every convolution: "stem", "stage0/block0/conv1" ..."""
    shapes, inputs = {"stem": (7, 7, 3, 64)}, 64
    for i, depth in enumerate(depths):
        width = 64 * 2**i
        for j in range(depth):
            block = f"stage{i}/block{j}"
            shapes[f"{block}/conv1"] = (1, 1, inputs, width)
            shapes[f"{block}/conv2"] = (3, 3, width, width)
            shapes[f"{block}/conv3"] = (1, 1, width, 4 * width)
            if j == 0:
                shapes[f"{block}/skip"] = (1, 1, inputs, 4 * width)
            inputs = 4 * width
    return shapes


def _conv(layer: Mapping[str, Any], x: jax.Array, stride: int = 1) -> jax.Array:
    return convolution(x, layer["kernel"], stride=stride) + layer["bias"]


def _bottleneck(block: Mapping[str, Any], x: jax.Array, stride: int) -> jax.Array:
    """1x1, 3x3 with the stride, 1x1, and the input beside them."""
    y = jax.nn.relu(_conv(block["conv2"], jax.nn.relu(_conv(block["conv1"], x)), stride))
    return jax.nn.relu(_conv(block["conv3"], y) + (_conv(block["skip"], x, stride) if "skip" in block else x))


def resnet(params: Params, x: jax.Array) -> jax.Array:
    """Gives the mean over positions (B, width) of images x (B, H, W, 3) with ImageNet's mean and deviation removed."""
    x = jax.nn.relu(_conv(params["stem"], x, 2))
    pads = ((0, 0), (1, 1), (1, 1), (0, 0))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads)
    for i in range(sum(name.startswith("stage") for name in params)):
        stage = params[f"stage{i}"]
        for j in range(len(stage)):
            x = _bottleneck(stage[f"block{j}"], x, 2 if i and not j else 1)
    return x.mean((1, 2))


@dataclasses.dataclass(frozen=True)
class ResNet(ImageNetClassifier):
    """The class logits of ResNet-50, a perceptual network of token-based tokenizers (MaskGIT, the first TiTok).

    Images are resized to 224 x 224 bilinearly with antialiasing, whatever their shape.
    """

    filter: ClassVar[str] = "pil-bilinear"

    @property
    def name(self) -> str:
        """Does what `Converted.name` says."""
        return "resnet-50"

    @property
    def hint(self) -> str:
        """Does what `Converted.hint` says."""
        return "get torchvision's resnet50-0676ba61.pth and run gen convert resnet FILE"

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Does what `Converted.shapes` says."""
        return kernels_and_biases({**conv_shapes(), "classes": (_WIDTH, CLASSES)})

    def features_and_logits(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        """Does what `ImageNetClassifier.features_and_logits` says."""
        x = resize(images / 255.0, (SIDE, SIDE), self.filter)
        with jax.default_matmul_precision("highest"):
            features = resnet(params, (x - jnp.asarray(MEAN)) / jnp.asarray(DEVIATION))
            logits = features @ params["classes"]["kernel"] + params["classes"]["bias"]
        return {"features": features, "logits": logits}
