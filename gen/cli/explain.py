"""``gen explain``."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gen.cli.flags import flag
from gen.errors import GenError

__all__ = ["explain"]


def explain(
    first: Annotated[Path, tyro.conf.Positional, flag("SCORE_A")],
    second: Annotated[Path, tyro.conf.Positional, flag("SCORE_B")],
    /,
    *,
    real: Annotated[tuple[str, ...], flag("IMAGES")],
    images: Annotated[str | None, flag("RUN|IMAGES")] = None,
    balance: Literal["none", "first", "second", "both"] = "none",
    root: Literal["none", "first", "second", "both"] = "none",
    batch: Annotated[int, flag("N")] = 256,
) -> None:
    """Two scores of the same images taken apart: what rounding, resize, network, reference, balance and root change.

    The images are put through the first score's pipeline, and one step after the other is exchanged for the second's. A
    residual that is not nearly 0 says that something else differed. Scores of stored bytes have no rounding to change.

    Examples:
      gen explain ours.json theirs.json --real train.zip
      gen explain a.json b.json --images runs/demo/student --real digits:train digits:test --balance second

    Args:
      first: a score file of gen evaluate.
      second: another.
      real: the real images of both references, or of the first's and the second's.
      images: a run, sampled again with the seeds of the first score, or stored images; what the first score names if
        not given.
      balance: the score in which classes counted equally.
      root: the score whose matrix root was the general one of published codes.
      batch: images at a time.
    """
    from gen.cli.extractors import _maker
    from gen.cli.tables import print_table
    from gen.metrics.explain import Pipeline, explained, shares
    from gen.metrics.protocol import Result

    results = [Result.load(path) for path in (first, second)]
    if not 1 <= len(real) <= 2:
        raise GenError(f"--real names {len(real)} sets; give the real images of both scores, or of each")
    sets = (real[0], real[-1])
    counts = [result.protocol.count for result in results]
    if counts[0] != counts[1]:
        raise GenError(f"the scores are of {counts[0]} and {counts[1]} samples, so not of the same; explain equal ones")
    pipelines, networks = [], {}
    for i, (path, result, text) in enumerate(zip((first, second), results, sets, strict=True)):
        protocol, name = result.protocol, ("first", "second")[i]
        if "frechet_distance" not in result.values:
            raise GenError(f"{path} holds no frechet_distance; score the images against a reference")
        network = f"{protocol.extractor} {protocol.extractor_fingerprint}"
        networks[network, protocol.resize] = _maker(protocol, str(path))
        pipeline = Pipeline(
            protocol.quantiser,
            protocol.resize,
            network,
            text,
            balance=balance in (name, "both"),
            root="sqrtm" if root in (name, "both") else "exact",
        )
        pipelines.append(pipeline)
    # the network of one with the resize of the other, where the network has that mode
    for a, b in (pipelines, pipelines[::-1]):
        if (a.network, b.resize) not in networks:
            networks[a.network, b.resize] = _resized(networks[a.network, a.resize], b.resize)
    measure = _Measure(images or results[0].subject.get("name", ""), results[0].protocol, networks, batch)
    values = [result.values["frechet_distance"] for result in results]
    rows = shares(explained(measure, *pipelines), *values)
    print_table(["step", "distance", "change"], [(step, f"{v:.4f}", f"{change:+.4f}") for step, v, change in rows])


def _resized(network: Any, mode: str) -> Any:
    if mode not in network.modes:
        raise GenError(f"the {network.name} extractor has no resize '{mode}': resize and network change together here")
    return dataclasses.replace(network, mode=mode)


class _Measure:
    """The distance of the same images under a pipeline; features are kept."""

    def __init__(self, what: str, protocol: Any, networks: dict[tuple[str, str], Any], batch: int) -> None:
        self.what, self.protocol, self.networks, self.batch = what, protocol, networks, batch
        self.features: dict[Any, Any] = {}
        self.is_run = (Path(what) / "config.json").is_file()
        if not self.is_run and not what:
            raise GenError("the first score does not say what it is of; give --images")

    def __call__(self, pipeline: Any) -> float:
        from gen.metrics.explain import weighted_moments, with_square_root

        network = self.networks[pipeline.network, pipeline.resize]
        samples, labels = self._features(self.what, network, pipeline.rounding if self.is_run else "given")
        real, _ = self._features(pipeline.reference, network, "given")
        if pipeline.balance and labels is None:
            raise GenError(f"{self.what} has no labels to balance; leave out --balance")
        moments = weighted_moments(samples, labels if pipeline.balance else None)
        return with_square_root(pipeline.root, moments, weighted_moments(real))

    def _features(self, what: str, network: Any, rounding: str) -> Any:
        from gen.cli.images import open_images
        from gen.metrics.onepass import collect
        from gen.metrics.statistics import Features, finalised

        key = what, network, rounding
        if key not in self.features:
            of_samples = what == self.what
            source = self._run(rounding) if self.is_run and of_samples else open_images(what, network)
            count = min(self.protocol.count, source.count) if of_samples else source.count
            statistics: dict[str, Any] = {"features": Features(count, "features", name="features")}
            if source.labels != "none":
                statistics["labels"] = Features(count, "label", name="labels")
            tally = collect(source, network, statistics, indices=range(count), batch=self.batch)
            found = finalised(statistics, tally.accumulators)
            labels = found["labels"].astype(int) if "labels" in found else None
            self.features[key] = found["features"], labels
        return self.features[key]

    def _run(self, rounding: str) -> Any:
        from gen.metrics.sources import LABEL_RULES, generated
        from gen.nn.conditions import class_count
        from gen.runs import load
        from gen.sampling.seeds import parse_range

        loaded, seeds = load(self.what), parse_range(self.protocol.seeds)
        number = class_count(loaded.generator.conditions)
        labels = None if number is None else LABEL_RULES[self.protocol.labels](seeds, number)
        return generated(
            loaded.generator,
            loaded.params,
            seeds=seeds,
            identity="explained",
            labels=labels,
            rule=self.protocol.labels,
            quantiser=rounding,
        )
