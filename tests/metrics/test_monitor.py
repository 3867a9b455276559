"""The monitor on a task whose network is one number that drifts away from what the real images have."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gen.errors import GenError
from gen.metrics.evaluate import evaluate
from gen.metrics.monitor import METRIC, monitor
from gen.metrics.reference import make_reference
from gen.metrics.sources import balanced_labels, from_arrays, generated
from gen.nn.conditions import label
from gen.training.engine import train
from gen.training.logging import read_metrics
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Model, Stage, State
from tests.metrics.toy import PARAMS, Toy, draw
from tests.training.toy import ToyData

COUNT, STEPS = 64, 6
LABELS = balanced_labels(COUNT, 4)


@dataclasses.dataclass(frozen=True)
class DriftTask:
    """The scale of the noise grows by a tenth with every step; its "average" lags half a step behind."""

    broken: int = 10**9

    programs = property(lambda self: {"drift": self.drift})

    def init(self, key: Any, frozen: Any, previous: Any) -> State:
        params = {"scale": jnp.float32(0.1), "means": jnp.asarray(PARAMS["means"])}
        return State(jnp.int32(0), {"net": params}, ema={"net": jax.tree.map(jnp.copy, params)})

    def select(self, step: int) -> str:
        return "drift"

    derived = False

    def inputs(self, step: int, steps: int) -> dict[str, np.ndarray]:
        return {}

    def check(self, row: Any) -> None:
        pass

    def opened(self, params: Any) -> Any:
        return params

    def models(self) -> dict[str, Model]:
        return {"net": Model(None)}

    def drift(self, state: State, frozen: Any, batch: Any, schedule: Any, key: Any) -> tuple[State, dict[str, Any]]:
        scale = jnp.where(state.step + 1 == self.broken, jnp.nan, 0.1 * (state.step + 2))
        nets = [{"net": {**state.params["net"], "scale": s}} for s in (scale, scale - 0.05)]
        return dataclasses.replace(state, params=nets[0], ema=nets[1]), {"loss": scale * 0}

    def preview(self, state: State, frozen: Any, key: Any, generator: Any) -> dict[str, Any]:
        return {}

    def export(self, state: State) -> dict[str, Any]:
        return {"net": state.ema["net"]}


@dataclasses.dataclass(frozen=True)
class Noise:
    """A network of the parameters of `draw`."""

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        module = nnx.Module()
        module.scale = nnx.Param(jnp.float32(0.1))
        module.means = nnx.Param(jnp.asarray(PARAMS["means"]))
        return module


@dataclasses.dataclass(frozen=True)
class Drawn:
    """`draw` with the parameters of the role "net", its own sampler."""

    conditions = label(4)
    networks: ClassVar[dict[str, Any]] = {"net": Noise()}
    shape = (6, 5, 3)

    def generator(self, models: Any, tokenizer: Any) -> "Drawn":
        return self

    def __call__(self, params: Any, keys: Any, cond: Any) -> Any:
        return draw(params["net"], keys, cond)


def _config(task: Any = DriftTask(), **engine: Any) -> RunConfig:
    stage = Stage("only", task, STEPS, 8, ToyData())
    settings = EngineConfig(quiet=True, keep=1, checkpoint_every=10**9, best=METRIC, **engine)
    return RunConfig("drift", (stage,), sampler=Drawn(), engine=settings)


@pytest.fixture(scope="module")
def reference() -> Any:
    """Images as the generator makes them with the average's scale after step 4, from other seeds."""
    params = {"net": PARAMS | {"scale": np.float32(0.45)}}
    source = generated(Drawn(), params, seeds=range(1000, 1200), identity="real", labels=balanced_labels(200, 4))
    images = np.asarray(source.function(source.arguments, jnp.arange(200))["image"])
    return make_reference("real", from_arrays(images, quantiser="round"), Toy())


def _train(config: RunConfig, outdir: Any, reference: Any, **options: Any) -> Any:
    hook, protocol = monitor(config, reference, Toy(), every=2, count=COUNT, batch=32)
    train(config, outdir, hooks=(hook,), **options)
    return protocol


def _logged(outdir: Any) -> dict[int, float]:
    return {record["step"]: record[METRIC] for record in read_metrics(outdir) if METRIC in record}


def test_the_averaged_weights_are_scored_and_the_best_checkpoint_is_kept(tmp_path, reference):
    protocol = _train(_config(), tmp_path / "a", reference)
    found = _logged(tmp_path / "a")
    assert sorted(found) == [2, 4, 6]
    params = {"net": PARAMS | {"scale": np.float32(0.45)}}
    source = generated(Drawn(), params, seeds=range(COUNT), identity="x", labels=LABELS, rule="seed mod classes")
    expected = evaluate(source, reference, Toy())
    assert found[4] == pytest.approx(expected.values["frechet_distance"], rel=1e-4)
    assert min(found, key=found.__getitem__) == 4
    steps = {int(p.name) for p in (tmp_path / "a" / "checkpoints").iterdir() if p.name.isdigit()}
    assert steps == {4, 6}  # the best, and the newest
    assert (protocol.count, protocol.labels, protocol.seeds, protocol.reference) == (
        *(COUNT, "seed mod classes", f"0-{COUNT - 1}", "real"),
    )
    _train(_config(), tmp_path / "b", reference, stop_after=3)
    _train(_config(), tmp_path / "b", reference)
    assert _logged(tmp_path / "b") == found  # interrupted between two scores: the same numbers, bit for bit


def test_broken_samples_do_not_end_the_run(tmp_path, reference, capsys):
    task = DriftTask(broken=4)
    _train(_config(task), tmp_path, reference)
    assert sorted(_logged(tmp_path)) == [2, 6]
    assert "step 4: no distance: sample 0 has NaN" in capsys.readouterr().err


def test_refuses(reference):
    for config, options, message in (
        (dataclasses.replace(_config(), sampler=None), {"every": 2}, "expected a run that makes images"),
        (_config(), {"every": 0}, "cannot be monitored every 0 steps"),
    ):
        with pytest.raises(GenError, match=message):
            monitor(config, reference, Toy(), count=COUNT, **options)
    with pytest.raises(GenError, match="made with extractor_fingerprint"):
        monitor(_config(), reference, Toy(shift=1.0), every=1, count=COUNT)
