"""A second opinion by clean-fid (Parmar et al. 2022) in PyTorch: the same images and weights, none of our arithmetic.

Its resizers, its Inception graph holding our weights, its Frechet and kernel distances. torch and clean-fid are
imported here alone, when asked for; nothing is downloaded.
"""

import dataclasses
import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from gen.arrays import flatten
from gen.errors import GenError
from gen.features.inception import SIZE, Inception
from gen.metrics.protocol import Result
from gen.metrics.reference import Reference
from gen.metrics.sources import QUANTISERS, ImageSet
from gen.nn.network import Params

__all__ = ["Unresized", "features", "pictures", "require", "second_opinion", "state_dict"]

_EPS = 1e-3  # of the graph's batch norms
_BATCH = 16
_SEED = 2020  # of KID's subsets: those of `gen.metrics.kernels.kid`
_DECLARED: list[Any] = []  # torch keeps operators as long as the library object that declared them lives


@dataclasses.dataclass(frozen=True)
class Unresized:
    """Stands in for an extractor where stored images are to be read in their own size, each by itself."""

    name: str = "clean-fid"
    image: tuple[int | None, int | None, int] = (None, None, 3)

    def fit(self, image: np.ndarray) -> np.ndarray:
        """Leaves the image as it is."""
        return image


def require(extractor: Any) -> None:
    """Imports torch and clean-fid. Raises GenError when they are missing, or for a network clean-fid does not have."""
    if not isinstance(extractor, Inception) or not extractor.fid or extractor.fast:
        raise GenError(
            f"clean-fid has no network {extractor.name} ({extractor.precision}); expected --extractor inception, "
            "inception:legacy_tensorflow or inception:legacy_pytorch; choose one of them"
        )
    try:
        importlib.import_module("torch")
        _import_torchvision()
        importlib.import_module("cleanfid.fid")
    except ImportError as error:
        raise GenError(
            f"the backend cleanfid needs torch and clean-fid ({error}); install the torch build you want with the "
            'torchvision that belongs to it, then pip install "gen-image[cleanfid]"'
        ) from None


def _import_torchvision() -> None:
    """Also where torch is a CPU build and torchvision is not, which then lacks operators that clean-fid has no use for.

    Declaring them without an implementation lets the import pass.
    """
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)
        importlib.import_module("torchvision")


def state_dict(params: Params) -> dict[str, np.ndarray]:
    """Gives our folded weights under the names of the .pth file: kernels OIHW float32, batch norms that only add the
    bias.
    """
    weights: dict[str, np.ndarray] = {}
    for name, array in flatten(params).items():
        layer, _, part = name.rpartition("/")
        path, value = layer.replace("/", "."), np.asarray(array, np.float32)
        if layer == "fc":
            weights[f"fc.{'weight' if part == 'kernel' else 'bias'}"] = value.T
        elif part == "kernel":
            weights[f"{path}.conv.weight"] = value.transpose(3, 2, 0, 1)
        else:
            weights |= {f"{path}.bn.bias": value, f"{path}.bn.running_mean": np.zeros_like(value)}
            weights |= {
                f"{path}.bn.weight": np.ones_like(value),
                f"{path}.bn.running_var": np.full_like(value, 1 - _EPS),
            }
    return weights


def pictures(source: ImageSet, count: int) -> Iterator[np.ndarray]:
    """Gives the first `count` images of a source, one by one: (H, W, 3) uint8, quantised as for evaluation.

    Stored images have to come from a source opened for `Unresized`.
    """
    made = jax.jit(source.function)
    quantise = QUANTISERS.get(source.quantiser, lambda x: x)
    for start in range(0, count, _BATCH if source.read is None else 1):
        rows = np.arange(start, min(start + _BATCH, count) if source.read is None else start + 1)
        found: Mapping[str, Any] = source.read(rows) if source.read else made(source.arguments, jnp.asarray(rows))
        images = found["levels"] if "levels" in found else found["image"]
        integers = "levels" in found or images.dtype == np.uint8
        levels = np.asarray(images if integers else quantise(jnp.asarray(images))).astype(np.uint8)
        yield from np.broadcast_to(levels, (*levels.shape[:3], 3))


def features(images: Iterable[np.ndarray], extractor: Inception, params: Params) -> np.ndarray:
    """Gives features (N, 2048) float32 of images (H, W, 3) uint8 by clean-fid's resizer and its network with our
    weights.

    Raises GenError: see `require`.
    """
    require(extractor)
    import torch
    from cleanfid.resize import build_resizer

    network, resizer = _network(extractor.mode, params), build_resizer(extractor.mode)
    rows, waiting = [], list[np.ndarray]()
    inside = extractor.mode == "legacy_tensorflow"  # the resize is part of the network there

    def run() -> None:
        batch = torch.from_numpy(np.stack(waiting).astype(np.float32).transpose(0, 3, 1, 2))
        with torch.no_grad():
            rows.append(network(_tensorflow_resize(batch) if inside else batch).numpy())
        waiting.clear()

    for image in images:
        if waiting and (len(waiting) == _BATCH or (inside and image.shape != waiting[0].shape)):
            run()
        waiting.append(np.asarray(resizer(np.ascontiguousarray(image))))
    run()
    return np.concatenate(rows)


def _network(mode: str, params: Params) -> Any:
    """Images (B, 3, 299, 299) in [0, 255] to features (B, 2048): clean-fid's graph with our weights."""
    import torch
    from cleanfid import inception_pytorch

    weights = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in state_dict(params).items()}
    with mock.patch.object(inception_pytorch, "load_state_dict_from_url", return_value=weights):
        graph = inception_pytorch.InceptionV3(resize_input=False, normalize_input=False).eval()
    if mode == "legacy_pytorch":
        return lambda x: graph(x / 255 * 2 - 1)[0].flatten(1)
    return lambda x: graph((x - 128) / 128)[0].flatten(1)


def _tensorflow_resize(images: Any) -> Any:
    """TensorFlow 1's bilinear resize of (B, 3, H, W) to 299 a side by grid sampling, as inside the published network:

    source coordinate i * in / out, which is the grid of pixel centres moved by 1 / in - 1 / out."""
    from torch.nn import functional

    height, width = images.shape[2:]
    move = images.new_tensor([[1, 0, 1 / width - 1 / SIZE], [0, 1, 1 / height - 1 / SIZE]])
    size = [len(images), 3, SIZE, SIZE]
    grid = functional.affine_grid(move.expand(len(images), 2, 3), size, align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def second_opinion(result: Result, samples: ImageSet, real: ImageSet | Reference, extractor: Inception) -> Result:
    """Gives a result with clean-fid's values beside ours: ``cleanfid_frechet_distance``, and ``cleanfid_kid`` where KID
    is.

    Args:
      result: of these samples.
      samples: opened for `Unresized`, or a generator.
      real: the real images, opened so as well; a reference gives its stored statistics where there are none.
      extractor: the network of both.

    Raises:
      GenError: see `require`; images that cannot be read.
    """
    require(extractor)
    from cleanfid import fid

    params = extractor.load()
    fake = features(pictures(samples, result.protocol.count), extractor, params)
    rows = features(pictures(real, real.count), extractor, params) if isinstance(real, ImageSet) else real.features
    mean, covariance = _moments(rows) if isinstance(real, ImageSet) else (real.mean, real.covariance)
    values = {"cleanfid_frechet_distance": fid.frechet_distance(*_moments(fake), mean, covariance)}
    if "kid" in result.values:
        limit = result.protocol.neighbour_limit
        before = np.random.get_state()
        np.random.seed(_SEED)  # clean-fid draws from NumPy's global generator, from its second set first
        values["cleanfid_kid"] = fid.kernel_distance(*(np.asarray(x[:limit], np.float64) for x in (fake, rows)))
        np.random.set_state(before)
    used = {name: metadata.version(name) for name in ("clean-fid", "torch")}
    return dataclasses.replace(
        result,
        values={**result.values, **{name: float(value) for name, value in values.items()}},
        versions={**result.versions, **used},
    )


def _moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows.mean(0), np.cov(rows, rowvar=False)
