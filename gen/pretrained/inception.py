"""The Inception network of FID from the files it is published in, under three sets of names.

The .pth of pytorch-fid and torch-fidelity, the TorchScript file of stylegan2-ada and pickles of it (names of the
graph), the variables of the original TensorFlow graph, and torchvision's own inception_v3.
"""

import hashlib
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gen.arrays import unflatten
from gen.errors import GenError
from gen.features.inception import PUBLISHED, conv_shapes
from gen.features.weights import cache_path, store_weights
from gen.pretrained.nvidia_pickle import CLASS
from gen.pretrained.readers import read_weights
from gen.pretrained.rules import Arrays

__all__ = ["SHA256", "convert", "fold", "graph_name"]

# SHA-256 of the files in which the network of December 2015 is published
SHA256 = {
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": "pt_inception-2015-12-05-6726825d.pth",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4": "inception-2015-12-05.pt",
}
_EPS = 1e-3
# in order: the graph calls them conv, conv_1 ... and mixed, mixed_1 ...
_LAYERS = tuple(name for name in conv_shapes() if "/" not in name)
_BLOCKS = tuple(dict.fromkeys(name.partition("/")[0] for name in conv_shapes() if "/" in name))


class _Layout(NamedTuple):
    """Official names: of a layer's arrays, and of the last layer's."""

    kernel: Callable[[str], str]
    beta: Callable[[str], str]
    gamma: Callable[[str], str] | None
    mean: Callable[[str], str]
    variance: Callable[[str], str]
    head: tuple[str, str]
    transposed: bool  # whether kernels are OIHW and the head (out, in)


def graph_name(layer: str) -> str:
    """Gives the name of a layer of ours in the graph of 2015: ``Mixed_5c/branch3x3dbl_2`` ->
    ``mixed_1/tower_1/conv_1``.
    """
    block, _, branch = layer.partition("/")
    if not branch:
        return _numbered("conv", _LAYERS.index(block))
    place = _numbered("mixed", _BLOCKS.index(block))
    found = re.fullmatch(r"(branch\w*?)(?:_(\d)([ab]?))?", branch)
    assert found is not None
    head, number, letter = found.groups()
    if number is None:
        return f"{place}/tower_2/conv" if head == "branch_pool" else f"{place}/conv"
    second = head in ("branch3x3dbl", "branch7x7dbl", "branch7x7x3") and block != "Mixed_6a"
    tower = f"{place}/tower_1" if second else f"{place}/tower"
    return (
        f"{tower}/mixed/{_numbered('conv', 'ab'.index(letter))}"
        if letter
        else f"{tower}/{_numbered('conv', int(number) - 1)}"
    )


def _numbered(name: str, index: int) -> str:
    return f"{name}_{index}" if index else name


def _script_name(layer: str) -> str:
    """The same in the TorchScript module, which flattens the towers of the last two blocks."""
    place, _, rest = graph_name(layer).partition("/")
    flat = rest.replace("/", "_" if place in ("mixed_9", "mixed_10") else ".")
    return f"layers.{place}.{flat}" if rest else f"layers.{place}"


def _torch(part: str) -> Callable[[str], str]:
    return lambda layer: f"{layer.replace('/', '.')}.{part}"


def _script(part: str) -> Callable[[str], str]:
    return lambda layer: f"{_script_name(layer)}.{part}"


def _graph(part: str) -> Callable[[str], str]:
    return lambda layer: f"{graph_name(layer)}/{part}"


_LAYOUTS = (
    _Layout(
        kernel=_torch("conv.weight"),
        beta=_torch("bn.bias"),
        gamma=_torch("bn.weight"),
        mean=_torch("bn.running_mean"),
        variance=_torch("bn.running_var"),
        head=("fc.weight", "fc.bias"),
        transposed=True,
    ),
    _Layout(
        kernel=_script("weight"),
        beta=_script("beta"),
        gamma=None,
        mean=_script("mean"),
        variance=_script("var"),
        head=("output.weight", "output.bias"),
        transposed=True,
    ),
    _Layout(
        kernel=_graph("conv2d_params"),
        beta=_graph("batchnorm/beta"),
        gamma=_graph("batchnorm/gamma"),
        mean=_graph("batchnorm/moving_mean"),
        variance=_graph("batchnorm/moving_variance"),
        head=("softmax/weights", "softmax/biases"),
        transposed=False,
    ),
)


def fold(weights: Arrays) -> dict[str, Any]:
    """Gives our parameters from a state dict under any of the known names: batch norms folded in float64, kernels HWIO.

    Raises GenError naming the first differences when the names or shapes are not those of the network.
    """
    weights = {name.removesuffix(":0"): array for name, array in weights.items()}
    for layout in _LAYOUTS:
        first = layout.kernel("Conv2d_1a_3x3")
        prefix = next((n.removesuffix(first) for n in weights if n == first or n.endswith(f".{first}")), None)
        if prefix is not None:
            return _folded(weights, layout, prefix)
    names = ", ".join(sorted(weights)[:3])
    raise GenError(
        f"this is no Inception network (its names begin {names}); give the .pth of pytorch-fid, the TorchScript file "
        "of stylegan2-ada, or an npz of the TensorFlow graph"
    )


def _folded(weights: Arrays, layout: _Layout, prefix: str) -> dict[str, Any]:
    take = _Taker(weights, prefix)
    params: dict[str, Any] = {}
    for layer, (channels, out, height, width) in conv_shapes().items():
        kernel = take(layout.kernel(layer), (out, channels, height, width), layout.transposed, (2, 3, 1, 0))
        beta, mean, variance = (take(f(layer), (out,)) for f in (layout.beta, layout.mean, layout.variance))
        gamma = np.ones(out) if layout.gamma is None else take(layout.gamma(layer), (out,))
        if take.clean:
            scale = gamma / np.sqrt(variance + _EPS)
            params[f"{layer}/kernel"] = (kernel * scale).astype(np.float32)
            params[f"{layer}/bias"] = (beta - mean * scale).astype(np.float32)
    classes = np.size(weights.get(prefix + layout.head[1], 0))
    params["fc/kernel"] = take(layout.head[0], (classes, 2048), layout.transposed, (1, 0)).astype(np.float32)
    params["fc/bias"] = take(layout.head[1], (classes,)).astype(np.float32)
    take.check()
    return unflatten(params)


class _Taker:
    """Takes arrays by official name and keeps account of what is missing, misshaped or left over."""

    def __init__(self, weights: Arrays, prefix: str) -> None:
        self.weights, self.prefix = weights, prefix
        self.taken: set[str] = set()
        self.wrong: list[str] = []

    @property
    def clean(self) -> bool:
        return not self.wrong

    def __call__(
        self, name: str, shape: tuple[int, ...], transposed: bool = True, axes: tuple[int, ...] | None = None
    ) -> np.ndarray:
        """The array as float64 in our layout; `shape` is that of torch, `axes` turn it into ours."""
        wanted = shape if transposed or axes is None else tuple(shape[a] for a in axes)
        found = self.weights.get(self.prefix + name)
        self.taken.add(self.prefix + name)
        if found is None or found.shape != wanted:
            self.wrong.append(f"{name} is {'missing' if found is None else f'{found.shape} for {wanted}'}")
            found = np.zeros(wanted)
        array = np.asarray(found, np.float64)
        return array.transpose(axes) if transposed and axes is not None else array

    def check(self) -> None:
        """Raises GenError with what does not fit."""
        idle = ("AuxLogits", "num_batches_tracked", CLASS)  # torchvision's training head, counters, names of classes
        left = [n for n in self.weights if n not in self.taken and not any(word in n for word in idle)]
        foreign = [n for n in left if not n.startswith(self.prefix) or self.weights[n].ndim]
        wrong = self.wrong + [f"{name} is not known" for name in sorted(foreign)]
        if wrong:
            more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise GenError(f"this is not the Inception network of FID: {'; '.join(wrong[:3])}{more}; give another file")


def _read(path: Path) -> Mapping[str, np.ndarray]:
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise GenError(f"{path} cannot be read as an npz ({error}); give the network's file") from None
    return read_weights(path)


def convert(source: Path, out: Path | None = None) -> str:
    """Reads the network from a published file and keeps it where evaluation looks for it; returns one line on it.

    Args:
      source: .pth, TorchScript .pt, .pkl of modules, .safetensors, .npz (names of the TensorFlow graph).
      out: the .safetensors file to write; that of the per-user cache by default.
    Raises GenError when the file cannot be read, or holds something else.
    """
    params = fold(_read(source))
    classes = len(params["fc"]["bias"])
    if classes not in (1008, 1000):
        raise GenError(f"{source} has {classes} classes; expected 1008 (FID) or 1000 (torchvision); give another file")
    known = hashlib.sha256(source.read_bytes()).hexdigest() in SHA256
    name = "inception" if classes == 1008 else "inception-torchvision"
    out = cache_path(name) if out is None else out
    identity = store_weights(out, params, origin=source.name, published=PUBLISHED if known else "")
    verdict = "verified as the published network" if known else f"not one of the published files, identity {identity}"
    return f"{name}: {verdict}; written to {out}"
