"""Images from several students of few steps, each of which knows some of the classes: a router sends each sample to its
student (multi-student distillation, Song et al. 2024, arXiv 2410.23274).

A sample costs the calls of one student, whatever their number.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gen.diffusion.denoiser import Denoiser
from gen.errors import GenError
from gen.nn.network import Cond, Stacked
from gen.sampling.generator import FewSteps, Generator, GeneratorParams, LatentGenerator, decode
from gen.training.task import Model

__all__ = ["Routed", "RoutedGenerator", "Students", "served"]


@dataclasses.dataclass(frozen=True)
class Students:
    """Students of one configuration, and which of them makes which class. Their arrays lie on a leading axis.

    Attributes:
      denoiser: each of them.
      partition: the student of each class.

    Raises GenError for a partition of other classes, and a student without classes.
    """

    denoiser: Denoiser
    partition: tuple[int, ...]

    def __post_init__(self) -> None:
        classes = self.denoiser.network.num_classes
        if len(self.partition) != classes:
            raise GenError(
                f"a partition of {len(self.partition)} classes for a model of {classes}; say for each class which "
                "student makes it"
            )
        if sorted(set(self.partition)) != list(range(self.count)):
            raise GenError(f"the partition {self.partition} leaves a student without classes; number them from 0")

    @property
    def count(self) -> int:
        """Gives the number of students."""
        return 1 + max(self.partition)

    @property
    def network(self) -> Stacked:
        """Gives the networks of all students."""
        return Stacked(self.denoiser.network, self.count)

    @property
    def process(self) -> Any:
        """Gives the process of every student."""
        return self.denoiser.process


@dataclasses.dataclass(frozen=True)
class Routed(FewSteps):
    """The sampler of several students of few steps: each sample goes to the student of its class."""

    def generator(self, models: Mapping[str, Model], tokenizer: Any) -> Generator:
        """Gives the Generator of a run's ``students``; of a stage before them that trains a single one, its own.

        Raises GenError for students that were not trained for few steps, or for so many.
        """
        if "students" not in models:
            return super().generator(models, tokenizer)
        model = models["students"]
        self.expect(model.times)
        return RoutedGenerator(model.config, model.times, model.noise_scale, tokenizer, self.decoding)


def served(part: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Gives which samples each student takes next: at most as many as an equal share.

    Args:
      part: (B,) int32, the student of each sample; `count` for one that is done.
      count: of the students.

    Returns:
      (count, ceil(B / count)) numbers of samples, and whether each place is taken.
    """
    share = -(-part.shape[0] // count)
    waiting = part[None] == jnp.arange(count)[:, None]
    rows = jnp.argsort(~waiting, axis=1, stable=True)[:, :share]
    return rows, jnp.take_along_axis(waiting, rows, axis=1)


@dataclasses.dataclass(frozen=True)
class RoutedGenerator(LatentGenerator):
    """Noise -> the student of each sample's class -> inverse normaliser -> tokenizer decode.

    All students work at once, each on an equal share of the batch; while samples wait, because a batch asks one student
    for more, they work again. A batch with equally many samples for each takes one round, one for a single student as
    many rounds as there are students.

    Attributes:
      students: the networks, and who makes which class.
      times, noise_scale: as in `gen.training.task.Model`.
      tokenizer: a tokenizer config, or None for pixel models.
      decoding: settings of the tokenizer's decoder; None for its own.
    """

    students: Students
    times: tuple[float, ...] = (1.0,)
    noise_scale: float | None = None
    tokenizer: Any = None
    decoding: Any = None

    def __post_init__(self) -> None:
        _ = self.student  # refuses students without times

    @property
    def student(self) -> Any:
        """Gives the Generator of the latents of one student."""
        return FewSteps().generator({"net": Model(self.students.denoiser, self.times, self.noise_scale)}, None)

    @property
    def nfe(self) -> int:
        """Gives the network calls per sample."""
        calls: int = self.student.nfe
        return calls

    @property
    def subject(self) -> Students:
        """Gives the networks of all students, and who makes which class."""
        return self.students

    @property
    def network(self) -> Any:
        """Gives the networks of all students."""
        return self.students.network

    @property
    def networks(self) -> Mapping[str, Any]:
        """Gives the networks of all students, and the tokenizer's."""
        found = {"students": self.network, "tokenizer": self.tokenizer}
        return {role: network for role, network in found.items() if network is not None}

    @property
    def options(self) -> Any:
        """Gives settings of the tokenizer's decoder."""
        return self.decoding

    def latents(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> jax.Array:
        """Gives the generated latents (B, *latent); sample i is made by the student of its label."""
        count, b = self.students.count, keys.shape[0]
        own = {name: cond[name] for c, d in self.network.conditions.items() for name in (c, d.mask) if name}
        part = jnp.asarray(self.students.partition, jnp.int32)[own["label"]]
        make = jax.vmap(lambda net, keys, cond: self.student.latents({"net": net}, keys, cond))

        def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            part, made = state
            rows, taken = served(part, count)
            found = make(params["students"], keys[rows], {name: value[rows] for name, value in own.items()})
            place = jnp.where(taken, rows, b).ravel()  # b lies outside: dropped
            made = made.at[place].set(found.reshape(-1, *self.latent), mode="drop")
            return part.at[place].set(count, mode="drop"), made

        start = part, jnp.zeros((b, *self.latent), jnp.float32)
        return jax.lax.while_loop(lambda state: (state[0] < count).any(), body, start)[1]

    def __call__(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> jax.Array:
        """Does what `gen.sampling.generator.Generator.__call__` says."""
        latents = self.latents(params, keys, cond)
        return decode(self.tokenizer, params, latents, keys=keys, cond=cond, options=self.options)
