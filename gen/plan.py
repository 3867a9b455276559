"""Plans: chains of steps that go on where they were and do nothing twice.

A plan is a tuple of steps (`gen.steps`) in one folder; each has a folder of its own, named after it, and takes what
earlier steps made by their names. A demo, a comparison page or rounds of reflow and self-play are plans::

    steps = [Train("flow-0", base)]
    for k in range(rounds):
        steps += [
            MakeRecords(f"pairs-{k}", f"flow-{k}", count=50_000),
            Train(f"flow-{k + 1}", reflow, {"teacher": f"flow-{k}", "pairs": f"pairs-{k}"}),
        ]
    made = Plan("runs/reflow", tuple(steps), page=compare).run()

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

from gen.config import fingerprint, suggest
from gen.errors import GenError
from gen.files import RunLock, read_json, write_json
from gen.metrics.report import Report
from gen.runs import Loaded
from gen.training.indexed import agreed

__all__ = ["Made", "Plan", "Step"]

_NAMES = "letters, digits, '-' and '_'"
_PAGE = "report.html"
_SETTINGS = "its settings"  # beside names of steps, which have no spaces


class Step(Protocol):
    """One piece of a plan."""

    @property
    def name(self) -> str:
        """Gives the step's name, which is that of its folder."""
        ...

    @property
    def about(self) -> str:
        """Gives what it does, for the line that says that it begins."""
        ...

    @property
    def takes(self) -> Mapping[str, str]:
        """Gives names of earlier steps by what they are to this one."""
        ...

    def settings(self, given: Mapping[str, Any]) -> Any:
        """Gives all that decides what is made, but for the inputs, as JSON. `given`: the inputs, as `open` gives
        them.
        """
        ...

    def run(self, given: Mapping[str, Any], out: Path) -> None:
        """Makes it in the folder `out`, going on where an interrupted call was."""
        ...

    def open(self, out: Path) -> Any:
        """Gives what was made, to be used."""
        ...


@dataclasses.dataclass(frozen=True)
class Plan:
    """Steps in one folder.

    Attributes:
      out: the folder; plan.json there says what is done, and each step's output stands in ``<out>/<step>``.
      steps: in the order in which they run.
      given: runs made elsewhere, by a name that steps may take: a pretrained model that the first round starts from.
      page: gives a page of what all steps made; it is written as report.html when a step was done or it is missing.

    Raises GenError for names that repeat or are no names of folders, and for a step that takes what no earlier one
    makes.
    """

    out: str | Path
    steps: tuple[Step, ...]
    given: Mapping[str, Loaded] = dataclasses.field(default_factory=dict)
    page: Callable[["Made"], Report] | None = None

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
        prints = {name: fingerprint(run.config.sampler) + run.origin for name, run in self.given.items()}
        for number, step in enumerate(self.steps, 1):
            given = {name: made[source] for name, source in step.takes.items()}
            now = {_SETTINGS: fingerprint(step.settings(given))} | {n: prints[n] for n in step.takes.values()}
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
        if self.page is not None and not log.agreed((out / _PAGE).exists()):
            report = self.page(made)
            if jax.process_index() == 0:
                report.write(out / _PAGE)
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
        """Gives the time that each step took; of an interrupted one since it went on."""
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
        return self.agreed("seconds" in self.steps.get(name, {}))

    def agreed(self, answer: bool) -> bool:
        """Process 0's answer, on all; none gives one before all ask."""
        return bool(agreed(np.asarray(answer, np.int32)))

    def _check(self, name: str, now: Mapping[str, str], out: Path) -> None:
        before = self.steps.get(name, {}).get("made of", now)
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if changed:
            what = " and ".join(key if key == _SETTINGS else f"'{key}'" for key in changed)
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
        """The step is under way; a page of what was there before is no longer true."""
        self.steps[name] = {"made of": dict(now)}
        self._write()
        if self.main:
            self.path.with_name(_PAGE).unlink(missing_ok=True)

    def end(self, name: str, seconds: float) -> None:
        """The step is done; nobody opens what it made before process 0 has written that."""
        self.steps[name]["seconds"] = round(seconds, 2)
        self._write()
        self.agreed(True)

    def _write(self) -> None:
        if self.main:
            write_json(self.path, self.steps)
