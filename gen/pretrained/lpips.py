"""LPIPS networks from files of the official package: the whole state dict of ``lpips.LPIPS(net=...)``."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from gen.arrays import unflatten
from gen.errors import GenError
from gen.features.lpips import SCALE, SHIFT
from gen.features.weights import cache_path, store_weights
from gen.pretrained.readers import read_weights
from gen.pretrained.rules import Arrays

__all__ = ["convert", "fold"]

_LAYER = re.compile(r"net\.(slice\d+)\.(\d+)(?:\.(squeeze|expand1x1|expand3x3))?\.(weight|bias)")
_HEAD = re.compile(r"(lin\d+)\.model\.1\.weight")
_SLICES = {"vgg": 5, "alex": 5, "squeeze": 7}


def fold(weights: Arrays) -> tuple[str, dict[str, Any]]:
    """Gives (trunk, parameters) from an official state dict; kernels HWIO, heads (C,).

    Raises GenError for arrays that are missing, unknown or do not fit each other, and for another input scaling (that
    of version 0.0 is none).
    """
    params: dict[str, np.ndarray] = {}
    for name, array in weights.items():
        layer, head = _LAYER.fullmatch(name), _HEAD.fullmatch(name)
        if layer:
            place = "/".join(part for part in layer.groups()[:3] if part)
            kernel = layer[4] == "weight"
            params[f"net/{place}/{'kernel' if kernel else 'bias'}"] = array.transpose(2, 3, 1, 0) if kernel else array
        elif head:
            params[head[1]] = array.reshape(-1)
        elif name in ("scaling_layer.shift", "scaling_layer.scale"):
            wanted = SHIFT if name.endswith("shift") else SCALE
            if array.size != 3 or not np.allclose(array.ravel(), wanted, atol=1e-6):
                raise GenError(f"the {name} of this LPIPS file is not that of version 0.1; save LPIPS(version='0.1')")
        elif not name.startswith("lins."):  # the package holds its heads twice
            raise GenError(
                f"this is no LPIPS network: '{name[:60]}' is not known; save lpips.LPIPS(net=...).state_dict()"
            )
    net = _trunk(weights)
    lacking = [f"lin{i}" for i in range(_SLICES[net]) if f"lin{i}" not in params]
    lacking += [f"slice{i}" for i in range(1, _SLICES[net] + 1) if not any(f"/slice{i}/" in name for name in params)]
    if lacking:
        raise GenError(
            f"this LPIPS file lacks {', '.join(lacking[:4])}; save the whole lpips.LPIPS(net=...).state_dict()"
        )
    return net, unflatten({name: np.ascontiguousarray(array, np.float32) for name, array in params.items()})


def _trunk(weights: Arrays) -> str:
    first = weights.get("net.slice1.0.weight")
    if first is None:
        raise GenError("this file has no LPIPS trunk (net.slice1.0.weight); save lpips.LPIPS(net=...).state_dict()")
    if "net.slice2.3.squeeze.weight" in weights:
        return "squeeze"
    return "alex" if first.shape[-1] == 11 else "vgg"


def convert(source: Path, out: Path | None = None) -> str:
    """Reads an LPIPS network and keeps it where evaluation and training look for it; returns one line on it.

    Args:
      source: .pth or .safetensors with the state dict of ``lpips.LPIPS(net=...)``, which the package puts together
        from torchvision's trunk and its own heads.
      out: the .safetensors file to write; ``lpips-vgg`` (``-alex``, ``-squeeze``) of the per-user cache by default.

    Raises GenError when the file cannot be read, or holds something else.
    """
    net, params = fold(read_weights(source))
    out = cache_path(f"lpips-{net}") if out is None else out
    identity = store_weights(out, params, origin=source.name)
    return f"lpips-{net}: identity {identity}; written to {out}"
