"""The Frechet distance of a run's samples while it trains: a hook of the engine, on the training mesh."""

import sys
from collections.abc import Mapping
from typing import Any

from gen.errors import GenError
from gen.features.extractor import Extractor
from gen.metrics.evaluate import Evaluation, Settings
from gen.metrics.frechet import frechet_distance
from gen.metrics.onepass import collect
from gen.metrics.protocol import Protocol
from gen.metrics.reference import Reference
from gen.metrics.sources import LABEL_RULES, generated
from gen.metrics.statistics import Moments, finalised
from gen.nn.conditions import class_count
from gen.training.engine import Hook
from gen.training.run import RunConfig
from gen.training.sharding import make_mesh
from gen.training.task import Frozen, State

__all__ = ["METRIC", "monitor"]

METRIC = "frechet_distance"  # its name in metrics.jsonl
_STATISTICS = {"moments": Moments()}


def monitor(
    config: RunConfig,
    reference: Reference,
    extractor: Extractor,
    *,
    every: int,
    count: int,
    artifacts: Mapping[str, Any] | None = None,
    rule: str = "seed mod classes",
    batch: int = 256,
) -> tuple[Hook, Protocol]:
    """Gives the hook for `gen.training.engine.train`, and the protocol that its numbers hold under.

    Each time the weights that the task exports (the averaged ones, where there are) make the same `count` samples, from
    seeds 0 to count - 1, on the mesh and with the layout that they are trained in; their features' moments are summed
    over the mesh and the distance is logged as ``frechet_distance``. Distances fall with the number of samples: compare
    with other runs at the same number only, and with scores of `gen.metrics.evaluate` never.

    Args:
      config: the run; stages that export no ``net`` (a tokenizer's) are passed over.
      reference: the real images.
      extractor: the feature network, that of the reference.
      every: global steps between calls.
      count: samples each time.
      artifacts: the run's further arrays by role, such as a tokenizer's.
      rule: which class a sample of a class-conditional model gets (`gen.metrics.sources.LABEL_RULES`).
      batch: samples at a time.

    Raises:
      GenError: a run without a generator, a reference made with another network, fewer than one step.
    """
    generator = config.generator()
    if generator is None or every < 1:
        raise GenError(
            f"run '{config.name}' cannot be monitored every {every} steps; expected a run that makes images, and at "
            "least 1 step; train without a monitor"
        )
    mesh = make_mesh(config.engine.mesh)
    tasks = {stage.name: stage.task for stage in config.stages}

    number = class_count(generator.conditions)
    labels = None if number is None else LABEL_RULES[rule](range(count), number)

    def source(params: Any) -> Any:
        return generated(generator, params, seeds=range(count), identity=config.name, labels=labels, rule=rule)

    protocol = Evaluation(source(()), reference, extractor, Settings(neighbours=1)).protocol

    def call(stage: str, step: int, state: State, frozen: Frozen) -> Mapping[str, float] | None:
        exported = tasks[stage].export(state)
        if "net" not in exported:
            return None
        try:
            params = tasks[stage].opened({**(artifacts or {}), **exported})
            tally = collect(source(params), extractor, _STATISTICS, batch=batch, mesh=mesh)
        except GenError as error:  # a score is not worth the run
            print(f"step {step}: no distance: {error}", file=sys.stderr, flush=True)
            return None
        found = finalised(_STATISTICS, tally.accumulators)
        return {METRIC: frechet_distance(found["mean"], found["covariance"], reference.mean, reference.covariance)}

    return Hook(every, call), protocol
