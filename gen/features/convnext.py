"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545) and its second version (Woo et al. 2023, arXiv 2301.00808).

What a published network has is read off its parameters: depths, widths, and whether a block ends with a learned scale
(LayerScale, the first version) or normalises its hidden channels globally (GRN, the second).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from gen.features.classifier import CLASSES, SIDE, ImageNetClassifier
from gen.features.resize import resize
from gen.features.vit import DEVIATION, MEAN
from gen.nn.layers import layer_norm
from gen.nn.network import Params

__all__ = ["SMALL", "ConvNeXt", "convnext"]

# (depths, widths) of the four stages of ConvNeXt-S
SMALL = ((3, 3, 27, 3), (96, 192, 384, 768))


def _norm(layer: Mapping[str, Any], x: jax.Array) -> jax.Array:
    return layer_norm(x, 1e-6) * layer["scale"] + layer["bias"]


def _patches(layer: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """A convolution whose stride is its kernel's side."""
    stride = layer["kernel"].shape[0]
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, layer["kernel"], (stride, stride), "VALID", dimension_numbers=numbers)
    return y + layer["bias"]


def _depthwise(layer: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """7x7 on each channel."""
    numbers, channels = ("NHWC", "HWIO", "NHWC"), x.shape[-1]
    y = jax.lax.conv_general_dilated(
        x, layer["kernel"], (1, 1), ((3, 3), (3, 3)), dimension_numbers=numbers, feature_group_count=channels
    )
    return y + layer["bias"]


def _dense(layer: Mapping[str, Any], x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


def _block(block: Mapping[str, Any], x: jax.Array) -> jax.Array:
    y = jax.nn.gelu(_dense(block["expand"], _norm(block["norm"], _depthwise(block["depthwise"], x))), approximate=False)
    if "grn" in block:
        lengths = jnp.sqrt(jnp.square(y).sum((1, 2), keepdims=True) + 1e-6)
        share = lengths / (lengths.mean(-1, keepdims=True) + 1e-6)
        y = block["grn"]["scale"] * (y * share) + block["grn"]["bias"] + y
    y = _dense(block["project"], y)
    return x + (y if "grn" in block else block["scale"] * y)


def convnext(params: Params, x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Gives the normalised mean over positions (B, width) of images x (B, H, W, 3) as the network takes them.

    Args:
      params: as `gen.pretrained.convnext.fold` makes them.

    Returns:
      the features, and the maps (B, h, w, C) after each stage.
    """
    x = _norm(params["stem_norm"], _patches(params["stem"], x))
    maps = []
    for i in range(sum(name.startswith("stage") for name in params)):
        if i:
            down = params[f"down{i}"]
            x = _patches(down["conv"], _norm(down["norm"], x))
        stage = params[f"stage{i}"]
        for j in range(len(stage)):
            x = _block(stage[f"block{j}"], x)
        maps.append(x)
    return _norm(params["norm"], x.mean((1, 2))), maps


@dataclasses.dataclass(frozen=True)
class ConvNeXt(ImageNetClassifier):
    """The class logits of ConvNeXt-S, TiTok's perceptual network (Yu et al. 2024, arXiv 2406.07550).

    Images are resized to 224 x 224 bilinearly with antialiasing, whatever their shape.
    """

    filter: ClassVar[str] = "pil-bilinear"

    @property
    def name(self) -> str:
        """Does what `Converted.name` says."""
        return "convnext-small"

    @property
    def hint(self) -> str:
        """Does what `Converted.hint` says."""
        return "get torchvision's convnext_small-0c510722.pth and run gen convert convnext FILE"

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Does what `Converted.shapes` says."""
        return _shapes(*SMALL)

    def features_and_logits(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        """Does what `ImageNetClassifier.features_and_logits` says."""
        x = resize(images / 255.0, (SIDE, SIDE), self.filter)
        x = (x - jnp.asarray(MEAN)) / jnp.asarray(DEVIATION)
        with jax.default_matmul_precision("highest"):
            features, _ = convnext(params, x)
            return {"features": features, "logits": _dense(params["classes"], features)}


def _shapes(depths: tuple[int, ...], widths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Every array of a network of the first version, by path."""

    def layer(path: str, *shape: int) -> dict[str, tuple[int, ...]]:
        return {f"{path}/kernel": shape, f"{path}/bias": shape[-1:]}

    def norm(path: str, width: int) -> dict[str, tuple[int, ...]]:
        return {f"{path}/scale": (width,), f"{path}/bias": (width,)}

    found = layer("stem", 4, 4, 3, widths[0]) | norm("stem_norm", widths[0])
    for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        if i:
            found |= norm(f"down{i}/norm", widths[i - 1]) | layer(f"down{i}/conv", 2, 2, widths[i - 1], width)
        for j in range(depth):
            block = f"stage{i}/block{j}"
            found |= layer(f"{block}/depthwise", 7, 7, 1, width) | norm(f"{block}/norm", width)
            found |= layer(f"{block}/expand", width, 4 * width) | layer(f"{block}/project", 4 * width, width)
            found[f"{block}/scale"] = (width,)
    return found | norm("norm", widths[-1]) | layer("classes", widths[-1], CLASSES)
