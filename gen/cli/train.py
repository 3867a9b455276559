"""``gen demo``, ``gen train`` and ``gen distill``."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from gen.cli.flags import Switch, flag
from gen.cli.opening import Overrides, prepare
from gen.cli.start import ALONE, Job, Multihost, start
from gen.errors import GenError

__all__ = ["Training", "check_decoded", "demo", "distill", "train"]


@dataclasses.dataclass(frozen=True)
class Training:
    """The flags that all commands have that train.

    Attributes:
      steps: training steps of the last stage (the only one of most presets).
      batch: global batch size of every stage.
      batch_gpu: samples per device at a time; gradients are accumulated up to the batch.
      seed: of initial weights, data order and noise.
      unconditional: train a model without classes, on data that have none or whose labels are not wanted.
      start: a run whose weights (EMA) the network starts from: arrays that fit by name and shape are taken over, so a
        network of another number of classes keeps the rest; the run records it.
      profile: steps to record with the profiler, into OUTDIR/profile (for TensorBoard or Perfetto).
      monitor: real images, or statistics of gen reference: score samples against them while training.
      monitor_every: steps between scores; each also makes a checkpoint.
      monitor_count: samples per score, always of the same seeds and balanced classes.
      monitor_extractor: the feature network, as for gen evaluate.
      dry_run: show parameters, shardings and bytes per device, then stop.
    """

    steps: Annotated[int | None, flag("N")] = None
    batch: Annotated[int | None, flag("N")] = None
    batch_gpu: Annotated[int | None, flag("N")] = None
    seed: Annotated[int | None, flag("N")] = None
    unconditional: Switch = False
    start: Annotated[Path | None, flag("RUN", name="from")] = None
    profile: Annotated[str | None, flag("FIRST-LAST")] = None
    monitor: Annotated[str | None, flag("REFERENCE")] = None
    monitor_every: Annotated[int, flag("N")] = 5000
    monitor_count: Annotated[int, flag("N")] = 5000
    monitor_extractor: Annotated[str | None, flag("NAME")] = None
    dry_run: Switch = False


USUAL = Training()
How = Annotated[Training, flag(name="")]  # its fields are flags of the command


def demo(
    outdir: Annotated[Path | None, flag("DIR")] = None,
    tokens: Switch = False,
    smoke: Switch = False,
    seed: Annotated[int, flag("N")] = 0,
) -> None:
    """Trains a tokenizer, a flow transformer and its one-step student on handwritten digits, and scores them.

    Takes minutes on a laptop. OUTDIR/report.html shows everything; OUTDIR/tokenizer, teacher and student are run
    folders. Interrupted and started again, it goes on where it was.

    Examples:
      gen demo
      gen demo --outdir /tmp/try --smoke
      gen demo --tokens

    Args:
      outdir: where everything is written; runs/demo, or runs/demo-tokens.
      tokens: digits by tokens instead: an autoregressive model and a masked one.
      smoke: a run of seconds that checks the path, not the quality.
      seed: of initial weights, data order and noise.
    """
    if tokens:
        from gen.experiments import demo_tokens

        demo_tokens.run(outdir or "runs/demo-tokens", smoke=smoke, seed=seed)
        return
    from gen.experiments import demo as experiment

    experiment.run(outdir or "runs/demo", smoke=smoke, seed=seed)


def train(
    preset: Annotated[str, tyro.conf.Positional, flag("PRESET|FILE.py:PRESET")],
    /,
    *,
    outdir: Annotated[Path | None, flag("DIR")] = None,
    data: Annotated[str | None, flag("DATA")] = None,
    teacher: Annotated[Path | None, flag("RUN")] = None,
    tokenizer: Annotated[Path | None, flag("RUN")] = None,
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
      gen train ./myexp.py:my-flow --data images/
      gen train edm-cifar10 --data cifar10.zip --monitor cifar10.npz --monitor-extractor inception:legacy_tensorflow

    Args:
      preset: a name from gen list, or a preset of your own file; --preset NAME is the same.
      outdir: the run folder; runs/PRESET by default.
      data: the data or latent cache, for presets that take one.
      teacher: the teacher's run folder, for presets that take one.
      tokenizer: the tokenizer's run folder, for presets that take one.
      training: how it is trained.
      multihost: the job that this process belongs to.
    """
    inputs = {"data": data, "teacher": teacher, "tokenizer": tokenizer}
    _train(preset, inputs, outdir, training, multihost, overrides)


def _train(
    preset: str,
    inputs: dict[str, Any],
    outdir: Path | None,
    training: Training,
    multihost: Job,
    overrides: tuple[tuple[str, str], ...],
) -> None:
    """Trains a preset with its inputs by name, None where not given."""
    from gen.experiments import find

    find(preset)  # a misspelt name is told at once
    start(multihost)
    recipe = prepare(
        preset,
        inputs,
        overrides,
        {name: getattr(training, name) for name in ("steps", "batch", "seed", "profile")},
        unconditional=training.unconditional,
        start=training.start,
    )
    if recipe.config.tokenizer is None and inputs.get("teacher") is not None:
        check_decoded(recipe.config, Path(inputs["teacher"]))
    outdir = outdir or Path("runs") / find(preset).name
    from gen.training.checks import dry_run
    from gen.training.engine import train as run

    arrays = {"frozen": recipe.frozen, "artifacts": recipe.artifacts}
    if training.dry_run:
        dry_run(recipe.config, **arrays, batch_gpu=training.batch_gpu)
        return
    hooks: tuple[Any, ...] = ()
    if training.monitor is not None:
        recipe, hooks = _monitored(recipe, outdir, training, training.monitor)
    run(recipe.config, outdir, **arrays, batch_gpu=training.batch_gpu, hooks=hooks)
    import jax

    if jax.process_index() == 0 and not recipe.config.engine.quiet:
        then = f"gen sample {outdir} --out grid.png" if recipe.config.sampler else f"gen reconstruct {outdir}"
        print(f"done: {outdir}; next: {then}")


def _monitored(recipe: Any, outdir: Path, training: Training, reference: str) -> tuple[Any, tuple[Any, ...]]:
    """The recipe that keeps its best checkpoint, and the hook; writes the protocol of its numbers to monitor.json."""
    import jax

    from gen.cli.extractors import find_extractor, open_reference, stored_shape
    from gen.config import to_json
    from gen.files import write_json
    from gen.metrics.monitor import METRIC, monitor
    from gen.training.sharding import make_mesh

    config, count = recipe.config, training.monitor_count
    network = find_extractor(training.monitor_extractor, reference, lambda: stored_shape(reference))
    held, _ = open_reference(reference, network, 256, make_mesh(config.engine.mesh))
    hook, protocol = monitor(
        config,
        held,
        network,
        every=training.monitor_every,
        count=count,
        artifacts=recipe.artifacts,
    )
    if jax.process_index() == 0:
        write_json(outdir / "monitor.json", to_json(protocol))
    best = dataclasses.replace(config.engine, best=config.engine.best or METRIC)
    return dataclasses.replace(recipe, config=dataclasses.replace(config, engine=best)), (hook,)


def distill(
    preset: Annotated[str, tyro.conf.Positional, flag("PRESET|FILE.py:PRESET")],
    /,
    *,
    teacher: Annotated[Path, flag("RUN")],
    student: Annotated[str | None, flag("PRESET")] = None,
    calls: Annotated[int | None, flag("N")] = None,
    outdir: Annotated[Path | None, flag("DIR")] = None,
    data: Annotated[str | None, flag("DATA")] = None,
    pairs: Annotated[int | None, flag("N")] = None,
    training: How = USUAL,
    multihost: Multihost = ALONE,
    overrides: Overrides = (),
) -> None:
    """Trains a student of a teacher run by a method, such as dmd2, reflow or meanflow: a preset that takes a teacher.

    Size, conditions and process are the teacher's. The student is a copy of it, or has another network with --student.
    Methods that regress on stored pairs (starting noise and where the teacher's solver takes it) read them from --data;
    --pairs makes them first, in OUTDIR/pairs.

    Examples:
      gen distill dmd2 --teacher runs/demo/teacher
      gen distill reflow --teacher runs/demo/teacher --pairs 8192 --calls 2 --outdir runs/student
      gen distill dmd2 --teacher runs/demo/teacher --data runs/student/pairs --outdir runs/student2 --seed 1
      gen distill demo-student --teacher runs/demo/teacher --pairs 8192 --monitor digits.npz --monitor-every 500

    Args:
      preset: a name from gen list, or a preset of your own file; --preset NAME is the same.
      teacher: the teacher's run folder; its EMA weights are used.
      student: a preset whose network the student has, with the teacher's size and conditions; the teacher's by default.
      calls: network calls of the student's samples, for methods that train students of several; 1 by default.
      outdir: the run folder; runs/PRESET by default.
      data: the data, latent cache or teacher records, for presets that take them.
      pairs: how many pairs of the teacher to store and train on; classes in turn.
      training: how it is trained.
      multihost: the job that this process belongs to.
    """
    from gen.experiments import find

    if pairs is not None:
        if pairs < 1 or data is not None:
            wrong = f"--pairs {pairs}" if data is None else "--data and --pairs together"
            raise GenError(f"{wrong} makes no data to train on; give a positive number of pairs, or the data alone")
        outdir = outdir or Path("runs") / find(preset).name
        folder = outdir / "pairs"
        data = str(folder)
        if not training.dry_run:
            _store_pairs(preset, teacher, folder, pairs, multihost)
    inputs = {"data": data, "teacher": teacher, "student": student, "calls": calls}
    _train(preset, inputs, outdir, training, multihost, overrides)


def check_decoded(config: Any, teacher: Path) -> None:
    """Raises GenError for a run that samples latents which its teacher's tokenizer would decode."""
    from gen.runs import read_config

    if config.sampler is not None and read_config(teacher).tokenizer is not None:
        raise GenError(
            f"run '{config.name}' makes latents and no images: its teacher {teacher} has a tokenizer, and its preset "
            "gives none; add RunConfig(..., tokenizer=teacher.config.tokenizer) and Recipe(..., artifacts={role: "
            'teacher.params[role] for role in ("tokenizer", "normalizer") if role in teacher.params})'
        )


def _store_pairs(preset: str, teacher: Path, folder: Path, count: int, multihost: Job) -> None:
    """Makes `count` pairs of a teacher where they are missing."""
    from gen.experiments import find

    find(preset)
    start(multihost)
    import numpy as np

    from gen.distill.teacher_records import make_of
    from gen.nn.conditions import make_conditions
    from gen.runs import load
    from gen.sampling.records import make_records
    from gen.training.sharding import make_mesh

    loaded = load(teacher)
    generator = loaded.generator
    if any(model.times for model in loaded.config.exported().values()):
        raise GenError(f"{teacher} is a student of few steps itself; give a teacher that a solver samples")
    make_records(
        make_of(generator),
        loaded.params,
        folder,
        count=count,
        maker=loaded.origin,
        cond=make_conditions(generator.conditions, np.arange(count)),
        mesh=make_mesh(),
        label="pairs",
    )
