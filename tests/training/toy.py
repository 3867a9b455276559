"""A small task with everything the engine has to serve: two networks 5:1, a frozen teacher, an average, schedules."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.training.ema import Constant, PowerFunction
from gen.training.optim import OptimConfig, begin, update

SIZE = 8
AVERAGES = {"student": Constant(0.9), "student@0.05": PowerFunction(0.05)}


@dataclasses.dataclass(frozen=True)
class ToyTask:
    """Two linear maps: the fake score fits the student's outputs, the student the frozen teacher's."""

    lr: float = 1e-2
    ratio: int = 5
    width: int = SIZE
    alias: bool = False

    @property
    def optim(self) -> OptimConfig:
        return OptimConfig(lr=self.lr, warmup=2, clip=1.0)

    def init(self, key: Any, frozen: Any, previous: Any) -> Any:
        draw = jax.random.normal(key, (SIZE, self.width))
        student = {"w": draw, "b": jnp.zeros(self.width)}
        if previous is not None:
            student = previous.params["student"]
        optimizers = {"student": self.optim, "fake_score": self.optim}
        params = {"student": student, "fake_score": {"w": 0.5 * draw, "b": jnp.ones(self.width)}}
        state = begin(params, optimizers, AVERAGES)
        if self.alias:  # what an author may forget: frozen arrays and parameters used twice, not copied
            state = dataclasses.replace(
                state, aux=dict(frozen["teacher"]), ema=dict.fromkeys(AVERAGES, state.params["student"])
            )
        return state

    @property
    def programs(self) -> Mapping[str, Any]:
        return {"student": self.student, "fake_score": self.fake_score}

    def select(self, step: int) -> str:
        return "student" if step % self.ratio == self.ratio - 1 else "fake_score"

    def inputs(self, step: int) -> Mapping[str, np.ndarray]:
        return {"scale": np.float32(1.0 + step / 100)}

    def student(self, state: Any, frozen: Any, batch: Any, key: Any) -> Any:
        x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
        scale = batch["schedule"]["scale"]

        def loss(params: Any, data: Any) -> Any:
            error = _linear(params, data["x"]) - scale * _linear(frozen["teacher"], data["x"])
            return jnp.mean(error**2), {"bias": jnp.mean(params["b"])}

        return update(state, "student", loss, {"x": x}, self.optim, AVERAGES)

    def fake_score(self, state: Any, frozen: Any, batch: Any, key: Any) -> Any:
        target = _linear(state.params["student"], batch["x"])

        def loss(params: Any, data: Any) -> Any:
            return jnp.mean((_linear(params, data["x"]) - data["target"]) ** 2), {}

        return update(state, "fake_score", loss, {"x": batch["x"], "target": target}, self.optim)

    def preview(self, state: Any, frozen: Any, key: Any) -> Mapping[str, Any]:
        return {"weights": jnp.tanh(state.params["student"]["w"])[None, :, :, None]}

    def export(self, state: Any) -> Mapping[str, Any]:
        return {"net": state.ema["student"]}


def _linear(params: Any, x: Any) -> Any:
    return x @ params["w"] + params["b"]


@dataclasses.dataclass(frozen=True)
class ToyData:
    """Normal rows that depend on (seed, step, row) alone; `bad_from` puts NaN in the batches from a step on."""

    version: int = 0
    bad_from: int | None = None
    bad_to: int = 10**9

    def batches(
        self, *, batch: int, seed: int, start: int, process: int = 0, processes: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        step = start
        while True:
            rows = np.random.default_rng((seed, step)).normal(size=(batch, SIZE)).astype(np.float32)
            if self.bad_from is not None and self.bad_from <= step < self.bad_to:
                rows[0, 0] = np.nan
            yield {"x": rows[process * batch // processes : (process + 1) * batch // processes]}
            step += 1

    def identity(self) -> str:
        return f"toy-{self.version}"


def teacher() -> dict[str, Any]:
    """The frozen network."""
    return {"teacher": {"w": 2.0 * jnp.eye(SIZE), "b": jnp.full((SIZE,), 0.5)}}
