"""ConvNeXt weights: torchvision's names of the first version, the transformers library's of the second."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from gen.arrays import unflatten
from gen.errors import GenError
from gen.features.convnext import ConvNeXt
from gen.features.weights import cache_path, store_weights
from gen.pretrained.readers import read_weights
from gen.pretrained.rules import Arrays

__all__ = ["convert", "fold"]

_INNER = {"0": "depthwise", "2": "norm", "3": "expand", "5": "project"}  # torchvision's number within a block
_OUTER = {
    "features.0.0": "stem",
    "features.0.1": "stem_norm",
    "classifier.0": "norm",
    "classifier.2": "classes",
    "convnextv2.embeddings.patch_embeddings": "stem",
    "convnextv2.embeddings.layernorm": "stem_norm",
    "convnextv2.layernorm": "norm",
    "classifier": "classes",
}
_SECOND = {"dwconv": "depthwise", "layernorm": "norm", "pwconv1": "expand", "pwconv2": "project", "grn": "grn"}


def _layer(name: str) -> str | None:
    """Our path of an official layer; None for one that is not known."""
    if name in _OUTER:
        return _OUTER[name]
    if found := re.fullmatch(r"features\.([1357])\.(\d+)\.block\.([0235])", name):
        return f"stage{int(found[1]) // 2}/block{found[2]}/{_INNER[found[3]]}"
    if found := re.fullmatch(r"features\.([246])\.([01])", name):
        return f"down{int(found[1]) // 2}/{'conv' if found[2] == '1' else 'norm'}"
    stage = r"convnextv2\.encoder\.stages\.(\d+)\."
    if found := re.fullmatch(stage + r"layers\.(\d+)\.(dwconv|layernorm|pwconv1|pwconv2|grn)", name):
        return f"stage{found[1]}/block{found[2]}/{_SECOND[found[3]]}"
    if found := re.fullmatch(stage + r"downsampling_layer\.([01])", name):
        return f"down{found[1]}/{'conv' if found[2] == '1' else 'norm'}"
    return None


def fold(weights: Arrays) -> dict[str, Any]:
    """Gives our parameters from an official state dict. Raises GenError for names that are not a ConvNeXt's."""
    params: dict[str, np.ndarray] = {}
    for name, array in weights.items():
        if found := re.fullmatch(r"features\.([1357])\.(\d+)\.layer_scale", name):
            params[f"stage{int(found[1]) // 2}/block{found[2]}/scale"] = array.reshape(-1)
            continue
        official, _, kind = name.rpartition(".")
        layer = _layer(official)
        if layer is None or kind not in ("weight", "bias"):
            raise GenError(f"this is no ConvNeXt: '{name[:60]}' is not known; give torchvision's convnext_small file")
        if kind == "bias":
            params[f"{layer}/bias"] = array.reshape(-1)
        elif array.ndim == 1 or layer.endswith("grn"):
            params[f"{layer}/scale"] = array.reshape(-1)
        else:
            params[f"{layer}/kernel"] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return unflatten({name: np.ascontiguousarray(array, np.float32) for name, array in params.items()})


def convert(source: Path, out: Path | None = None) -> str:
    """Reads torchvision's ConvNeXt-S and keeps it where training looks for it; returns one line on it.

    Args:
      source: .pth or .safetensors with the state dict of ``torchvision.models.convnext_small``.
      out: the .safetensors file to write; that of the per-user cache by default.

    Raises GenError when the file cannot be read, or holds something else.
    """
    network, params = ConvNeXt(), fold(read_weights(source))
    network.check(params, source)
    out = cache_path(network.name) if out is None else out
    identity = store_weights(out, params, origin=source.name)
    return f"{network.name}: identity {identity}; written to {out}"
