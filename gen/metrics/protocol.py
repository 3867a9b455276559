"""What a score means: the protocol it was taken under, stored with every number and checked before two are compared."""

import dataclasses
import functools
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from gen.config import from_json, suggest, to_json
from gen.errors import GenError
from gen.files import read_json, write_json

__all__ = [
    "PRESETS",
    "NamedProtocol",
    "Protocol",
    "Result",
    "combine",
    "departures",
    "differences",
    "preset",
    "require_comparable",
    "versions",
]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Everything that two scores must share to be comparable, and the seeds, which they need not.

    Attributes:
      extractor: name of the feature network.
      extractor_fingerprint: identity of its weights.
      count: number of samples; distances fall as it grows, so it must agree.
      resize: how images reach the network's size; "none" when they have it.
      quantiser: how float images became 8-bit (`gen.metrics.evaluate.QUANTISERS`); "given" for images that came as
        integers of unknown origin.
      precision: arithmetic of the feature network and the moments.
      labels: the rule that gives sample i its label; "none" without labels.
      reference: name of the real images compared with; "" where the statistics stand alone.
      reference_fingerprint: identity of their statistics.
      split: which part of the data the reference was made of.
      neighbours: k of precision, recall, density and coverage.
      neighbour_rule: "closed" (d <= r) or "open" (d < r).
      neighbour_limit: how many samples, and how many real images, enter them, and all measures that need whole
        features, at most.
      score_splits: how the Inception Score divides the samples: "10" contiguous parts, "10-shuffled" by a fixed
        permutation first, "chunk-5000" parts of 5000.
      beside: what else measures looked at, with its identity: captions, training and held-out images.
      seeds: the seeds of the samples; recorded, not compared.
      name: the preset (`PRESETS`) that the score was taken under, with what departs from it; recorded, not compared.
    """

    extractor: str
    extractor_fingerprint: str
    count: int
    resize: str = "none"
    quantiser: str = "round"
    precision: str = "float32-highest"
    labels: str = "none"
    reference: str = ""
    reference_fingerprint: str = ""
    split: str = ""
    neighbours: int = 3
    neighbour_rule: str = "closed"
    neighbour_limit: int = 10_000
    score_splits: str = "10-shuffled"
    beside: str = ""
    seeds: str = ""
    name: str = ""


@dataclasses.dataclass(frozen=True)
class NamedProtocol:
    """A protocol of the field by name: what it fixes; the rest (reference, labels ...) is as given.

    Attributes:
      line: whose tables it is, and what belongs to it that no field says.
      extractor: as ``gen evaluate --extractor`` takes it.
      fields: values of `Protocol` by name.
    """

    line: str
    extractor: str
    fields: Mapping[str, Any]


# The published network, under the resize of the original FID; what all but clean-fid and pytorch-fid report.
_FID = {"extractor": "inception", "extractor_fingerprint": "inception-2015-12-05", "precision": "float32-highest"}
_TF = _FID | {"resize": "legacy_tensorflow"}
_ADM = _TF | {"count": 50_000, "split": "train", "neighbours": 3, "neighbour_rule": "closed", "neighbour_limit": 50_000}
_ADM |= {"score_splits": "chunk-5000"}
_DIT = _ADM | {"quantiser": "round", "labels": "random"}
_EDM = _TF | {"count": 50_000, "split": "train", "quantiser": "round"}

# Sources: the evaluation code of each project. Labels stand where the project fixes them.
PRESETS: dict[str, NamedProtocol] = {
    "adm-imagenet64": NamedProtocol(
        "guided-diffusion, reference VIRTUAL_imagenet64_labeled.npz",
        "inception:legacy_tensorflow",
        _ADM | {"quantiser": "truncate"},
    ),
    "adm-imagenet256": NamedProtocol(
        "guided-diffusion, reference VIRTUAL_imagenet256_labeled.npz",
        "inception:legacy_tensorflow",
        _ADM | {"quantiser": "truncate"},
    ),
    "adm-imagenet512": NamedProtocol(
        "guided-diffusion, reference VIRTUAL_imagenet512.npz",
        "inception:legacy_tensorflow",
        _ADM | {"quantiser": "truncate"},
    ),
    "dit-imagenet256": NamedProtocol(
        "DiT, SiT, REPA: random classes, ADM's reference VIRTUAL_imagenet256_labeled.npz",
        "inception:legacy_tensorflow",
        _DIT,
    ),
    "dit-imagenet512": NamedProtocol(
        "DiT, SiT: random classes, ADM's reference VIRTUAL_imagenet512.npz", "inception:legacy_tensorflow", _DIT
    ),
    "balanced-imagenet256": NamedProtocol(
        "MAR, VAR, LightningDiT: 50 samples of every class, ADM's reference VIRTUAL_imagenet256_labeled.npz",
        "inception:legacy_tensorflow",
        _DIT | {"labels": "seed mod classes"},
    ),
    "edm-cifar10": NamedProtocol(
        "EDM, seeds 0-49999, reference cifar10-32x32.npz; the papers report the lowest of three sets of seeds",
        "inception:legacy_tensorflow",
        _EDM,
    ),
    "edm-imagenet64": NamedProtocol(
        "EDM, seeds 0-49999, random classes, reference imagenet-64x64.npz",
        "inception:legacy_tensorflow",
        _EDM | {"labels": "random"},
    ),
    "edm2": NamedProtocol(
        "EDM2, random classes, reference img512.pkl or img64.pkl",
        "inception:legacy_tensorflow",
        _EDM | {"labels": "random"},
    ),
    "edm2-dinov2": NamedProtocol(
        "EDM2's FD-DINOv2, random classes; the reference is made from the training set",
        "dinov2",
        {"extractor": "dinov2", "precision": "float32-highest", "count": 50_000, "split": "train"}
        | {"quantiser": "round", "labels": "random"},
    ),
    "clean-fid": NamedProtocol(
        "clean-fid's default mode; tables with it also fix the number of samples and the split",
        "inception:clean",
        _FID | {"resize": "clean", "quantiser": "round"},
    ),
    "pytorch-fid": NamedProtocol(
        "pytorch-fid on saved images; tables with it also fix the number of samples and the split",
        "inception:legacy_pytorch",
        _FID | {"resize": "legacy_pytorch"},
    ),
    "rfid-imagenet-val": NamedProtocol(
        "reconstructions of the 50,000 validation images against these (TiTok's and later evaluators, which truncate)",
        "inception:legacy_tensorflow",
        _TF | {"count": 50_000, "split": "val", "quantiser": "truncate"},
    ),
    "rfid-imagenet-val-pytorch": NamedProtocol(
        "the same by pytorch-fid on saved images, as LightningDiT reports it",
        "inception:legacy_pytorch",
        _FID | {"resize": "legacy_pytorch", "count": 50_000, "split": "val", "quantiser": "round"},
    ),
    "coco30k": NamedProtocol(
        "30,000 captions of COCO 2014 val, clean-fid against the val images, centre-cropped and brought to 256 pixels",
        "inception:clean",
        _FID | {"resize": "clean", "count": 30_000, "split": "val"},
    ),
    "digits": NamedProtocol(
        "gen demo: as many balanced samples as there are digits, against the training split",
        "digits-extractor",
        {"extractor": "digits", "count": 1797, "split": "train", "labels": "seed mod classes", "reference": "digits"},
    ),
}


def preset(name: str) -> NamedProtocol:
    """Gives the preset `name`. Raises GenError, with the closest name, for another one."""
    if name not in PRESETS:
        raise GenError(f"unknown protocol '{name}'; {suggest(name, PRESETS)}")
    return PRESETS[name]


def departures(name: str, protocol: Protocol) -> dict[str, tuple[Any, Any]]:
    """Gives the fields in which a protocol departs from a preset: {field: (the preset's value, the protocol's)}."""
    fixed = preset(name).fields
    return {f: (value, getattr(protocol, f)) for f, value in fixed.items() if getattr(protocol, f) != value}


def differences(a: Protocol, b: Protocol) -> dict[str, tuple[Any, Any]]:
    """Gives the fields in which two protocols differ, with both values; {} when scores taken under them are
    comparable.
    """
    names = [field.name for field in dataclasses.fields(Protocol) if field.name not in ("seeds", "name")]
    return {name: (getattr(a, name), getattr(b, name)) for name in names if getattr(a, name) != getattr(b, name)}


def versions() -> dict[str, str]:
    """Versions of what takes part in a score, and this code's git revision where it runs from a checkout."""
    packages = {"gen": "gen-image", "jax": "jax", "numpy": "numpy", "scipy": "scipy"}
    revision = {"revision": _revision()} if _revision() else {}
    python = {"python": platform.python_version()}
    return python | {name: metadata.version(p) for name, p in packages.items()} | revision


@functools.cache
def _revision() -> str:
    """The commit of the checkout that this file is in, with a + where files differ from it; "" without a checkout."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=12",
        "--dirty=+",
        "--exclude=*",
    ]
    try:
        tracked = subprocess.run(
            [*command[:3], "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, timeout=10
        )
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip() if tracked.returncode == 0 and found.returncode == 0 else ""


@dataclasses.dataclass(frozen=True)
class Result:
    """Scores with the protocol they were taken under.

    Attributes:
      values: score by name; finite.
      protocol: how they were taken.
      subject: what was scored: name, identity of the weights, NFE, sampler settings ... as text.
      spread: standard deviation over `runs` repetitions with other seeds (N - 1), by name; {} for one run.
      each: the values of the single runs, by name; {} for one run.
      within: spread inside one evaluation, by name: over the splits of the Inception Score, the subsets of KID and
        the trainings of CAS; else a standard error, of an extrapolation or over samples (`gen.metrics.intervals`).
      per_class: scores by class; None for a class without samples.
      runs: how many evaluations the values are the mean of.
      seconds: wall time.
      versions: of the packages that took part.

    Raises GenError for a score that is not finite.
    """

    values: Mapping[str, float]
    protocol: Protocol
    subject: Mapping[str, str] = dataclasses.field(default_factory=dict)
    spread: Mapping[str, float] = dataclasses.field(default_factory=dict)
    each: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    within: Mapping[str, float] = dataclasses.field(default_factory=dict)
    per_class: Mapping[str, tuple[float | None, ...]] = dataclasses.field(default_factory=dict)
    runs: int = 1
    seconds: float = 0.0
    versions: Mapping[str, str] = dataclasses.field(default_factory=versions)

    def __post_init__(self) -> None:
        bad = [name for name, value in self.values.items() if not np.isfinite(value)]
        if bad:
            raise GenError(
                f"the score {bad[0]} is {self.values[bad[0]]}; expected a finite number; look at the samples"
            )

    def save(self, path: str | Path) -> None:
        """Writes JSON, whole or not at all."""
        write_json(path, to_json(self))

    @classmethod
    def load(cls, path: str | Path) -> "Result":
        """Reads what `save` wrote. Raises GenError for a missing file or one that holds no result."""
        data = read_json(path)
        if not isinstance(data, Mapping) or "protocol" not in data:
            raise GenError(
                f"{path} holds scores without a protocol; expected the JSON of an evaluation; evaluate again"
            )
        result = from_json(data, cls, str(path))
        assert isinstance(result, cls)
        return result


def require_comparable(results: Mapping[str, Result], *, force: bool = False) -> None:
    """Raises GenError naming the first differing field unless all results share one protocol (or `force`)."""
    names = list(results)
    for name in names[1:]:
        differing = differences(results[names[0]].protocol, results[name].protocol)
        if differing and not force:
            field, (first, other) = next(iter(differing.items()))
            more = f" (and {len(differing) - 1} more fields)" if len(differing) > 1 else ""
            raise GenError(
                f"'{names[0]}' and '{name}' were scored under different protocols: {field} is {first!r} and {other!r}"
                f"{more}; expected equal ones; evaluate both alike, or force the comparison"
            )


def combine(results: Sequence[Result]) -> Result:
    """Gives the mean over repetitions of one evaluation with other seeds, with the standard deviation (N - 1) as
    spread.

    Raises GenError for no results, results of different protocols or of one and the same seed range.
    """
    if not results:
        raise GenError("no results to combine; expected at least one; evaluate first")
    require_comparable({f"run {i}": result for i, result in enumerate(results)})
    seeds = [result.protocol.seeds for result in results]
    if len(set(seeds)) < len(seeds):
        raise GenError(f"results of the same seeds ({seeds}) do not add up to a mean; expected other seeds in each")
    each = {name: tuple(r.values[name] for r in results) for name in results[0].values}
    classes = {
        name: tuple(_mean([r.per_class[name][i] for r in results]) for i in range(len(rows)))
        for name, rows in results[0].per_class.items()
    }
    return dataclasses.replace(
        results[0],
        values={name: float(np.mean(values)) for name, values in each.items()},
        spread={name: float(np.std(values, ddof=1)) for name, values in each.items()} if len(results) > 1 else {},
        within={name: float(np.mean([r.within[name] for r in results])) for name in results[0].within},
        each=each if len(results) > 1 else {},
        per_class=classes,
        runs=len(results),
        seconds=sum(r.seconds for r in results),
        protocol=dataclasses.replace(results[0].protocol, seeds=", ".join(seeds)),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None
