"""Method: the base of training methods, so that a method's file holds its losses and little else."""

import abc
import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from gen.errors import GenError
from gen.nn.conditions import Conditions, has_defaults, make_conditions
from gen.nn.network import Network
from gen.training.optim import OptimConfig
from gen.training.part import Part, begin, warm_start
from gen.training.task import Batch, Frozen, Metrics, Model, Program, Schedule, State

__all__ = ["PICTURES", "FlowMapMethod", "Method", "StudentMethod", "given", "pictures", "signed"]

PICTURES = 8  # samples in a preview; their seeds 0 to 7 keep noise and condition through the run


def given(role: str) -> Any:
    """Makes a field that says what a frozen role's own run says, recorded in the configuration and no override."""
    return dataclasses.field(metadata={"given": role})


def signed(images: jax.Array) -> jax.Array:
    """Maps uint8 -> float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """A `gen.training.task.Task` whose losses are still missing.

    A subclass names its `parts`, its `models`, the `start` parameters of each part, and an `update` (or `programs` and
    `select`, where there are several). Batches hold data as "latent" (B, ...) float32 on the normalised scale, or as
    "image" (B, H, W, C) uint8, and the model's conditions by name.

    Attributes:
      optim: the optimiser of the trained network.
      emas: its averages (`gen.training.ema`): the first is exported.
    """

    optim: OptimConfig = OptimConfig()
    emas: tuple[Any, ...] = ()

    takes: ClassVar[tuple[str, ...]] = ("latent", "image")  # names of the data in a batch, the first there is

    @property
    @abc.abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """Gives what is trained; the first is what a user loads."""

    @abc.abstractmethod
    def models(self) -> Mapping[str, Model]:
        """Does what `Task.models` says; the first is what the first part exports."""

    @abc.abstractmethod
    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Gives parameters of each part at the start of the stage, by part name."""

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one step of a method with one program."""
        raise TypeError(f"{type(self).__name__} defines neither update nor programs")

    @property
    def programs(self) -> Mapping[str, Program]:
        """Gives one program, named after the first part."""
        return {self.parts[0].name: self.update}

    def select(self, step: int) -> str:
        """Chooses the only program."""
        del step
        return self.parts[0].name

    def updates(self, part: str, steps: int) -> int:
        """Tells how often `part` is updated in the first `steps` steps of the stage; in each, unless a method has
        ratios.
        """
        del part
        return steps

    def inputs(self, step: int, steps: int) -> Mapping[str, Any]:
        """Gives ``lr/<part>``, the learning rate of each part's next update, and the method's own schedules."""
        rates = {
            f"lr/{part.name}": part.optim.rate(self.updates(part.name, step), self.updates(part.name, steps))
            for part in self.parts
        }
        return {name: np.float32(rate) for name, rate in rates.items()} | dict(self.schedules(step, steps))

    def schedules(self, step: int, steps: int) -> Mapping[str, Any]:
        """Gives further host-side schedules (annealing, discretisation); none by default."""
        del step, steps
        return {}

    @property
    def derived(self) -> bool:
        """Tells whether a learning rate falls over the length of the stage."""
        return any(part.optim.derived for part in self.parts)

    def init(self, key: jax.Array, frozen: Frozen, previous: State | None) -> State:
        """Does what `Task.init` says. The first stage's network starts from ``frozen["start"]`` where that is given and
        fits.
        """
        parts, params = self.parts, dict(self.start(key, frozen, previous))
        if previous is None and "start" in frozen:
            first = parts[0]
            params[first.name] = warm_start(first.network, key, frozen["start"])
        return begin(parts, params, self.aux())

    def aux(self) -> Mapping[str, Any]:
        """Gives further arrays of the state at the start; none by default."""
        return {}

    @property
    def role(self) -> str:
        """Gives the role of what is exported."""
        return next(iter(self.models()))

    def export(self, state: State) -> Mapping[str, Any]:
        """Gives the first part's network, averaged where it is."""
        return {self.role: self.parts[0].averaged(state)}

    def opened(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """Does what `Task.opened` says: the arrays as they are."""
        return params

    @property
    def classes_at(self) -> str:
        """Gives the path of the setting that says how many classes the model has; "" where that is a teacher's."""
        return ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Gives the shape of one sample of the data, channels last."""
        shape: tuple[int, ...] = self.models()[self.role].config.network.shape
        return shape

    @property
    def conditions(self) -> Conditions:
        """Gives what the trained model is conditioned on."""
        conditions: Conditions = self.models()[self.role].config.network.conditions
        return conditions

    def data(self, batch: Batch) -> jax.Array:
        """Gives the data of a batch (B, *shape): normalised latents, or images in [-1, 1]."""
        name = next(name for name in self.takes if name in batch)
        return signed(batch["image"]) if name == "image" else batch[name]

    def cond(self, batch: Batch) -> dict[str, jax.Array]:
        """Gives the model's conditions in a batch, by name."""
        names = [n for name, c in self.conditions.items() for n in (name, c.mask) if n]
        return {name: batch[name] for name in names}

    def check(self, row: Mapping[str, np.ndarray]) -> None:
        """Raises GenError, with the flag that helps, for data of another shape or without the model's conditions."""
        found = {name: np.shape(value)[1:] for name, value in row.items()}
        name = next((name for name in self.takes if name in found), None)
        if name is None:
            wanted = " or ".join(f"{name}s" for name in self.takes)
            raise GenError(f"the data hold {', '.join(found) or 'nothing'}; expected {wanted} {self.shape}")
        if found[name] != self.shape:
            advice = f"give data of that shape, or a network of size and channels like {found[name]}"
            if name == "image" and (len(self.shape) != 3 or self.shape[-1] not in (1, 3)):
                advice = "encode the images with a tokenizer first (gen encode TOKENIZER --data IMAGES --out LATENTS)"
            raise GenError(f"the data are {name}s {found[name]}, and the model takes {self.shape}; {advice}")
        for name, condition in self.conditions.items():
            if name == "label" and name not in found:
                raise GenError(
                    f"the data have no labels, and the model has {condition.classes} classes; give data with labels, "
                    "or train without classes (network.num_classes 0 and a guidance of scale 1)"
                )
            for wanted, shape in ((name, condition.shape), (condition.mask, condition.shape[:1])):
                if wanted and found.get(wanted) != shape:
                    has = f"is {found[wanted]}" if wanted in found else "is missing"
                    raise GenError(f"the data's '{wanted}' {has}; the model takes {shape}; make the data with it")
            labels = np.asarray(row[name])
            if condition.classes and ((labels < 0) | (labels >= condition.classes)).any():
                bad = labels[(labels < 0) | (labels >= condition.classes)][0]
                raise GenError(
                    f"the data hold the label {bad}, and the model has the classes 0 to {condition.classes - 1}; give "
                    "the network more classes (network.num_classes) or mend the labels"
                )

    def preview(self, state: State, frozen: Frozen, key: jax.Array, generator: Any) -> Mapping[str, jax.Array]:
        """Gives samples of the exported network (`pictures`)."""
        return pictures(generator, self.opened({**frozen, **self.export(state)}), key)


def pictures(generator: Any, params: Mapping[str, Any], key: jax.Array) -> Mapping[str, jax.Array]:
    """Gives `PICTURES` samples, clipped; equal keys give equal noise.

    None where there is no generator, and for a model whose conditions have no default, such as text.

    Args:
      params: the arrays that the generator needs, by role.
    """
    if generator is None or not has_defaults(generator.conditions):
        return {}
    cond = {k: jnp.asarray(v) for k, v in make_conditions(generator.conditions, range(PICTURES)).items()}
    return {"samples": jnp.clip(generator(params, jax.random.split(key, PICTURES), cond), -1.0, 1.0)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentMethod(Method):
    """A method that turns ``frozen["teacher"]`` into a student, exported as ``net``.

    Attributes:
      teacher: the teacher's Denoiser.
      student: the student's Denoiser where it is another one than the teacher's; arrays that fit are taken over.
      times: the student's times, noise end first; one time makes a one-step generator.
      noise_scale: standard deviation of the student's first input; None for that of the process at the first time.

    Raises GenError for times that do not fall, or none.
    """

    teacher: Any = given("teacher")
    student: Any = None
    times: tuple[float, ...] = (1.0,)
    noise_scale: float | None = None

    def __post_init__(self) -> None:
        if not self.times or any(a <= b for a, b in itertools.pairwise(self.times)):
            raise GenError(f"student times {self.times} must decrease from the noise end; give at least one")

    @property
    def denoiser(self) -> Any:
        """Gives the student's Denoiser."""
        return self.student or self.teacher

    @property
    def first_scale(self) -> float:
        """Gives the standard deviation of the student's first input."""
        process, first = self.denoiser.process, np.float64(self.times[0])
        return float(process.sigma(first)) if self.noise_scale is None else self.noise_scale

    @property
    def student_part(self) -> Part:
        """Gives the part of the trained student."""
        return Part("student", self.denoiser.network, self.optim, self.emas)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Gives the student as the only part."""
        return (self.student_part,)

    def models(self) -> Mapping[str, Model]:
        """Gives the student, with its times."""
        return {"net": Model(self.denoiser, self.times, self.noise_scale)}

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Gives the student of the previous stage, or else what fits of the teacher.

        Raises GenError for a missing frozen teacher.
        """
        if "teacher" not in frozen:
            raise GenError(f"distillation needs the frozen role 'teacher'; got {', '.join(frozen) or 'none'}")
        source = frozen["teacher"] if previous is None else previous.params["student"]
        return {"student": source if self.student is None else warm_start(self.denoiser.network, key, source)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMapMethod(Method):
    """A method that trains a flow map, exported as ``net``: a few-step student that is no denoiser.

    The first stage starts from what fits of ``frozen["teacher"]`` where that is given, else from random weights: the
    same method distils and trains from scratch.

    Attributes:
      flow_map: the trained `gen.diffusion.flowmap.FlowMap`. `gen.diffusion.consistency_maps.consistency_map` and
        `gen.diffusion.flowmap.jump_map` make one of a teacher's Denoiser.
    """

    flow_map: Any

    @property
    def student_part(self) -> Part:
        """Gives the part of the trained flow map."""
        return Part("student", self.flow_map.network, self.optim, self.emas)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Gives the flow map as the only part."""
        return (self.student_part,)

    @property
    def classes_at(self) -> str:
        """Gives the path of the network's number of classes; "" where that is a teacher's."""
        taught = any(f.metadata.get("given") == "teacher" for f in dataclasses.fields(self))
        return "" if taught else f"flow_map.network.{self.flow_map.network.classes_at}"

    def models(self) -> Mapping[str, Model]:
        """Gives the flow map; the run's sampler says by which jumps it is sampled."""
        return {"net": Model(self.flow_map)}

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Gives the student of the previous stage, or else what fits of the teacher, or else random weights."""
        source = previous.params["student"] if previous is not None else frozen.get("teacher")
        network = self.flow_map.network
        return {"student": Network(network).init(key) if source is None else warm_start(network, key, source)}
