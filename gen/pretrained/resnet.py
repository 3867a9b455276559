"""ResNet-50 from torchvision's state dict."""

from pathlib import Path
from typing import Any

import numpy as np

from gen.arrays import unflatten
from gen.errors import GenError
from gen.features.resnet import DEPTHS, ResNet, conv_shapes
from gen.features.weights import cache_path, store_weights
from gen.pretrained.readers import read_weights
from gen.pretrained.rules import Arrays

__all__ = ["convert", "fold"]

_EPS = 1e-5
_PARTS = ("weight", "bias", "running_mean", "running_var")


def _official(layer: str) -> tuple[str, str]:
    """(convolution, batch norm) of a layer of ours: "stage0/block2/conv1" -> layer1.2.conv1, layer1.2.bn1."""
    if layer == "stem":
        return "conv1", "bn1"
    stage, block, name = layer.split("/")
    prefix = f"layer{int(stage.removeprefix('stage')) + 1}.{block.removeprefix('block')}"
    if name == "skip":
        return f"{prefix}.downsample.0", f"{prefix}.downsample.1"
    return f"{prefix}.{name}", f"{prefix}.bn{name[-1]}"


def fold(weights: Arrays, depths: tuple[int, ...] = DEPTHS) -> dict[str, Any]:
    """Gives our parameters from the official state dict: batch norms folded in float64, kernels HWIO.

    Raises GenError naming the first arrays that are missing or unknown.
    """
    layers = {layer: _official(layer) for layer in conv_shapes(depths)}
    wanted = {"fc.weight", "fc.bias", *(f"{conv}.weight" for conv, _ in layers.values())}
    wanted |= {f"{norm}.{part}" for _, norm in layers.values() for part in _PARTS}
    given = {name for name in weights if not name.endswith("num_batches_tracked")}
    wrong = [f"{name} is missing" for name in sorted(wanted - given)]
    wrong += [f"{name} is not known" for name in sorted(given - wanted)]
    if wrong:
        raise GenError(f"this is not ResNet-50: {'; '.join(wrong[:3])}; give torchvision's resnet50 file")
    params: dict[str, np.ndarray] = {"classes/kernel": weights["fc.weight"].T, "classes/bias": weights["fc.bias"]}
    for layer, (conv, norm) in layers.items():
        gamma, beta, mean, variance = (np.asarray(weights[f"{norm}.{part}"], np.float64) for part in _PARTS)
        scale = gamma / np.sqrt(variance + _EPS)
        params[f"{layer}/kernel"] = np.asarray(weights[f"{conv}.weight"], np.float64).transpose(2, 3, 1, 0) * scale
        params[f"{layer}/bias"] = beta - mean * scale
    return unflatten({name: np.ascontiguousarray(array, np.float32) for name, array in params.items()})


def convert(source: Path, out: Path | None = None) -> str:
    """Reads torchvision's ResNet-50 and keeps it where training looks for it; returns one line on it.

    Args:
      source: .pth or .safetensors with the state dict of ``torchvision.models.resnet50``.
      out: the .safetensors file to write; that of the per-user cache by default.

    Raises GenError when the file cannot be read, or holds something else.
    """
    network, params = ResNet(), fold(read_weights(source))
    network.check(params, source)
    out = cache_path(network.name) if out is None else out
    identity = store_weights(out, params, origin=source.name)
    return f"{network.name}: identity {identity}; written to {out}"
