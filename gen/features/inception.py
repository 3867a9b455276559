"""The Inception network behind FID: the graph exported in December 2015, with its quirks.

Against the usual Inception v3 (Szegedy et al. 2016): average pools in the blocks leave the padding out of their
divisor, the last block pools by maximum, there are 1008 outputs, and the batch norms have no scale. Layers carry the
names of the published .pth file. Batch norms are folded into the convolutions, so a layer is a kernel and a bias.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gen.errors import GenError
from gen.features.extractor import in_parts
from gen.features.resize import middle_square, middle_square_host, resize, resize_host
from gen.features.weights import ConvertedWeights
from gen.nn.network import Params

__all__ = ["PUBLISHED", "RESIZES", "SIZE", "Inception", "conv_shapes", "fid_input", "inception", "logits"]

SIZE = 299
_SHORTER, _FILTER = 342, "pil-bilinear"  # torchvision's preprocessing of images for its weights
PUBLISHED = "inception-2015-12-05"  # the identity of the published weights
RESIZES = {"clean": "pil-bicubic", "legacy_tensorflow": "tf1-bilinear", "legacy_pytorch": "torch-bilinear"}
_PART = 4  # images a CPU takes at a time
_HINT = {
    "fid": (
        "get pt_inception-2015-12-05-6726825d.pth from the releases of github.com/mseitzer/pytorch-fid (fid_weights), "
        "or inception-2015-12-05.pt of NVIDIA's stylegan2-ada-pytorch (metrics), and run gen convert inception FILE"
    ),
    "torchvision": "get inception_v3_google-0cc3c7bd.pth of torchvision and run gen convert inception FILE",
}
_STEM = {
    "Conv2d_1a_3x3": (3, 32, 3, 3),
    "Conv2d_2a_3x3": (32, 32, 3, 3),
    "Conv2d_2b_3x3": (32, 64, 3, 3),
    "Conv2d_3b_1x1": (64, 80, 1, 1),
    "Conv2d_4a_3x3": (80, 192, 3, 3),
}
_BLOCKS = {  # block -> (kind, channels in, width of the pool branch (A) or of the 7x7 branches (C))
    "Mixed_5b": ("A", 192, 32),
    "Mixed_5c": ("A", 256, 64),
    "Mixed_5d": ("A", 288, 64),
    "Mixed_6a": ("B", 288, 0),
    "Mixed_6b": ("C", 768, 128),
    "Mixed_6c": ("C", 768, 160),
    "Mixed_6d": ("C", 768, 160),
    "Mixed_6e": ("C", 768, 192),
    "Mixed_7a": ("D", 768, 0),
    "Mixed_7b": ("E", 1280, 0),
    "Mixed_7c": ("E", 2048, 0),
}
Convolve = Callable[..., jax.Array]


def _layout(kind: str, c: int, w: int) -> dict[str, tuple[int, int, int, int]]:
    """Convolutions of a block: branch -> (channels in, out, kernel height, width)."""
    layouts = {
        "A": {
            "branch1x1": (c, 64, 1, 1),
            "branch5x5_1": (c, 48, 1, 1),
            "branch5x5_2": (48, 64, 5, 5),
            "branch3x3dbl_1": (c, 64, 1, 1),
            "branch3x3dbl_2": (64, 96, 3, 3),
            "branch3x3dbl_3": (96, 96, 3, 3),
            "branch_pool": (c, w, 1, 1),
        },
        "B": {
            "branch3x3": (c, 384, 3, 3),
            "branch3x3dbl_1": (c, 64, 1, 1),
            "branch3x3dbl_2": (64, 96, 3, 3),
            "branch3x3dbl_3": (96, 96, 3, 3),
        },
        "C": {
            "branch1x1": (c, 192, 1, 1),
            "branch7x7_1": (c, w, 1, 1),
            "branch7x7_2": (w, w, 1, 7),
            "branch7x7_3": (w, 192, 7, 1),
            "branch7x7dbl_1": (c, w, 1, 1),
            "branch7x7dbl_2": (w, w, 7, 1),
            "branch7x7dbl_3": (w, w, 1, 7),
            "branch7x7dbl_4": (w, w, 7, 1),
            "branch7x7dbl_5": (w, 192, 1, 7),
            "branch_pool": (c, 192, 1, 1),
        },
        "D": {
            "branch3x3_1": (c, 192, 1, 1),
            "branch3x3_2": (192, 320, 3, 3),
            "branch7x7x3_1": (c, 192, 1, 1),
            "branch7x7x3_2": (192, 192, 1, 7),
            "branch7x7x3_3": (192, 192, 7, 1),
            "branch7x7x3_4": (192, 192, 3, 3),
        },
        "E": {
            "branch1x1": (c, 320, 1, 1),
            "branch3x3_1": (c, 384, 1, 1),
            "branch3x3_2a": (384, 384, 1, 3),
            "branch3x3_2b": (384, 384, 3, 1),
            "branch3x3dbl_1": (c, 448, 1, 1),
            "branch3x3dbl_2": (448, 384, 3, 3),
            "branch3x3dbl_3a": (384, 384, 1, 3),
            "branch3x3dbl_3b": (384, 384, 3, 1),
            "branch_pool": (c, 192, 1, 1),
        },
    }
    return layouts[kind]


def conv_shapes() -> dict[str, tuple[int, int, int, int]]:
    """Gives the shape of every convolution: ``Conv2d_1a_3x3`` or ``Mixed_5b/branch1x1`` ... -> (channels in, out,
    height, width).
    """
    inner = {
        f"{block}/{name}": shape
        for block, (kind, channels, width) in _BLOCKS.items()
        for name, shape in _layout(kind, channels, width).items()
    }
    return _STEM | inner


def _convolve(precision: Any) -> Convolve:
    """conv(layer, x): zero padding that keeps the size for stride 1 unless `valid`; bias and ReLU unless `linear`.

    1x1 kernels are matrix products, and unpadded convolutions of stride 1 are padded ones without their border: to
    the last bit the same numbers, two to three times as fast where XLA compiles for a CPU.
    """

    def conv(
        layer: Mapping[str, Any], x: jax.Array, stride: int = 1, valid: bool = False, linear: bool = False
    ) -> jax.Array:
        kernel = layer["kernel"]
        if kernel.shape[:2] == (1, 1):
            x = jnp.dot(x, kernel[0, 0], precision=precision)
        else:
            pads = [(0, 0) if stride > 1 else ((k - 1) // 2, (k - 1) // 2) for k in kernel.shape[:2]]
            x = jax.lax.conv_general_dilated(
                x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision
            )
        if valid:
            x = x[:, 1:-1, 1:-1]
        return x if linear else jax.nn.relu(x + layer["bias"])

    return conv


def _max_pool(x: jax.Array, stride: int = 2) -> jax.Array:
    """3x3, without padding for stride 2, keeping the size for stride 1: one axis after the other, by slices."""
    if stride == 1:
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    for axis in (1, 2):
        last = x.shape[axis] - 3
        shifted = [jax.lax.slice_in_dim(x, i, i + last + 1, stride, axis) for i in range(3)]
        x = jnp.maximum(jnp.maximum(*shifted[:2]), shifted[2])
    return x


def _average_pool(x: jax.Array, fid: bool) -> jax.Array:
    """3x3, stride 1, zero padded; `fid` divides by the number of pixels inside the image, else by 9."""
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))
    ends = [(np.arange(n), n) for n in x.shape[1:3]]
    counts = [np.minimum(i + 1, n - 1) - np.maximum(i - 1, 0) + 1 for i, n in ends]
    return total / (np.outer(*counts)[None, :, :, None].astype(np.float32) if fid else 9)


def _pool_branch(conv: Convolve, layer: Mapping[str, Any], x: jax.Array, fid: bool) -> jax.Array:
    """Average pool and 1x1 convolution, in the cheaper order: they commute."""
    return jax.nn.relu(_average_pool(conv(layer, x, linear=True), fid) + layer["bias"])


def _chain(conv: Convolve, p: Mapping[str, Any], x: jax.Array, *names: str) -> jax.Array:
    for name in names:
        x = conv(p[name], x)
    return x


def _block_a(conv: Convolve, p: Mapping[str, Any], x: jax.Array, fid: bool) -> list[jax.Array]:
    five = _chain(conv, p, x, "branch5x5_1", "branch5x5_2")
    three = _chain(conv, p, x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
    return [conv(p["branch1x1"], x), five, three, _pool_branch(conv, p["branch_pool"], x, fid)]


def _block_b(conv: Convolve, p: Mapping[str, Any], x: jax.Array) -> list[jax.Array]:
    double = _chain(conv, p, x, "branch3x3dbl_1", "branch3x3dbl_2")
    return [conv(p["branch3x3"], x, 2), conv(p["branch3x3dbl_3"], double, 2), _max_pool(x)]


def _block_c(conv: Convolve, p: Mapping[str, Any], x: jax.Array, fid: bool) -> list[jax.Array]:
    seven = _chain(conv, p, x, *(f"branch7x7_{i}" for i in (1, 2, 3)))
    double = _chain(conv, p, x, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)))
    return [conv(p["branch1x1"], x), seven, double, _pool_branch(conv, p["branch_pool"], x, fid)]


def _block_d(conv: Convolve, p: Mapping[str, Any], x: jax.Array) -> list[jax.Array]:
    three = conv(p["branch3x3_2"], conv(p["branch3x3_1"], x), 2)
    seven = _chain(conv, p, x, *(f"branch7x7x3_{i}" for i in (1, 2, 3)))
    return [three, conv(p["branch7x7x3_4"], seven, 2), _max_pool(x)]


def _block_e(conv: Convolve, p: Mapping[str, Any], x: jax.Array, fid: bool, by_maximum: bool) -> list[jax.Array]:
    three = conv(p["branch3x3_1"], x)
    double = _chain(conv, p, x, "branch3x3dbl_1", "branch3x3dbl_2")
    pooled = conv(p["branch_pool"], _max_pool(x, 1)) if by_maximum else _pool_branch(conv, p["branch_pool"], x, fid)
    return [
        conv(p["branch1x1"], x),
        conv(p["branch3x3_2a"], three),
        conv(p["branch3x3_2b"], three),
        conv(p["branch3x3dbl_3a"], double),
        conv(p["branch3x3dbl_3b"], double),
        pooled,
    ]


def _block(
    kind: str, conv: Convolve, p: Mapping[str, Any], x: jax.Array, fid: bool, by_maximum: bool
) -> list[jax.Array]:
    match kind:
        case "A":
            return _block_a(conv, p, x, fid)
        case "B":
            return _block_b(conv, p, x)
        case "C":
            return _block_c(conv, p, x, fid)
        case "D":
            return _block_d(conv, p, x)
        case _:
            return _block_e(conv, p, x, fid, by_maximum)


def inception(
    params: Params,
    x: jax.Array,
    *,
    fid: bool = True,
    taps: Sequence[str] = (),
    precision: Any = jax.lax.Precision.HIGHEST,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Gives the network on normalised images.

    Args:
      params: by layer: ``kernel`` (HWIO) and ``bias``, batch norms folded in.
      x: (B, H, W, 3) float32, normalised; at least 75 pixels a side.
      fid: the graph of 2015; False gives the pools of torchvision's inception_v3.
      taps: stages to return: a layer or block by name, ``MaxPool_1``, ``MaxPool_2``.

    Returns:
      Features (B, 2048), the mean over the last map; and the feature maps (B, h, w, C) of `taps`.

    Raises:
      GenError: images too small for its strides.
    """
    if min(x.shape[1:3]) < 75:
        raise GenError(f"images of {x.shape[1]}x{x.shape[2]} pixels; Inception needs at least 75 a side; enlarge them")
    conv = _convolve(precision)
    found: dict[str, jax.Array] = {}

    def seen(name: str, value: jax.Array) -> jax.Array:
        if name in taps:
            found[name] = value
        return value

    x = seen("Conv2d_1a_3x3", conv(params["Conv2d_1a_3x3"], x, 2))
    x = seen("Conv2d_2a_3x3", conv(params["Conv2d_2a_3x3"], x, valid=True))
    x = seen("Conv2d_2b_3x3", conv(params["Conv2d_2b_3x3"], x))
    x = seen("MaxPool_1", _max_pool(x))
    x = seen("Conv2d_3b_1x1", conv(params["Conv2d_3b_1x1"], x))
    x = seen("Conv2d_4a_3x3", conv(params["Conv2d_4a_3x3"], x, valid=True))
    x = seen("MaxPool_2", _max_pool(x))
    for name, (kind, _, _) in _BLOCKS.items():
        parts = _block(kind, conv, params[name], x, fid, fid and name == "Mixed_7c")
        x = seen(name, jnp.concatenate(parts, axis=-1))
    return x.mean((1, 2)), found


def logits(params: Params, features: jax.Array, *, bias: bool) -> jax.Array:
    """Maps (B, 2048) -> (B, K). The Inception Score is taken without the bias, as in the published evaluators."""
    out = jnp.dot(features, params["fc"]["kernel"], precision=jax.lax.Precision.HIGHEST)
    return out + params["fc"]["bias"] if bias else out


def fid_input(images: jax.Array, mode: str) -> jax.Array:
    """Maps images (B, H, W, 3) float32 on the 0..255 grid -> (B, 299, 299, 3) in [0, 255], by the resize of `mode`."""
    out = resize(images, (SIZE, SIZE), RESIZES[mode])
    return jnp.clip(out, 0, 255) if mode == "clean" else out


@dataclasses.dataclass(frozen=True)
class Inception(ConvertedWeights):
    """The Inception network as evaluation uses it: resize, normalisation and network of one published FID.

    Attributes:
      mode: clean (clean-fid: antialiased bicubic), legacy_tensorflow (the original FID, ADM, EDM, torch-fidelity) or
        legacy_pytorch (pytorch-fid): they differ in resize and normalisation, by a few per cent. torchvision is
        another network, torchvision's weights with their own preprocessing (shorter side to 342 by Pillow's bilinear
        filter, middle square of 299, plain pools): its 1000 classes are in ImageNet's order, so it tells how often
        labelled samples are read as their class; its distances are no FID.
      weights: a file made by ``gen convert inception``; that of the per-user cache by default.
      fast: the device's fast arithmetic (TF32, bfloat16) for monitoring; never for scores that are reported.

    Raises GenError for a mode that is not known.
    """

    modes: ClassVar[tuple[str, ...]] = (*RESIZES, "torchvision")

    mode: Literal["clean", "legacy_tensorflow", "legacy_pytorch", "torchvision"] = "clean"
    weights: str = ""
    fast: bool = False

    def __post_init__(self) -> None:
        if self.mode not in self.modes:
            raise GenError(f"unknown Inception mode '{self.mode}'; expected one of {', '.join(self.modes)}")

    @property
    def fid(self) -> bool:
        """Tells whether it is the network of FID."""
        return self.mode != "torchvision"

    @property
    def name(self) -> str:
        """Does what `ConvertedWeights.name` says."""
        return "inception" if self.fid else "inception-torchvision"

    @property
    def hint(self) -> str:
        """Does what `ConvertedWeights.hint` says."""
        return _HINT["fid" if self.fid else "torchvision"]

    @property
    def resize(self) -> str:
        """Names the resize, which is the mode."""
        return self.mode

    @property
    def precision(self) -> str:
        """Does what `Extractor.precision` says."""
        return "fast" if self.fast else "float32-highest"

    @property
    def outputs(self) -> tuple[str, ...]:
        """Does what `Extractor.outputs` says. The 1008 outputs of FID's network are in an order of their own: no logits
        by label.
        """
        return ("features", "spatial", "unbiased_logits") if self.fid else ("features", "logits")

    @property
    def classes(self) -> int:
        """Does what `Extractor.classes` says."""
        return 0 if self.fid else 1000

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Does what `ConvertedWeights.shapes` says."""
        layers: dict[str, tuple[int, ...]] = {"fc": (2048, 1008 if self.fid else 1000)}
        layers |= {name: (height, width, c, out) for name, (c, out, height, width) in conv_shapes().items()}
        kernels = {f"{name}/kernel": shape for name, shape in layers.items()}
        return kernels | {f"{name}/bias": shape[-1:] for name, shape in layers.items()}

    def fit(self, image: np.ndarray) -> np.ndarray:
        """Gives one image (H, W, 3) of any size resized on the host, float32, as a call takes it as it is: (299, 299,
        3), or (342, 342, 3) whose middle torchvision's network sees.
        """
        if not self.fid:
            return middle_square_host(image, _SHORTER, SIZE, _FILTER)
        return resize_host(image, (SIZE, SIZE), RESIZES[self.mode])

    def __call__(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        """Maps images (B, H, W, 3) float32 on the 0..255 grid -> "features" (B, 2048), and of FID's network "spatial"
        (B, 2023) for sFID (first 7 channels of Mixed_6d, flattened by row, column, channel) and "unbiased_logits" (B,
        1008), of torchvision's "logits" (B, 1000).
        """
        found: dict[str, jax.Array] = in_parts(self._outputs, params, images, _PART)
        return found

    def _outputs(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        x = fid_input(images, self.mode) if self.fid else middle_square(images, _SHORTER, SIZE, _FILTER)
        x = (x - 128) / 128 if self.mode in ("clean", "legacy_tensorflow") else x / 127.5 - 1
        precision = jax.lax.Precision.DEFAULT if self.fast else jax.lax.Precision.HIGHEST
        features, found = inception(params, x, fid=self.fid, taps=("Mixed_6d",), precision=precision)
        if not self.fid:
            return {"features": features, "logits": logits(params, features, bias=True)}
        spatial = found["Mixed_6d"][..., :7].reshape(len(x), -1)
        return {"features": features, "spatial": spatial, "unbiased_logits": logits(params, features, bias=False)}
