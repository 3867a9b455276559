"""``gen demo``, ``gen train`` and ``gen distill``."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from gen.cli.start import ALONE, Job, Multihost, start
from gen.errors import GenError

__all__ = ["Training", "demo", "distill", "prepare", "train"]

Overrides = Annotated[tuple[tuple[str, str], ...], tyro.conf.Suppress]


@dataclasses.dataclass(frozen=True)
class Training:
    """The flags that all commands have that train.

    Attributes:
      steps: training steps of the last stage (the only one of most presets).
      batch: global batch size of every stage.
      batch_gpu: samples per device at a time; gradients are accumulated up to the batch.
      seed: of initial weights, data order and noise.
      profile: steps to record with the profiler, into OUTDIR/profile (for TensorBoard or Perfetto).
      monitor: real images, or statistics of gen reference: score samples against them while training.
      monitor_every: steps between scores; each also makes a checkpoint.
      monitor_count: samples per score, always of the same seeds and balanced classes.
      monitor_extractor: the feature network, as for gen evaluate.
      dry_run: show parameters, shardings and bytes per device, then stop.
    """

    steps: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    batch: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    batch_gpu: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    seed: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    profile: Annotated[str | None, tyro.conf.arg(metavar="FIRST-LAST")] = None
    monitor: Annotated[str | None, tyro.conf.arg(metavar="REFERENCE")] = None
    monitor_every: Annotated[int, tyro.conf.arg(metavar="N")] = 5000
    monitor_count: Annotated[int, tyro.conf.arg(metavar="N")] = 5000
    monitor_extractor: Annotated[str, tyro.conf.arg(metavar="NAME")] = "digits-extractor"
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


USUAL = Training()
How = Annotated[Training, tyro.conf.arg(name="")]  # its fields are flags of the command


def demo(
    outdir: Path = Path("runs/demo"), smoke: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False, seed: int = 0
) -> None:
    """Trains a tokenizer, a flow transformer and its one-step student on handwritten digits, and scores them.

    Takes minutes on a laptop. OUTDIR/report.html shows everything; OUTDIR/tokenizer, teacher and student are run
    folders. Interrupted and started again, it goes on where it was.

    Examples:
      gen demo
      gen demo --outdir /tmp/try --smoke

    Args:
      outdir: where everything is written.
      smoke: a run of seconds that checks the path, not the quality.
      seed: of initial weights, data order and noise.
    """
    from gen.experiments import demo as experiment

    experiment.run(outdir, smoke=smoke, seed=seed)


def train(
    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")],
    /,
    *,
    outdir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    data: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None,
    teacher: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None,
    tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None,
    training: How = USUAL,
    multihost: Multihost = ALONE,
    overrides: Overrides = (),
) -> None:
    """Trains a preset into a run folder; the same command again resumes there, or says that all is done.

    Any setting of the preset can be overridden by its path, as gen info PRESET shows it. With --monitor the averaged
    weights are sampled while training, their Frechet distance is logged and drawn on the page of gen report, and the
    checkpoint where it was lowest is kept.

    Examples:
      gen train demo-tokenizer --outdir runs/tok
      gen train demo-tokenizer --outdir runs/tok --stages.0.steps 200 --engine.log_every 20
      gen train demo-tokenizer --outdir runs/tok --engine.mesh.fsdp 4 --batch 1024 --batch-gpu 32
      gen train demo-tokenizer --dry-run
      gen train edm-cifar10 --data cifar10.zip --monitor cifar10.npz --monitor-extractor inception:legacy_tensorflow

    Args:
      preset: a name from gen list; --preset NAME is the same.
      outdir: the run folder; runs/PRESET by default.
      data: the data or latent cache, for presets that take one.
      teacher: the teacher's run folder, for presets that take one.
      tokenizer: the tokenizer's run folder, for presets that take one.
      training: how it is trained.
      multihost: the job that this process belongs to.
    """
    from gen.experiments import find

    find(preset)  # a misspelt name is told at once
    start(multihost)
    recipe = prepare(
        preset,
        {"data": data, "teacher": teacher, "tokenizer": tokenizer},
        overrides,
        {name: getattr(training, name) for name in ("steps", "batch", "seed", "profile")},
    )
    outdir = outdir or Path("runs") / preset
    from gen.training import engine

    if training.dry_run:
        engine.dry_run(recipe.config, frozen=recipe.frozen, batch_gpu=training.batch_gpu)
        return
    hooks: tuple[Any, ...] = ()
    if training.monitor is not None:
        recipe, hooks = _monitored(recipe, outdir, training, training.monitor)
    engine.train(
        recipe.config,
        outdir,
        frozen=recipe.frozen,
        artifacts=recipe.artifacts,
        batch_gpu=training.batch_gpu,
        hooks=hooks,
    )


def _monitored(recipe: Any, outdir: Path, training: Training, reference: str) -> tuple[Any, tuple[Any, ...]]:
    """The recipe that keeps its best checkpoint, and the hook; writes the protocol of its numbers to monitor.json."""
    import jax

    from gen.cli.evaluate import open_extractor, open_reference
    from gen.config import to_json
    from gen.files import write_json
    from gen.metrics.monitor import METRIC, monitor
    from gen.metrics.sources import LABEL_RULES
    from gen.runs import classes
    from gen.training.sharding import make_mesh

    config, network, count = recipe.config, open_extractor(training.monitor_extractor), training.monitor_count
    held, _ = open_reference(reference, network, 256, make_mesh(config.engine.mesh))
    number, rule = classes(config.generator), "seed mod classes"
    hook, protocol = monitor(
        config,
        held,
        network,
        every=training.monitor_every,
        count=count,
        artifacts=recipe.artifacts,
        labels=None if number is None else LABEL_RULES[rule](range(count), number),
        rule=rule,
    )
    if jax.process_index() == 0:
        write_json(outdir / "monitor.json", to_json(protocol))
    best = dataclasses.replace(config.engine, best=config.engine.best or METRIC)
    return dataclasses.replace(recipe, config=dataclasses.replace(config, engine=best)), (hook,)


def distill(
    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")],
    /,
    *,
    teacher: Annotated[Path, tyro.conf.arg(metavar="RUN")],
    outdir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    data: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None,
    pairs: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    training: How = USUAL,
    multihost: Multihost = ALONE,
    overrides: Overrides = (),
) -> None:
    """Trains a student of a teacher run: gen train with a teacher.

    Students that regress on stored pairs (starting noise and where the teacher's solver takes it) read them from
    --data; --pairs makes them first, in OUTDIR/pairs.

    Examples:
      gen distill demo-student --teacher runs/demo/teacher --pairs 8192 --outdir runs/student
      gen distill demo-student --teacher runs/demo/teacher --data runs/student/pairs --outdir runs/student2 --seed 1
      gen distill demo-student --teacher runs/demo/teacher --pairs 8192 --monitor digits.npz --monitor-every 500

    Args:
      preset: a name from gen list; --preset NAME is the same.
      teacher: the teacher's run folder; its EMA weights are used.
      outdir: the run folder; runs/PRESET by default.
      data: the data, latent cache or teacher records, for presets that take them.
      pairs: how many pairs of the teacher to store and train on; classes in turn.
      training: how it is trained.
      multihost: the job that this process belongs to.
    """
    if pairs is not None:
        if pairs < 1 or data is not None:
            wrong = f"--pairs {pairs}" if data is None else "--data and --pairs together"
            raise GenError(f"{wrong} makes no data to train on; give a positive number of pairs, or the data alone")
        folder = (outdir or Path("runs") / preset) / "pairs"
        data = str(folder)
        if not training.dry_run:
            _store_pairs(preset, teacher, folder, pairs, multihost)
    train(
        preset,
        outdir=outdir,
        data=data,
        teacher=teacher,
        training=training,
        multihost=multihost,
        overrides=overrides,
    )


def _store_pairs(preset: str, teacher: Path, folder: Path, count: int, multihost: Job) -> None:
    """Makes `count` pairs of a teacher where they are missing."""
    from gen.experiments import find

    find(preset)
    start(multihost)
    import numpy as np

    from gen.runs import labels_for, load
    from gen.sampling.records import Solved, make_records
    from gen.training.sharding import make_mesh

    loaded = load(teacher)
    generator = loaded.generator
    if not hasattr(generator, "sampler"):
        raise GenError(f"{teacher} makes images in one step; give a teacher that a solver samples")
    make_records(
        Solved(generator),
        loaded.params,
        folder,
        count=count,
        maker=loaded.origin,
        cond=labels_for(generator, np.arange(count), None),
        mesh=make_mesh(),
        label="pairs",
    )


def prepare(
    preset: str,
    inputs: dict[str, Any],
    overrides: tuple[tuple[str, str], ...] = (),
    short: Mapping[str, Any] | None = None,
) -> Any:
    """The recipe of a preset with its inputs loaded and its settings overridden.

    Args:
      inputs: paths by input name, None where not given; runs are loaded with their EMA weights.
      overrides: (path, text) pairs.
      short: settings under their short names: steps, batch, seed, profile ("FIRST-LAST"); None where not given.
    Raises GenError for an unknown preset, key or value, or an input that is missing or no run.
    """
    from gen.cli.overrides import override
    from gen.experiments import build, find
    from gen.sampling.seeds import parse_range

    find(preset)
    given = {name: path for name, path in inputs.items() if path is not None}
    if set(given) - {"data"}:
        from gen.runs import load

        given = {name: path if name == "data" else load(path) for name, path in given.items()}
    recipe = build(preset, given)
    stages = range(len(recipe.config.stages))
    paths = {
        "steps": [f"stages.{stages[-1]}.steps"],
        "batch": [f"stages.{i}.batch" for i in stages],
        "seed": ["engine.seed"],
        "profile": ["engine.profile"],
    }
    asked = {name: value for name, value in (short or {}).items() if value is not None}
    if "profile" in asked:
        window = parse_range(asked["profile"], "steps")
        asked["profile"] = [window.start, window.stop - 1]
    known = tuple((path, str(value)) for name, value in asked.items() for path in paths[name])
    return dataclasses.replace(recipe, config=override(recipe.config, [*known, *overrides]))
