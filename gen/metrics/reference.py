"""Statistics of real images, computed once and stored with the protocol they were computed under."""

import dataclasses
import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gen.config import from_json, to_json
from gen.errors import GenError
from gen.features.extractor import Extractor
from gen.files import atomic
from gen.metrics.onepass import Progress, collect
from gen.metrics.protocol import Protocol
from gen.metrics.sources import ImageSet
from gen.metrics.statistics import basic_statistics, finalised

__all__ = ["Reference", "make_reference"]


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics of real images.

    Attributes:
      name: of the data, for tables.
      mean, covariance: of the features, (D,) and (D, D) float64.
      features: (R, D) float32, the first R images' features, for the measures that need them; R may be 0.
      protocol: how they were computed; ``count`` is the number of real images, 0 when unknown.
      identity: of the real images.
      labels: (R,) int32 classes of `features`; empty without.
      spatial: mean and covariance of the spatial features, for sFID; None without.
      data: where the images of `features` lay, as the user named it, and their identity; says where to look for
        pictures, no more. Empty when unknown.
    """

    name: str
    mean: np.ndarray
    covariance: np.ndarray
    features: np.ndarray
    protocol: Protocol
    identity: str
    labels: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    spatial: tuple[np.ndarray, np.ndarray] | None = None
    data: tuple[str, str] = ("", "")

    def fingerprint(self) -> str:
        """Gives the SHA-256 (16 hex digits) of the real images' identity and the protocol.

        Not of the statistics, whose last bits depend on the machine.
        """
        text = json.dumps([self.name, self.identity, to_json(self.protocol)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Writes an .npz (mu, sigma, n, feats, name, identity, protocol as JSON text ...), whole or not at all."""
        arrays: dict[str, Any] = {
            "mu": self.mean,
            "sigma": self.covariance,
            "n": self.protocol.count,
            "feats": self.features,
            "name": np.array(self.name),
            "identity": np.array(self.identity),
            "protocol": np.array(json.dumps(to_json(self.protocol))),
            "data": np.array(self.data),
        }
        if len(self.labels):
            arrays["labels"] = self.labels
        if self.spatial is not None:
            arrays["mu_s"], arrays["sigma_s"] = self.spatial
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        atomic(path, lambda file: file.write(buffer.getbuffer()))

    @classmethod
    def load(cls, path: str | Path) -> "Reference":
        """Reads what `save` wrote. Raises GenError for another file, or one without a protocol."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise GenError(f"{path} cannot be read as a reference ({error}); expected an .npz; make it again") from None
        missing = [name for name in ("mu", "sigma", "feats", "name", "identity", "protocol") if name not in arrays]
        if missing:
            raise GenError(
                f"the reference {path} lacks {', '.join(missing)}; expected statistics with the protocol they were "
                "computed under; make it again, or convert a published file with gen reference"
            )
        return cls(
            name=str(arrays["name"]),
            mean=arrays["mu"],
            covariance=arrays["sigma"],
            features=arrays["feats"],
            protocol=from_json(json.loads(str(arrays["protocol"])), Protocol, f"{path}: protocol"),
            identity=str(arrays["identity"]),
            labels=arrays.get("labels", np.zeros(0, np.int32)),
            spatial=(arrays["mu_s"], arrays["sigma_s"]) if "mu_s" in arrays else None,
            data=(str(arrays["data"][0]), str(arrays["data"][1])) if "data" in arrays else ("", ""),
        )


def make_reference(
    name: str,
    source: ImageSet,
    extractor: Extractor,
    *,
    split: str = "",
    data: str = "",
    batch: int = 256,
    neighbour_limit: int = 10_000,
    mesh: Mesh | None = None,
    partial: str | Path | None = None,
    progress: Progress | None = None,
) -> Reference:
    """Gives statistics of all images of a source, through the very pass that samples go through.

    Args:
      name: of the data, for tables.
      source: the real images.
      extractor: the feature network.
      split: which part of the data they are.
      data: where the images lie, as the user named it.
      batch, mesh, progress: see `gen.metrics.onepass.collect`.
      neighbour_limit: how many images' features are kept: the first, so shuffle a larger source sorted by class.
      partial: where to keep partial results, so that a killed job goes on where it was.

    Raises:
      GenError: see `gen.metrics.onepass.collect`.
    """
    statistics = basic_statistics(extractor, source.labels != "none", min(neighbour_limit, source.count))
    tally = collect(source, extractor, statistics, batch=batch, mesh=mesh, path=partial, progress=progress)
    found = finalised(statistics, tally.accumulators)
    protocol = Protocol(
        extractor=extractor.name,
        extractor_fingerprint=extractor.fingerprint(),
        count=source.count,
        resize=extractor.resize,
        quantiser=source.quantiser,
        precision=extractor.precision,
        labels=source.labels,
        split=split,
        neighbour_limit=neighbour_limit,
    )
    return Reference(
        name=name,
        mean=found["mean"],
        covariance=found["covariance"],
        features=found["features"],
        protocol=protocol,
        identity=source.identity,
        labels=np.asarray(found.get("label", ()), np.int32),
        spatial=(found["spatial_mean"], found["spatial_covariance"]) if "spatial_mean" in found else None,
        data=(data, source.identity if data else ""),
    )
