"""Published reference statistics as `gen.metrics.reference.Reference`, with the protocol they were computed under.

The files themselves say little: what is known of each publisher stands here, the rest must be said by the user.
"""

import hashlib
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gen.config import suggest
from gen.errors import GenError
from gen.features.extractor import Extractor
from gen.features.inception import PUBLISHED
from gen.metrics.protocol import Protocol
from gen.metrics.reference import Reference
from gen.pretrained.pickles import read_pickle

__all__ = ["PUBLISHERS", "read_published"]


class _Publisher(NamedTuple):
    mode: str  # how images reached the Inception network
    split: str  # of the data; "" where files differ
    what: str


PUBLISHERS: dict[str, _Publisher] = {
    "adm": _Publisher("legacy_tensorflow", "train", "VIRTUAL_*.npz of guided-diffusion"),
    "mar": _Publisher("legacy_tensorflow", "train", "adm_in256_stats.npz of MAR: mean and covariance of ADM's file"),
    "edm": _Publisher("legacy_tensorflow", "train", "fid-refs of EDM"),
    "edm2": _Publisher("legacy_tensorflow", "train", "dataset-refs of EDM2, a pickle"),
    "pytorch-fid": _Publisher("legacy_pytorch", "", "statistics saved by pytorch-fid"),
    "clean-fid": _Publisher("", "", "statistics of clean-fid, whose names tell the mode"),
}
_CLEAN_NAME = re.compile(
    r"(?P<data>.+?)_(?P<mode>clean|legacy_tensorflow|legacy_pytorch)_(?P<split>[^_]+)_(?P<size>\w+)"
)


def read_published(
    path: str | Path,
    publisher: str | None = None,
    *,
    name: str = "",
    split: str = "",
    network: Extractor | None = None,
) -> Reference:
    """Gives the statistics in a published file.

    Args:
      path: .npz, or .pkl of EDM2 (nothing in it is executed).
      publisher: a name in `PUBLISHERS`; found by the content or the file's name where these tell.
      name: of the data, for tables; the file's name by default.
      split: which part of the data they are of; what is known of the publisher's files by default.
      network: DINOv2 at its published weights, for the statistics of its features in EDM2's files; Inception's without.

    Returns:
      A reference without features, but for clean-fid's with their ``_kid.npz`` beside. Its protocol names the published
      Inception weights (or those of `network`), and has the number of images where the file tells it.

    Raises:
      GenError: an unreadable file, one without statistics, or one whose publisher must be said.
    """
    path = Path(path)
    arrays = _arrays(path, "fid" if network is None else "fd_dinov2")
    publisher = _publisher(path, arrays) if publisher is None else publisher
    if publisher not in PUBLISHERS:
        raise GenError(f"unknown publisher '{publisher}'; {suggest(publisher, PUBLISHERS)}")
    mean, covariance = _moments(path, arrays, "mu", "sigma")
    named = _CLEAN_NAME.fullmatch(path.stem)
    if publisher == "clean-fid" and named is None:
        raise GenError(f"the name of {path} does not tell its mode; expected DATA_MODE_SPLIT_SIZE.npz; rename it")
    mode = named["mode"] if publisher == "clean-fid" and named else PUBLISHERS[publisher].mode
    protocol = Protocol(
        extractor="inception" if network is None else network.name,
        extractor_fingerprint=PUBLISHED if network is None else network.fingerprint(),
        count=int(arrays.get("num_images", 0)),
        resize=mode if network is None else network.resize,
        quantiser="given",
        split=split or (named["split"] if publisher == "clean-fid" and named else PUBLISHERS[publisher].split),
    )
    return Reference(
        name=name or path.stem,
        mean=mean,
        covariance=covariance,
        features=_features(path, mean.size) if publisher == "clean-fid" else np.zeros((0, mean.size), np.float32),
        protocol=protocol,
        identity=f"{publisher} {path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}",
        spatial=_moments(path, arrays, "mu_s", "sigma_s") if "mu_s" in arrays else None,
    )


def _arrays(path: Path, entry: str) -> dict[str, Any]:
    try:
        if path.suffix == ".pkl":
            return _edm2(path, entry)
        if entry != "fid":
            raise GenError(f"{path} holds statistics of Inception features; leave --extractor out, or make a reference")
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files if key in ("mu", "sigma", "mu_s", "sigma_s")}
    except FileNotFoundError:
        raise GenError(f"no reference at {path}; check the path") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise GenError(f"{path} cannot be read as reference statistics ({error}); download it again") from None


def _edm2(path: Path, entry: str) -> dict[str, Any]:
    def refuse(_: Any) -> Any:
        raise ValueError("it refers to data outside of itself")

    with path.open("rb") as file:
        content = read_pickle(file, refuse, str(path))
    found = content.get(entry) if isinstance(content, Mapping) else None
    if not isinstance(found, Mapping):
        network = "Inception" if entry == "fid" else "DINOv2"
        raise GenError(f"{path} holds no {network} statistics (no entry {entry}); give a dataset-refs file of EDM2")
    arrays = {key: value.array() if hasattr(value, "array") else value for key, value in found.items()}
    return arrays | {"num_images": content.get("num_images", 0)}


def _publisher(path: Path, arrays: Mapping[str, Any]) -> str:
    """The publisher, where a file tells."""
    if path.suffix == ".pkl":
        return "edm2"
    if "mu_s" in arrays:
        return "adm"
    if _CLEAN_NAME.fullmatch(path.stem):
        return "clean-fid"
    raise GenError(
        f"{path} does not tell under which protocol it was computed; say who published it: {', '.join(PUBLISHERS)}"
    )


def _moments(path: Path, arrays: Mapping[str, Any], mean: str, covariance: str) -> tuple[np.ndarray, np.ndarray]:
    if mean not in arrays or covariance not in arrays:
        raise GenError(f"{path} holds no statistics ({mean} and {covariance}); expected those of a publisher's file")
    mu, sigma = np.asarray(arrays[mean], np.float64), np.asarray(arrays[covariance], np.float64)
    if mu.ndim != 1 or sigma.shape != (mu.size, mu.size) or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise GenError(f"{path} has {mean} {mu.shape} and {covariance} {sigma.shape}; expected finite (D,) and (D, D)")
    return mu, sigma


def _features(path: Path, width: int) -> np.ndarray:
    """What clean-fid keeps beside its statistics for KID."""
    beside = path.with_name(f"{path.stem}_kid.npz")
    if not beside.is_file():
        return np.zeros((0, width), np.float32)
    try:
        with np.load(beside, allow_pickle=False) as file:
            features = file["feats"]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise GenError(f"{beside} cannot be read ({error}); remove it or download it again") from None
    if features.ndim != 2 or features.shape[1] != width:
        raise GenError(f"{beside} has features {features.shape}; expected (N, {width}); remove it or download it again")
    return np.asarray(features, np.float32)
