"""A small task with everything the engine has to serve: two networks 5:1, a frozen teacher, averages, schedules."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.nn.conditions import Conditions
from gen.nn.network import Network
from gen.training.ema import Constant, PowerFunction
from gen.training.method import Method
from gen.training.optim import OptimConfig
from gen.training.part import Aux, Part
from gen.training.task import Model

SIZE = 8
OPTIM = OptimConfig(lr=1e-2, warmup=2, clip=1.0)


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    """A linear map of `SIZE` numbers."""

    width: int = SIZE

    @property
    def shape(self) -> tuple[int, ...]:
        return (SIZE,)

    @property
    def conditions(self) -> Conditions:
        return {}

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return _Linear(self, rngs)


class _Linear(nnx.Module):
    def __init__(self, config: LinearConfig, rngs: nnx.Rngs) -> None:
        self.w = nnx.Param(jax.random.normal(rngs.params(), (SIZE, config.width)))
        self.b = nnx.Param(jnp.zeros(config.width))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.w[...] + self.b[...]


@dataclasses.dataclass(frozen=True)
class Held:
    """What the student belongs to, as a Denoiser holds a network."""

    network: LinearConfig = LinearConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyTask(Method):
    """Two linear maps: the fake score fits the student's outputs, the student the frozen teacher's."""

    optim: OptimConfig = OPTIM
    emas: tuple[Any, ...] = (Constant(0.9), PowerFunction(0.05))
    ratio: int = 5
    network: LinearConfig = LinearConfig()
    alias: bool = False

    takes: ClassVar[tuple[str, ...]] = ("x",)

    @property
    def parts(self) -> tuple[Part, ...]:
        return (
            Part("student", self.network, self.optim, self.emas),
            Part("fake_score", self.network, dataclasses.replace(OPTIM, lr=self.optim.lr)),
        )

    def models(self) -> Mapping[str, Model]:
        return {"net": Model(Held(self.network))}

    def start(self, key: Any, frozen: Any, previous: Any) -> Mapping[str, Any]:
        draw = jax.random.normal(key, (SIZE, self.network.width))
        student = {"w": draw, "b": jnp.zeros(self.network.width)}
        if previous is not None:
            student = previous.params["student"]
        return {"student": student, "fake_score": {"w": 0.5 * draw, "b": jnp.ones(self.network.width)}}

    def init(self, key: Any, frozen: Any, previous: Any) -> Any:
        state = super().init(key, frozen, previous)
        if self.alias:  # what an author may forget: frozen arrays and parameters used twice, not copied
            state = dataclasses.replace(
                state, aux=dict(frozen["teacher"]), ema=dict.fromkeys(state.ema, state.params["student"])
            )
        return state

    @property
    def programs(self) -> Mapping[str, Any]:
        return {"student": self.student, "fake_score": self.fake_score}

    def select(self, step: int) -> str:
        return "student" if step % self.ratio == self.ratio - 1 else "fake_score"

    def updates(self, part: str, steps: int) -> int:
        return steps // self.ratio if part == "student" else steps - steps // self.ratio

    def schedules(self, step: int, steps: int) -> Mapping[str, Any]:
        return {"scale": np.float32(1.0 + step / 100)}

    def student(self, state: Any, frozen: Any, batch: Any, schedule: Any, key: Any) -> Any:
        x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
        net, scale = Network(self.network), schedule["scale"]

        def loss(params: Any, data: Any) -> Any:
            error = net(params, data["x"]) - scale * net(frozen["teacher"], data["x"])
            return jnp.mean(error**2), Aux({"bias": jnp.mean(params["b"])})

        state, metrics, _ = self.parts[0].update(state, loss, {"x": x}, schedule)
        return state, self.parts[0].named(metrics)

    def fake_score(self, state: Any, frozen: Any, batch: Any, schedule: Any, key: Any) -> Any:
        net = Network(self.network)
        target = net(state.params["student"], batch["x"])

        def loss(params: Any, data: Any) -> Any:
            return jnp.mean((net(params, data["x"]) - data["target"]) ** 2), Aux()

        state, metrics, _ = self.parts[1].update(state, loss, {"x": batch["x"], "target": target}, schedule)
        return state, self.parts[1].named(metrics)

    def preview(self, state: Any, frozen: Any, key: Any, generator: Any) -> Mapping[str, Any]:
        return {"weights": jnp.tanh(state.params["student"]["w"])[None, :, :, None]}


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
