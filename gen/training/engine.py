"""The engine: stages of tasks, trained on a mesh, logged, checkpointed and resumed."""

import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gen import arrays
from gen.config import fingerprint
from gen.errors import GenError
from gen.files import RunLock, atomic
from gen.progress import StatusLine
from gen.training.budget import abstract_states, describe, device_bytes, held, refuse
from gen.training.checkpoints import Checkpoints, latest_step
from gen.training.checks import batches, check_batch, check_data, check_run, close, drawable
from gen.training.logging import MetricsLog, write_picture
from gen.training.meter import Meter, Skipped, StepMetrics
from gen.training.program import Compiled, Placement
from gen.training.run import RunConfig, semantic, settle_config
from gen.training.sharding import batch_sharding, make_mesh, microbatch_count, place, replicated, shardings
from gen.training.task import Frozen, Stage, State

__all__ = ["Hook", "Interrupted", "train"]


@dataclasses.dataclass(frozen=True)
class Hook:
    """Something done during training that the engine knows nothing about, such as evaluation.

    Attributes:
      every: global steps between calls; it is also called after the last step of each stage.
      call: (stage name, global step, state, frozen) -> values to log by name, or None. It must not keep `state`.
        A call that fails is logged and costs the run nothing.
    """

    every: int
    call: Callable[[str, int, State, Frozen], Mapping[str, float] | None]


class Interrupted(GenError):
    """A signal ended the run after its state was saved; `signal` is the number (exit status 128 + signal)."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


def train(
    config: RunConfig,
    outdir: str | Path,
    *,
    frozen: Frozen | None = None,
    artifacts: Mapping[str, Any] | None = None,
    batch_gpu: int | None = None,
    hooks: Sequence[Hook] = (),
    stop_after: int | None = None,
) -> State:
    """Runs all stages, or goes on from the newest checkpoint in `outdir`; a finished run returns at once.

    On the same topology the result does not depend on where it was interrupted, bit for bit.

    Args:
      config: what to train.
      outdir: the run folder (config.json, checkpoints/, artifacts/, metrics.jsonl, previews/).
      frozen: arrays of teachers and feature networks by role, given to every program; not donated, not saved. The role
        "start" holds weights that the first stage's network starts from, where they fit; programs do not get it.
      artifacts: arrays that belong to the run's generator ("tokenizer", "normalizer" ...), written once to
        ``artifacts/<role>.safetensors``.
      batch_gpu: images one device handles at a time; gradients of the parts are averaged. None: all at once.
      hooks: called during training.
      stop_after: global step after which to save and return early.

    Returns:
      The state after the last step run.

    Raises:
      GenError: bad input, before anything is compiled; a model that the run's sampler could not sample; more memory
        needed than a device has; a folder in use or of another configuration; a full disk; `nan_patience` skipped steps
        in a row, or no step of a stage that was not skipped.
      Interrupted: SIGTERM or SIGINT; the state is saved.
    """
    if not config.stages:
        raise GenError(f"run '{config.name}' has no stages; expected at least one; give a configuration that trains")
    outdir = Path(outdir)
    mesh = make_mesh(config.engine.mesh)
    parts = [microbatch_count(stage.batch, batch_gpu, mesh.shape) for stage in config.stages]
    main = jax.process_index() == 0
    begun = any((outdir / "checkpoints").glob("[0-9]*/meta/metadata"))
    if not begun or latest_step(outdir) < config.steps:
        check_run(config, artifacts)
    if not begun:
        for stage in config.stages:  # before anything is written
            check_data(stage)
    with contextlib.ExitStack() as stack:
        if main:
            stack.enter_context(RunLock(outdir))
        settle_config(config, outdir, write=main)
        checkpoints = stack.enter_context(
            Checkpoints(
                outdir / "checkpoints",
                keep=config.engine.keep,
                keep_every=config.engine.keep_every,
                best=bool(config.engine.best),
            )
        )
        for role, tree in (artifacts or {}).items():
            path = outdir / "artifacts" / f"{role}.safetensors"
            if main and not path.exists():
                arrays.save(path, tree)
        stack.enter_context(jax.set_mesh(mesh))
        frozen = place(dict(frozen or {}), shardings(dict(frozen or {}), mesh, config.engine.mesh.shard_from))
        artifacts = dict(artifacts or {})
        artifacts = place(artifacts, jax.tree.map(lambda _: replicated(mesh), artifacts))
        run = _Run(config, outdir, mesh, frozen, artifacts, checkpoints, tuple(hooks), stop_after or config.steps)
        stack.callback(run.close)
        stack.enter_context(run.signals())
        return run.all_stages(parts)


_INIT, _PREVIEW = 1, 2  # uses of the seed beside training's (`gen.training.program.step_key`)


def _key(seed: int, use: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), use)


class _Run:
    """One call of `train`: what its stages share."""

    def __init__(
        self,
        config: RunConfig,
        outdir: Path,
        mesh: Mesh,
        frozen: Frozen,
        artifacts: Mapping[str, Any],
        checkpoints: Checkpoints,
        hooks: tuple[Hook, ...],
        stop: int,
    ) -> None:
        self.config, self.engine, self.outdir, self.mesh = config, config.engine, outdir, mesh
        self.start = {role: tree for role, tree in frozen.items() if role == "start"}  # read by the first init alone
        self.frozen = {role: tree for role, tree in frozen.items() if role != "start"}
        self.artifacts = artifacts
        self.checkpoints, self.hooks, self.stop = checkpoints, hooks, min(stop, config.steps)
        self.main = jax.process_index() == 0
        self.status = StatusLine(quiet=self.engine.quiet or not self.main)
        self.log: MetricsLog | None = None
        resumed = checkpoints.latest() or 0
        if self.main and resumed < self.stop:
            self.log = MetricsLog(
                outdir, resumed, tensorboard=self.engine.tensorboard, wandb=self.engine.wandb, name=config.name
            )
        self.began = self.last_save = time.monotonic()
        self.identities: dict[int, str] = {}
        self.values: dict[str, tuple[int, float]] = {}  # the newest logged value of each metric, and its step
        self.signal: int | None = None
        self.tracing = False
        self.limit = device_bytes(self.engine.memory_gib)

    def close(self) -> None:
        self.status.close()
        if self.tracing:
            jax.profiler.stop_trace()
        if self.log is not None:
            self.log.close()

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT ask the loop to save and leave; a second one acts as usual.

        In a job of several processes jax's preemption service listens for SIGTERM (a handler of ours would silence it)
        and chooses a step at which all of them leave; Ctrl-C is passed on to it.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        if jax.process_count() > 1:
            usual = signal.signal(signal.SIGINT, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
            try:
                yield
            finally:
                signal.signal(signal.SIGINT, usual)
            return

        def ask(number: int, frame: FrameType | None) -> None:
            self.signal = number
            signal.signal(number, old[signal.Signals(number)])

        old = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def all_stages(self, parts: Sequence[int]) -> State:
        """The stages that are left, from the newest checkpoint or from the start."""
        stages = self.config.stages
        abstract = abstract_states(stages, self.frozen)
        sizes, shard_from = dict(self.mesh.shape), self.engine.mesh.shard_from
        for stage, tree in zip(stages, abstract, strict=True):
            refuse(f"stage '{stage.name}'", held(tree, self.frozen, sizes, shard_from), self.limit, sizes)
        layouts = [shardings(tree, self.mesh, shard_from) for tree in abstract]
        at = self.checkpoints.latest()
        first, state = 0, None
        if at is not None:
            self.start = {}
            meta = self.checkpoints.meta(at)
            first = meta["stage_index"]
            if at < self.config.steps and meta["data"] != (found := self.identity(first)):
                raise GenError(
                    f"the data of stage '{stages[first].name}' changed since checkpoint {at} (was {meta['data']}, "
                    f"is {found}); restore the data or choose another output folder"
                )
            target = jax.tree.map(_with_sharding, abstract[first], layouts[first])
            state = self.checkpoints.restore(at, target)
            self.status.note(f"{self.outdir}: {at} of {self.config.steps} steps done")
        for index in range(first, len(stages)):
            offset = sum(stage.steps for stage in stages[:index])
            if state is None or index > first:
                state = self._init(index, state, layouts[index])
            placement = Placement(self.mesh, layouts[index], parts[index], shard_from, self.limit)
            state = _Leg(self, index, offset, placement).run(state)
            if offset + int(state.step) >= self.stop:
                break
        assert state is not None
        return state

    def _init(self, index: int, previous: State | None, layout: State) -> State:
        task = self.config.stages[index].task
        key = jax.random.fold_in(_key(self.engine.seed, _INIT), index)
        # Compiled with stated output layouts, init returns fresh buffers even where a task forgot to copy.
        state = jax.jit(task.init, out_shardings=layout)(key, {**self.frozen, **self.start}, previous)
        self.start = {}
        return state

    def save(self, step: int, state: State, index: int) -> None:
        """A checkpoint of global step `step`, which is in stage `index`."""
        stage = self.config.stages[index]
        meta = {
            "step": step,
            "stage": stage.name,
            "stage_index": index,
            "images": self.images(step),
            "data": self.identity(index),
            "frozen": dict(self.config.frozen),
            "config": fingerprint(semantic(self.config)),
        }
        logged, score = self.values.get(self.engine.best, (-1, math.nan))
        fresh = logged == step and math.isfinite(score)
        self.checkpoints.save(step, state, meta, score if fresh else None)
        self.last_save = time.monotonic()

    def identity(self, index: int) -> str:
        """The identity of a stage's data; read once, for it may take a look at every file."""
        if index not in self.identities:
            self.identities[index] = self.config.stages[index].data.identity()
        return self.identities[index]

    def images(self, step: int) -> int:
        """Training images seen up to a global step."""
        total = 0
        for stage in self.config.stages:
            total += min(step, stage.steps) * stage.batch
            step = max(step - stage.steps, 0)
        return total

    def record(self, step: int, stage: Stage, values: Mapping[str, float]) -> None:
        """Writes one record of metrics.jsonl."""
        self.values |= {name: (step, value) for name, value in values.items()}
        if self.log is not None:
            seconds = round(time.monotonic() - self.began, 3)
            head = {"stage": stage.name, "seconds": seconds, "images": self.images(step)}
            self.log.write(step, head | dict(values))

    def asked_to_stop(self, step: int) -> bool:
        """Whether to save and leave after global step `step`; all processes answer alike."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self.signal is not None

    def profile(self, step: int) -> None:
        """Starts and stops the profiler around the global steps asked for."""
        if self.engine.profile is None:
            return
        if step == self.engine.profile[0] and not self.tracing:
            jax.profiler.start_trace(str(self.outdir / "profile"))
            self.tracing = True
        elif step == self.engine.profile[1] + 1 and self.tracing:
            jax.profiler.stop_trace()
            self.tracing = False


class _Leg:
    """One stage of a run: its programs, its batches, its loop."""

    def __init__(self, run: _Run, index: int, offset: int, placement: Placement) -> None:
        self.owner, self.index, self.offset, self.placement = run, index, offset, placement
        self.engine, self.stage = run.engine, run.config.stages[index]
        self.task = self.stage.task
        self.programs: dict[str, Compiled] = {}
        self.preview: Any = None

    def run(self, state: State) -> State:
        """Trains from `state` to the end of the stage, or to where the run is to stop."""
        run, offset, stage = self.owner, self.offset, self.stage
        first = offset + int(state.step)
        end = min(offset + stage.steps, run.stop)
        if first >= end:
            return state
        run.status.note(describe(stage, state, run.frozen, dict(run.mesh.shape), self.engine.mesh.shard_from))
        meter = Meter(
            stage.name,
            offset,
            stage.steps,
            stage.batch,
            every=self.engine.log_every,
            patience=self.engine.nan_patience,
            fresh=first == offset,
            record=lambda step, values: run.record(step, stage, values),
        )
        rows = batches(stage, self.engine.seed, first)
        try:
            batch = self._put(check_batch(stage, next(rows)))
            for step in range(first, end):
                run.profile(step)
                name = self.task.select(step - offset)
                program, used = self._program(name), batch
                state, row = program(state, run.frozen, used, self.task.inputs(step - offset, stage.steps))
                if step + 1 < end:  # the next batch travels while the device works
                    batch = self._put(next(rows))
                meter.add(StepMetrics(step + 1, name, program.metrics, row, used))
                if run.status.due() and meter.line:
                    run.status.show(meter.line)
                self._after(step + 1, end, state, meter)
            run.status.show(meter.line)
        except Skipped as error:
            raise self._lost(error) from None
        finally:
            close(rows)
        return state

    def _after(self, step: int, end: int, state: State, meter: Meter) -> None:
        """What is due after global step `step`: hooks, a checkpoint, pictures, leaving."""
        run, engine, last = self.owner, self.engine, step == self.offset + self.stage.steps
        due = [hook for hook in run.hooks if last or step % hook.every == 0]
        judged = False
        if due:
            meter.flush()
            began = time.monotonic()
            for hook in due:
                values = self._attempt(
                    f"step {step}: a hook failed", hook.call, self.stage.name, step, state, run.frozen
                )
                if values:
                    run.record(step, self.stage, {key: float(value) for key, value in values.items()})
                judged = judged or engine.best in (values or {})
            meter.pause(time.monotonic() - began)
        leave = run.asked_to_stop(step)
        if step == end or leave:
            meter.flush()
            run.save(step, state, self.index)
        elif judged or step % engine.checkpoint_every == 0:
            single = jax.process_count() == 1
            if judged or not single or time.monotonic() - run.last_save >= engine.checkpoint_seconds:
                meter.flush()  # a run that ends here and goes on from this checkpoint has logged this step
                run.save(step, state, self.index)
        if (last or (engine.preview_every and step % engine.preview_every == 0)) and not leave:
            began = time.monotonic()
            self._attempt(f"step {step}: no pictures", self._write_preview, step, state)
            meter.pause(time.monotonic() - began)
        if leave:
            run.checkpoints.wait()
            number = run.signal or signal.SIGTERM
            raise Interrupted(
                f"stopped by {signal.Signals(number).name} after step {step}; the same command goes on from there",
                number,
            )

    def _attempt(self, what: str, call: Callable[..., Any], *args: Any) -> Any:
        """What a call gives; None, and a line that says why, where it fails: a picture or score is not worth a run."""
        try:
            return call(*args)
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            self.owner.status.note(f"{what}: {type(error).__name__}: {reason[:300]}")
            return None

    def _program(self, name: str) -> Compiled:
        if name not in self.programs:
            known = self.task.programs
            if name not in known:
                raise GenError(f"task selects program '{name}'; it has {', '.join(known)}")
            note = self.owner.status.note
            self.programs[name] = Compiled(name, known[name], self.placement, self.engine.seed, self.offset, note)
        return self.programs[name]

    def _put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        where = batch_sharding(self.owner.mesh)
        if jax.process_count() == 1:
            return jax.device_put(dict(batch), where)
        return {k: jax.make_array_from_process_local_data(where, np.asarray(v)) for k, v in batch.items()}

    def _write_preview(self, step: int, state: State) -> None:
        run = self.owner
        if self.preview is None:
            generator = run.config.generator(self.stage)
            drawn = generator if generator is not None and drawable(generator.shape) else None
            self.preview = jax.jit(
                lambda state, frozen, key: self.task.preview(state, frozen, key, drawn),
                out_shardings=replicated(run.mesh),
            )
        pictures = self.preview(state, {**run.artifacts, **run.frozen}, _key(self.engine.seed, _PREVIEW))
        for name, images in pictures.items():
            if run.main:
                write_picture(run.outdir / "previews" / f"{self.stage.name}-{step:07d}-{name}.png", np.asarray(images))

    def _lost(self, error: Skipped) -> GenError:
        """What is said of a run that the NaN guard ends; the batch is kept."""
        run, reading = self.owner, error.reading
        text = f"{error}; lower the learning rate or clip gradients"
        if run.main and all(array.is_fully_addressable for array in reading.batch.values()):
            path = run.outdir / f"nonfinite-step-{reading.step}.npz"
            rows: dict[str, Any] = {key: np.asarray(value) for key, value in reading.batch.items()}
            atomic(path, lambda file: np.savez(file, **rows, step=reading.step))
            text += f"; the last batch is in {path}"
        at = run.checkpoints.latest()
        return GenError(text if at is None else f"{text}; checkpoint {at} is good")


def _with_sharding(shape: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
