"""RunConfig: everything that a run folder's config.json says, each thing once; reading it back; comparing two."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gen import own
from gen.config import from_json, to_json
from gen.errors import GenError
from gen.files import read_json, write_json
from gen.training.checkpoints import latest_step, load_meta, load_weights
from gen.training.sharding import MeshConfig
from gen.training.task import Model, Stage, State

__all__ = ["EngineConfig", "RunConfig", "load_config", "load_run", "semantic", "settle_config"]


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How a run is carried out. Only `seed` changes what is computed; the rest may differ when a run goes on.

    Attributes:
      seed: base of initialisation, data order and noise.
      mesh: how devices are laid out.
      log_every: steps between records of metrics.jsonl (means over the steps between).
      checkpoint_every: steps between checkpoints.
      checkpoint_seconds: but not more often than this (one process only; several must agree on the step).
      keep: newest checkpoints kept.
      keep_every: checkpoints at multiples of it are kept for good; 0 for none.
      best: name of a logged metric; of the checkpoints at steps where it was logged, the one where it was lowest is
        kept as well. A step at which a hook gives it is checkpointed. "" for none.
      preview_every: steps between pictures; 0 for one at the end of each stage only.
      nan_patience: skipped steps in a row after which the run stops.
      memory_gib: memory of one device in GiB, which a run must fit; what the device reports if None.
      profile: (first, last) global steps traced with `jax.profiler`, or None.
      tensorboard: also write TensorBoard files.
      wandb: W&B project, or None.
      quiet: no lines on stdout.

    Raises GenError for intervals below 1, and a memory that is not positive.
    """

    seed: int = 0
    mesh: MeshConfig = MeshConfig()
    log_every: int = 50
    checkpoint_every: int = 1000
    checkpoint_seconds: float = 0.0
    keep: int = 2
    keep_every: int = 0
    best: str = ""
    preview_every: int = 0
    nan_patience: int = 10
    memory_gib: float | None = None
    profile: tuple[int, int] | None = None
    tensorboard: bool = False
    wandb: str | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        if min(self.log_every, self.checkpoint_every, self.keep, self.nan_patience) < 1:
            raise GenError("log_every, checkpoint_every, keep and nan_patience are at least 1; set them so")
        if self.memory_gib is not None and not self.memory_gib > 0:
            raise GenError(f"memory_gib is {self.memory_gib}; expected the memory of one device in GiB, such as 80")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything a run folder's config.json says.

    What makes images is not stored: it follows from what the last stage's task exports, `sampler` and `tokenizer`.
    Training, previews, sampling and evaluation therefore cannot disagree.

    Attributes:
      name: of the run, for people.
      stages: trained one after the other; the final state of each is the `previous` of the next. () for published
        weights, which stand in artifacts/ alone.
      frozen: role -> where those arrays came from (a run folder and its fingerprint, a file ...): text.
      sampler: how the trained model makes samples (`gen.sampling.generator`); None for a run that makes none.
      tokenizer: configuration of the tokenizer that decodes them, whose arrays are the artifact "tokenizer"; None for
        models of pixels, and where samples stay latents.
      models: of published weights, what they belong to by role; a run with stages has its task's.
      class_names: what the classes are called, in order, as the data say; () where they do not.
      engine: how it is carried out.
    """

    name: str
    stages: tuple[Stage, ...] = ()
    frozen: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sampler: Any = None
    tokenizer: Any = dataclasses.field(default=None, metadata={"given": "tokenizer"})
    models: Mapping[str, Model] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] = dataclasses.field(default=(), metadata={"given": "data"})
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise GenError(f"run '{self.name}' has stages {names}; expected different names")
        for stage in self.stages:
            if stage.steps < 1:
                raise GenError(f"stage '{stage.name}' has {stage.steps} steps; expected at least 1")
        if self.stages and self.models:
            raise GenError(f"run '{self.name}' has stages and models; the models of a trained run are its task's")
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            _check_successor(before, after)

    @property
    def steps(self) -> int:
        """Steps of all stages together: the last global step."""
        return sum(stage.steps for stage in self.stages)

    def exported(self, stage: Stage | None = None) -> Mapping[str, Model]:
        """Gives what the parameters of `stage` (the last by default), or the published weights, belong to, by role."""
        if not self.stages:
            return self.models
        models: Mapping[str, Model] = (stage or self.stages[-1]).task.models()
        return models

    def generator(self, stage: Stage | None = None) -> Any:
        """Gives the Generator of what `stage` (the last by default) exports; None for a run without a sampler."""
        return None if self.sampler is None else self.sampler.generator(self.exported(stage), self.tokenizer)


def _check_successor(before: Stage, after: Stage) -> None:
    """Raises GenError where a stage goes on with another model than the one before it trained.

    Its native loss may be another one: it is what such stages differ in.
    """
    old, new = ({role: _evaluated(model.config) for role, model in s.task.models().items()} for s in (before, after))
    for role in set(old) & set(new):
        found = first_difference(old[role], new[role])
        if found is not None:
            where, was, now = found
            raise GenError(
                f"stage '{after.name}' goes on with the '{role}' of stage '{before.name}', but its {where} is {now} "
                f"and not {was}; change both stages alike"
            )


def _evaluated(config: Any) -> Any:
    """The JSON of a model without its loss."""
    data = to_json(config)
    return {k: v for k, v in data.items() if k != "objective"} if isinstance(data, dict) else data


def load_config(run_dir: str | Path) -> RunConfig:
    """Gives the configuration of a run folder; files of own kinds are imported if they are what the run recorded.

    Raises GenError when there is none, one that this version cannot read, or own kinds whose file has changed.
    """
    path = Path(run_dir) / "config.json"
    if not path.exists():
        raise GenError(f"{run_dir} is not a run folder (no config.json); give the folder that `gen train` wrote")
    data = read_json(path)
    if isinstance(data, dict) and "generator" in data:
        raise GenError(
            f"{run_dir} was written by gen 0.1, whose configurations said the same thing in several places; this "
            "version does not read them: use it with `pip install gen-image==0.1.0`, or train it again"
        )
    own.admit(run_dir)
    config: RunConfig = from_json(data, RunConfig)
    return config


def load_run(run_dir: str | Path, step: int | None = None) -> tuple[RunConfig, Stage, State]:
    """Gives a run's configuration, the stage its checkpoint (the newest by default) is in, and the weights there."""
    config = load_config(run_dir)
    step = latest_step(run_dir) if step is None else step
    meta = load_meta(run_dir, step)
    return config, config.stages[meta["stage_index"]], load_weights(run_dir, step)


def semantic(config: RunConfig) -> Any:
    """Gives the part of a run's JSON that decides what is computed; where the data lie is no part of it."""
    data, free = to_json(config, places=False), ("engine", "sampler", "class_names")
    return {k: v for k, v in data.items() if k not in free} | {"seed": data["engine"]["seed"]}


def settle_config(config: RunConfig, outdir: Path, *, write: bool) -> None:
    """Writes config.json and the record of own kinds, or compares with those in the folder.

    Raises:
      GenError: a folder of another configuration. The last stage may get more steps, unless what it does depends on
        its length; and the data may lie elsewhere now, for each checkpoint says what they were.
    """
    path, old = outdir / "config.json", None
    if path.exists():
        old = load_config(outdir)
        done = latest_step(outdir) if any((outdir / "checkpoints").glob("[0-9]*/meta/metadata")) else 0
        difference = first_difference(_extensible(old), _extensible(config))
        if difference is None and config.steps < done:
            difference = ("steps", f"{done} already done", config.steps)
        if difference is not None:
            where, was, now = difference
            raise GenError(
                f"{outdir} was made with {where} = {was}, this run has {now}; use the same configuration or another "
                "output folder"
            )
        if done and config.stages:
            _check_moved(old, config, load_meta(outdir, done))
        was = old.stages[-1].steps
        if done and was != config.stages[-1].steps and config.stages[-1].task.derived:
            raise GenError(
                f"{outdir} was trained with a schedule over {was} steps of stage '{config.stages[-1].name}', which "
                f"cannot become {config.stages[-1].steps}: start anew in another output folder, with --from {outdir} "
                "to go on from its weights"
            )
    if write:
        own.write_record(outdir, own.record(config))
        if old is None or to_json(old) != to_json(config):
            write_json(path, to_json(config))


def _check_moved(old: RunConfig, new: RunConfig, meta: Mapping[str, Any]) -> None:
    """Raises GenError where data that lie elsewhere now are not those of the newest checkpoint."""
    data, index = [to_json(config.stages[meta["stage_index"]].data) for config in (old, new)], meta["stage_index"]
    if data[0] != data[1] and (found := new.stages[index].data.identity()) != meta["data"]:
        _, was, now = first_difference(*data) or ("", "", "")
        raise GenError(
            f"the data of stage '{new.stages[index].name}' are not those it was trained on, which lay at {was} "
            f"({meta['data']}; {now} holds {found}); give the same data or another output folder"
        )


def _extensible(config: RunConfig) -> Any:
    data = semantic(config)
    *head, last = data["stages"]
    return data | {"stages": [*head, {k: v for k, v in last.items() if k != "steps"}]}


def first_difference(old: Any, new: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """Gives (path, old value, new value) of the first leaf in which two JSON values differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*new, *(k for k in old if k not in new)]:
            place = f"{where}.{key}" if where else str(key)
            if (key in old) != (key in new):
                return place, old.get(key, "(absent)"), new.get(key, "(absent)")
            found = first_difference(old[key], new[key], place)
            if found:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = (first_difference(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(old, new, strict=True)))
        return next((found for found in pairs if found), None)
    return None if old == new else (where, old, new)
