"""Plans: chains of steps (train, encode, records, evaluate) that go on where they were and do nothing twice.

A plan is a tuple of steps in one folder; each has a folder of its own, named after it, and takes what earlier steps
made by their names. A demo, a comparison page or rounds of reflow and self-play are plans::

    steps = [Train("flow-0", base)]
    for k in range(rounds):
        steps += [
            MakeRecords(f"pairs-{k}", f"flow-{k}", count=50_000),
            Train(f"flow-{k + 1}", reflow, {"teacher": f"flow-{k}", "pairs": f"pairs-{k}"}),
        ]
    made = Plan("runs/reflow", tuple(steps)).run()

A step is recognised by its fingerprint: its settings and the fingerprints of what it takes. A step that is done is
left alone, an interrupted one goes on, and one whose settings or inputs changed is refused, unless it is to be redone.
"""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from gen.config import fingerprint, suggest, to_json
from gen.data.caches import Cache
from gen.errors import GenError
from gen.files import RunLock, read_json, write_json
from gen.metrics.protocol import Result
from gen.nn.conditions import make_conditions
from gen.runs import Loaded, load
from gen.sampling.records import Records, Solved, make_records
from gen.tokenizers.encode import encode_images
from gen.training.engine import train
from gen.training.indexed import agreed
from gen.training.sharding import make_mesh

__all__ = ["Encode", "Evaluate", "MakeRecords", "Plan", "Recipe", "Step", "Train"]

_NAMES = "letters, digits, '-' and '_'"


class Recipe(Protocol):
    """What `gen.training.engine.train` needs: a RunConfig, and arrays by role."""

    @property
    def config(self) -> Any: ...
    @property
    def frozen(self) -> Mapping[str, Any]: ...
    @property
    def artifacts(self) -> Mapping[str, Any]: ...


class Step(Protocol):
    """One piece of a plan."""

    @property
    def name(self) -> str:
        """Its name, and that of its folder."""
        ...

    @property
    def about(self) -> str:
        """What it does, for the line that says that it begins."""
        ...

    @property
    def takes(self) -> Mapping[str, str]:
        """Names of earlier steps by what they are to this one."""
        ...

    def settings(self, given: Mapping[str, Any]) -> Any:
        """All that decides what is made, but for the inputs, as JSON. `given`: the inputs, as `open` gives them."""
        ...

    def run(self, given: Mapping[str, Any], out: Path) -> None:
        """Makes it in the folder `out`, going on where an interrupted call was."""
        ...

    def open(self, out: Path) -> Any:
        """What was made, to be used."""
        ...


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
      about: what it is for, in a line; printed when it begins.
    """

    name: str
    recipe: Callable[..., Recipe]
    takes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def settings(self, given: Mapping[str, Any]) -> Any:
        """The run's configuration; of how it is carried out only the seed."""
        config = to_json(self.recipe(**given).config)
        return config | {"engine": {"seed": config["engine"]["seed"]}}

    def run(self, given: Mapping[str, Any], out: Path) -> None:
        """See `Step`."""
        recipe = self.recipe(**given)
        train(recipe.config, out, frozen=recipe.frozen, artifacts=recipe.artifacts)

    def open(self, out: Path) -> Loaded:
        """The run, with its averaged weights."""
        return load(out)


@dataclasses.dataclass(frozen=True)
class Encode(_About):
    """Images to a cache of latents.

    Attributes:
      name: of the step.
      tokenizer: the step that trained the tokenizer.
      data: the images (`gen.data`), with a method ``source``.
      batch: images at a time; changes nothing but speed and memory.
      about: what it is for, in a line; printed when it begins.
    """

    name: str
    tokenizer: str
    data: Any
    batch: int = 256

    @property
    def takes(self) -> Mapping[str, str]:
        """See `Step`."""
        return {"tokenizer": self.tokenizer}

    def settings(self, given: Mapping[str, Any]) -> Any:
        """The identity of the images."""
        del given
        return {"data": self.data.identity()}

    def run(self, given: Mapping[str, Any], out: Path) -> None:
        """See `Step`."""
        own = given["tokenizer"]
        source = self.data.source()
        encode_images(
            own.tokenizer,
            own.params["tokenizer"],
            source,
            out,
            identity=self.data.identity(),
            batch=self.batch,
            mesh=_mesh(),
        )

    def open(self, out: Path) -> Cache:
        """The cache."""
        return Cache(str(out))


@dataclasses.dataclass(frozen=True)
class MakeRecords(_About):
    """What a teacher makes of noise (`gen.sampling.records`).

    Attributes:
      name: of the step.
      teacher: the step that trained it; a solver samples it.
      count: number of rows; classes in turn.
      points: solver steps after which the state is kept, for paths.
      sampler: in place of the teacher's own sampler, or None.
      batch: rows at a time; changes nothing but speed and memory.
      about: what it is for, in a line; printed when it begins.
    """

    name: str
    teacher: str
    count: int
    points: tuple[int, ...] = ()
    sampler: Any = None
    batch: int = 1024

    @property
    def takes(self) -> Mapping[str, str]:
        """See `Step`."""
        return {"teacher": self.teacher}

    def _make(self, teacher: Loaded) -> Solved:
        generator = teacher.generator
        if self.sampler is not None:
            generator = dataclasses.replace(generator, sampler=self.sampler)
        return Solved(generator, self.points)

    def settings(self, given: Mapping[str, Any]) -> Any:
        """Number and solver."""
        return {"count": self.count, "make": self._make(given["teacher"]).identity}

    def run(self, given: Mapping[str, Any], out: Path) -> None:
        """See `Step`."""
        teacher = given["teacher"]
        make = self._make(teacher)
        make_records(
            make,
            teacher.params,
            out,
            count=self.count,
            maker=teacher.origin,
            cond=make_conditions(make.generator.conditions, np.arange(self.count)),
            batch=self.batch,
            mesh=_mesh(),
        )

    def open(self, out: Path) -> Records:
        """The records, for students of this teacher."""
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
        """The options."""
        del given
        return {"options": self.options}

    def run(self, given: Mapping[str, Any], out: Path) -> None:
        """Writes a file for each subject; they are read back in the order in which `score` gave them."""
        results = self.score(**given)
        if jax.process_index() == 0:
            for number, result in enumerate(results.values()):
                result.save(out / f"{number}.json")
            write_json(out / "subjects.json", list(results))

    def open(self, out: Path) -> dict[str, Result]:
        """The results by subject."""
        return {name: Result.load(out / f"{i}.json") for i, name in enumerate(read_json(out / "subjects.json"))}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Steps in one folder.

    Attributes:
      out: the folder; plan.json there says what is done, and each step's output stands in ``<out>/<step>``.
      steps: in the order in which they run.
      given: runs made elsewhere, by a name that steps may take: a pretrained model that the first round starts from.

    Raises GenError for names that repeat or are no names of folders, and for a step that takes what no earlier one
    makes.
    """

    out: str | Path
    steps: tuple[Step, ...]
    given: Mapping[str, Loaded] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        known = list(self.given)
        for step in self.steps:
            if step.name in known or not step.name.replace("-", "").replace("_", "").isalnum():
                raise GenError(f"step '{step.name}'; expected a name of its own made of {_NAMES}")
            for name in step.takes.values():
                if name not in known:
                    raise GenError(f"step '{step.name}' takes '{name}', which no step before it makes; put it first")
            known.append(step.name)

    def run(self, redo: Sequence[str] = ()) -> "Made":
        """Does what is left to do, with a line for each step, and gives what all steps made.

        Args:
          redo: steps whose folders are deleted and made again, and with them all that take what they made.

        Raises GenError for a step whose settings or inputs changed since it was begun, an unknown name in `redo`, a
        folder that another process works in, and what the steps raise.
        """
        out, names = Path(self.out), [step.name for step in self.steps]
        for name in redo:
            if name not in names:
                raise GenError(f"no step is called '{name}'; {suggest(name, names)}")
        with RunLock(out) if jax.process_index() == 0 else contextlib.nullcontext():
            return self._run(out, set(redo))

    def _run(self, out: Path, redo: set[str]) -> "Made":
        made, log = Made(self), _Log(out / "plan.json")
        prints = {name: fingerprint(run.config) + run.origin for name, run in self.given.items()}
        for number, step in enumerate(self.steps, 1):
            given = {name: made[source] for name, source in step.takes.items()}
            now = {"settings": fingerprint(step.settings(given))} | {n: prints[n] for n in step.takes.values()}
            prints[step.name] = fingerprint(now)
            if step.name in redo or redo & set(step.takes.values()):
                redo.add(step.name)
                log.forget(step.name, out / step.name)
            done = log.done(step.name, now, out)
            log.say(f"[{number}/{len(self.steps)}] {step.name}: {'done before' if done else step.about or 'begins'}")
            if not done:
                log.begin(step.name, now)
                began = time.monotonic()
                step.run(given, out / step.name)
                log.end(step.name, time.monotonic() - began)
        return made


class Made(Mapping[str, Any]):
    """What the steps of a plan made, by name, opened when it is asked for."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._steps = plan, {step.name: step for step in plan.steps}
        self._open: dict[str, Any] = dict(plan.given)

    def __getitem__(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = self._steps[name].open(Path(self._plan.out) / name)
        return self._open[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._plan.given, *self._steps])

    def __len__(self) -> int:
        return len(self._plan.given) + len(self._steps)

    @property
    def seconds(self) -> dict[str, float]:
        """Time that each step took; of an interrupted one since it went on."""
        steps = read_json(Path(self._plan.out) / "plan.json")
        return {name: float(steps[name]["seconds"]) for name in self._steps}


class _Log:
    """plan.json: for each step begun what it was made of ("made of"), and its seconds once it is done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: dict[str, dict[str, Any]] = read_json(path) if path.exists() else {}
        self.main = jax.process_index() == 0

    def say(self, line: str) -> None:
        if self.main:
            print(line, flush=True)

    def done(self, name: str, now: Mapping[str, str], out: Path) -> bool:
        """Whether the step is done. Raises GenError when it was begun from other things than these.

        Process 0 looks, for all: the others may see what it writes meanwhile.
        """
        if self.main:
            self._check(name, now, out)
        return bool(agreed(np.asarray("seconds" in self.steps.get(name, {}), np.int32)))

    def _check(self, name: str, now: Mapping[str, str], out: Path) -> None:
        before = self.steps.get(name, {}).get("made of", now)
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if changed:
            what = " and ".join("its settings" if key == "settings" else f"'{key}'" for key in changed)
            raise GenError(
                f"step '{name}' in {out} was made before {what} changed; choose another folder, or redo it on purpose: "
                f"run(redo=['{name}'])"
            )
        if name not in self.steps and (out / name).exists():
            raise GenError(f"{out / name} exists and is not of this plan; choose another folder")

    def forget(self, name: str, folder: Path) -> None:
        """Deletes what the step made; only what this plan made."""
        if self.main and name in self.steps:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(folder.with_name(f"{name}.partial"), ignore_errors=True)
        self.steps.pop(name, None)
        self._write()

    def begin(self, name: str, now: Mapping[str, str]) -> None:
        self.steps[name] = {"made of": dict(now)}
        self._write()

    def end(self, name: str, seconds: float) -> None:
        self.steps[name]["seconds"] = round(seconds, 2)
        self._write()

    def _write(self) -> None:
        if self.main:
            write_json(self.path, self.steps)


def _mesh() -> Any:
    """The mesh of all devices, where there are several."""
    return make_mesh() if jax.device_count() > 1 else None
