"""The steps that a plan (`gen.plan`) is made of: training a run, encoding images, a teacher's records, scores."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from gen.config import to_json
from gen.data.caches import BitCache, Cache, TokenCache
from gen.data.loader import gathered
from gen.data.sources import ArraySource
from gen.errors import GenError
from gen.files import read_json, write_json
from gen.metrics.protocol import Result
from gen.nn.conditions import class_count, make_conditions
from gen.runs import Loaded, load
from gen.sampling.records import Records, Solved, make_records
from gen.tokenizers.encode import encode_images
from gen.training.checkpoints import best_step
from gen.training.engine import Hook, train
from gen.training.sharding import make_mesh

__all__ = ["Encode", "Evaluate", "MakeRecords", "RecipeLike", "Train"]

_SUBJECTS = "subjects.json"  # of scores: subject -> file


class RecipeLike(Protocol):
    """What `gen.training.engine.train` needs: a RunConfig, and arrays by role."""

    @property
    def config(self) -> Any: ...
    @property
    def frozen(self) -> Mapping[str, Any]: ...
    @property
    def artifacts(self) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class _About:
    about: str = dataclasses.field(default="", kw_only=True)


@dataclasses.dataclass(frozen=True)
class Train(_About):
    """Trains a run.

    Attributes:
      name: of the step.
      recipe: gives the recipe from the inputs, by their names: a preset's function, say.
      takes: input name -> step.
      hooks: gives from the recipe what is done during training (`gen.training.engine.Hook`), such as scores; None for
        nothing. It is no part of the settings.
      best: whether later steps take the checkpoint where the metric ``engine.best`` of the recipe was lowest, in place
        of the last one: rounds of DDO (arXiv 2503.01103) get better and then worse.
      about: what it is for, in a line; printed when it begins.
    """

    name: str
    recipe: Callable[..., RecipeLike]
    takes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    hooks: Callable[[RecipeLike], Sequence[Hook]] | None = None
    best: bool = False

    def settings(self, given: Mapping[str, Any]) -> Any:
        """Gives the run's configuration, of how it is carried out only the seed, and of the data what they are.

        Raises GenError for ``best`` where the recipe names no metric.
        """
        recipe = self.recipe(**given)
        config = to_json(recipe.config, places=False)
        if self.best and not config["engine"]["best"]:
            raise GenError(
                f"step '{self.name}' is to give its best checkpoint, and its recipe does not say by which metric; "
                "set engine.best to the name of a logged one"
            )
        decisive = {"seed": config["engine"]["seed"]} | ({"best": config["engine"]["best"]} if self.best else {})
        return config | {"engine": decisive, "data": [stage.data.identity() for stage in recipe.config.stages]}

    def run(self, given: Mapping[str, Any], out: Path) -> None:
        """Does what `gen.plan.Step.run` says."""
        recipe = self.recipe(**given)
        hooks = () if self.hooks is None else self.hooks(recipe)
        train(recipe.config, out, frozen=recipe.frozen, artifacts=recipe.artifacts, hooks=hooks)

    def open(self, out: Path) -> Loaded:
        """Gives the run, with its averaged weights."""
        return load(out, step=best_step(out) if self.best else None)


@dataclasses.dataclass(frozen=True)
class Encode(_About):
    """Images to a cache of latents, tokens or bits.

    Attributes:
      name: of the step.
      tokenizer: the step that trained the tokenizer.
      data: the images (`gen.data`), with the methods ``source`` and ``identity``.
      count: how many are encoded, the first ones; None for all.
      batch: images at a time; changes nothing but speed and memory.
      about: what it is for, in a line; printed when it begins.
    """

    name: str
    tokenizer: str
    data: Any
    count: int | None = None
    batch: int = 256

    @property
    def takes(self) -> Mapping[str, str]:
        """Does what `gen.plan.Step.takes` says."""
        return {"tokenizer": self.tokenizer}

    def settings(self, given: Mapping[str, Any]) -> Any:
        """Gives the identity of the images."""
        del given
        return {"data": self._identity}

    @property
    def _identity(self) -> str:
        all_of_them: str = self.data.identity()
        return all_of_them if self.count is None else f"the first {self.count} of {all_of_them}"

    def run(self, given: Mapping[str, Any], out: Path) -> None:
        """Does what `gen.plan.Step.run` says."""
        own = given["tokenizer"]
        source = self.data.source()
        if self.count is not None:
            first = gathered(source, np.arange(min(self.count, len(source))))
            source = ArraySource(source.class_names, **first)
        encode_images(
            own.tokenizer,
            own.params["tokenizer"],
            source,
            out,
            identity=self._identity,
            batch=self.batch,
            mesh=_mesh(),
            label=self.name,
        )

    def open(self, out: Path) -> Cache | TokenCache | BitCache:
        """Gives the cache that was written."""
        kinds = {kind.kind: kind for kind in (Cache, TokenCache, BitCache)}
        return kinds[read_json(out / "cache.json")["kind"]](str(out))


@dataclasses.dataclass(frozen=True)
class MakeRecords(_About):
    """What a teacher makes of noise (`gen.sampling.records`).

    Attributes:
      name: of the step.
      teacher: the step that trained it; a solver samples it.
      count: number of rows; classes in turn.
      points: solver steps after which the state is kept, for paths.
      sampler: in place of the teacher's own sampler, or None.
      make: gives from the teacher's generator what is stored (`gen.sampling.records.Make`); None for what its solver
        does.
      shares: of the classes among the rows, in order; () for classes in turn.
      batch: rows at a time; changes nothing but speed and memory.
      about: what it is for, in a line; printed when it begins.
    """

    name: str
    teacher: str
    count: int
    points: tuple[int, ...] = ()
    sampler: Any = None
    make: Callable[[Any], Any] | None = None
    shares: tuple[float, ...] = ()
    batch: int = 1024

    @property
    def takes(self) -> Mapping[str, str]:
        """Does what `gen.plan.Step.takes` says."""
        return {"teacher": self.teacher}

    def _make(self, teacher: Loaded) -> Any:
        generator = teacher.generator
        if self.make is not None:
            return self.make(generator)
        if self.sampler is not None:
            generator = dataclasses.replace(generator, sampler=self.sampler)
        return Solved(generator, self.points)

    def settings(self, given: Mapping[str, Any]) -> Any:
        """Gives the number of rows and the solver."""
        made = {"count": self.count, "make": self._make(given["teacher"]).identity}
        return made | ({"shares": self.shares} if self.shares else {})

    def _labels(self, conditions: Any) -> dict[str, np.ndarray]:
        """Labels drawn by the shares of the classes, of row i by i alone; {} for classes in turn."""
        if not self.shares:
            return {}
        classes = class_count(conditions) or 0
        if len(self.shares) != classes or min(self.shares) < 0.0 or not sum(self.shares) > 0.0:
            raise GenError(
                f"step '{self.name}' has {len(self.shares)} shares for {classes} classes; give one for each, not "
                "negative and not all 0"
            )
        places = np.cumsum(np.asarray(self.shares) / sum(self.shares))
        spread = (np.arange(self.count) + 0.5) * 0.6180339887498949 % 1.0  # evenly spread, whatever the count
        return {"label": np.minimum(np.searchsorted(places, spread), classes - 1).astype(np.int32)}

    def run(self, given: Mapping[str, Any], out: Path) -> None:
        """Does what `gen.plan.Step.run` says."""
        teacher = given["teacher"]
        make = self._make(teacher)
        make_records(
            make,
            teacher.params,
            out,
            count=self.count,
            maker=teacher.origin,
            cond=make_conditions(
                make.generator.conditions, np.arange(self.count), self._labels(make.generator.conditions)
            ),
            batch=self.batch,
            mesh=_mesh(),
            label=self.name,
        )

    def open(self, out: Path) -> Records:
        """Gives the records, for students of this teacher."""
        return Records(str(out), str(read_json(out / "records.json")["maker"]))


@dataclasses.dataclass(frozen=True)
class Evaluate(_About):
    """Scores of what earlier steps made.

    Attributes:
      name: of the step.
      score: gives a `gen.metrics.protocol.Result` by subject, from the inputs by their names.
      takes: input name -> step.
      options: all else that the scores depend on, as JSON: counts, seeds, the reference's name.
      about: what it is for, in a line; printed when it begins.
    """

    name: str
    score: Callable[..., Mapping[str, Result]]
    takes: Mapping[str, str]
    options: Any = None

    def settings(self, given: Mapping[str, Any]) -> Any:
        """Gives the options as they are."""
        del given
        return {"options": self.options}

    def run(self, given: Mapping[str, Any], out: Path) -> None:
        """Writes a file for each subject; they are read back in the order in which `score` gave them.

        Raises GenError for two subjects whose files would share a name.
        """
        results = self.score(**given)
        files = {name: re.sub(r"[^\w.]+", "-", name).strip("-") + ".json" for name in results}
        if len(set(files.values())) < len(files):
            raise GenError(f"step '{self.name}' scores {', '.join(files)}; their files would share a name; rename them")
        if jax.process_index() == 0:
            for name, result in results.items():
                result.save(out / files[name])
            write_json(out / _SUBJECTS, files)

    def open(self, out: Path) -> dict[str, Result]:
        """Gives the results by subject."""
        return {name: Result.load(out / file) for name, file in read_json(out / _SUBJECTS).items()}


def _mesh() -> Any:
    """The mesh of all devices, where there are several."""
    return make_mesh() if jax.device_count() > 1 else None
