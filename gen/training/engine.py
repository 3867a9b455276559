"""The run loop: stages of tasks, trained on a mesh, logged, checkpointed and resumed."""

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
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gen.config import fingerprint, from_json, to_json
from gen.errors import GenError
from gen.files import RunLock, atomic, read_json, write_json
from gen.nn.network import count
from gen.progress import StatusLine, duration
from gen.training.checkpoints import Checkpoints, latest_step, load_meta, load_weights, save_arrays
from gen.training.liveness import temporaries
from gen.training.logging import MetricsLog, write_picture
from gen.training.memory import Memory, device_bytes, held, refuse, remat_choices, stage_memory
from gen.training.optim import microbatches
from gen.training.sharding import (
    MeshConfig,
    batch_parts,
    batch_sharding,
    bytes_per_device,
    cut_parts,
    make_mesh,
    mesh_sizes,
    microbatch_count,
    replicated,
    shardings,
)
from gen.training.task import Frozen, Stage, State

__all__ = [
    "EngineConfig",
    "Hook",
    "Interrupted",
    "RunConfig",
    "abstract_states",
    "dry_run",
    "enable_compile_cache",
    "load_config",
    "load_run",
    "train",
]


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

    Attributes:
      name: of the run, for people.
      stages: trained one after the other; the final state of each is the `previous` of the next. None for
        published weights, which stand in artifacts/ alone.
      frozen: role -> where those arrays came from (a run folder and its fingerprint, a file ...): text.
      generator: the Generator configuration with which this run makes images, or None.
      engine: how it is carried out.
      tokenizer: the Tokenizer configuration of published tokenizer weights, which have neither stage nor generator.
    """

    name: str
    stages: tuple[Stage, ...]
    frozen: Mapping[str, str] = dataclasses.field(default_factory=dict)
    generator: Any = None
    engine: EngineConfig = EngineConfig()
    tokenizer: Any = None

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise GenError(f"run '{self.name}' has stages {names}; expected different names")
        for stage in self.stages:
            if stage.steps < 1:
                raise GenError(f"stage '{stage.name}' has {stage.steps} steps; expected at least 1")

    @property
    def steps(self) -> int:
        """Steps of all stages together: the last global step."""
        return sum(stage.steps for stage in self.stages)


@dataclasses.dataclass(frozen=True)
class Hook:
    """Something done during training that the engine knows nothing about, such as evaluation.

    Attributes:
      every: global steps between calls; it is also called after the last step of each stage.
      call: (stage name, global step, state, frozen) -> values to log by name, or None. It must not keep `state`.
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
      frozen: arrays of teachers and feature networks by role, given to every program; not donated, not saved.
      artifacts: arrays that belong to the run's generator ("tokenizer", "normalizer" ...), written once to
        ``artifacts/<role>.safetensors``.
      batch_gpu: images one device handles at a time; gradients of the parts are averaged. None: all at once.
      hooks: called during training.
      stop_after: global step after which to save and return early.

    Returns:
      The state after the last step run.

    Raises:
      GenError: bad input, before anything is compiled; more memory needed than a device has; a folder in use or of
        another configuration; a full disk; `nan_patience` skipped steps in a row.
      Interrupted: SIGTERM or SIGINT; the state is saved.
    """
    if not config.stages:
        raise GenError(f"run '{config.name}' has no stages; expected at least one; give a configuration that trains")
    outdir = Path(outdir)
    mesh = make_mesh(config.engine.mesh)
    parts = [microbatch_count(stage.batch, batch_gpu, mesh.shape) for stage in config.stages]
    main = jax.process_index() == 0
    if not any((outdir / "checkpoints").glob("[0-9]*")):
        for stage in config.stages:  # data that are missing or do not fit are told before anything is made
            _close(_batches(stage, config.engine.seed, 0))
    with contextlib.ExitStack() as stack:
        if main:
            stack.enter_context(RunLock(outdir))
        _check_config(config, outdir, write=main)
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
                save_arrays(path, tree)
        stack.enter_context(jax.set_mesh(mesh))
        frozen = jax.device_put(dict(frozen or {}), shardings(dict(frozen or {}), mesh, config.engine.mesh.shard_from))
        run = _Run(config, outdir, mesh, frozen, checkpoints, tuple(hooks), stop_after or config.steps)
        stack.callback(run.close)
        stack.enter_context(run.signals())
        return run.all_stages(parts)


class _Run:
    """One call of `train`: what its steps share."""

    def __init__(
        self,
        config: RunConfig,
        outdir: Path,
        mesh: Mesh,
        frozen: Frozen,
        checkpoints: Checkpoints,
        hooks: tuple[Hook, ...],
        stop: int,
    ) -> None:
        self.config, self.engine, self.outdir, self.mesh, self.frozen = config, config.engine, outdir, mesh, frozen
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
        abstract = abstract_states(self.config, self.frozen)
        sizes, shard_from = dict(self.mesh.shape), self.engine.mesh.shard_from
        for stage, tree in zip(stages, abstract, strict=True):
            refuse(f"stage '{stage.name}'", held(tree, self.frozen, sizes, shard_from), self.limit, sizes)
        layouts = [shardings(tree, self.mesh, shard_from) for tree in abstract]
        at = self.checkpoints.latest()
        first, state = 0, None
        if at is not None:
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
            state = _Leg(self, index, offset, parts[index], layouts[index]).run(state)
            if offset + int(state.step) >= self.stop:
                break
        assert state is not None
        return state

    def _init(self, index: int, previous: State | None, layout: State) -> State:
        task = self.config.stages[index].task
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.engine.seed), _INIT), index)
        # Compiled with stated output layouts, init returns fresh buffers even where a task forgot to copy.
        return jax.jit(task.init, out_shardings=layout)(key, self.frozen, previous)

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
            "config": fingerprint(_semantic(to_json(self.config))),
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


_STEPS, _INIT, _PREVIEW = range(3)  # uses of the seed: keys are fold_in(fold_in(key(seed), use), number)


class _Leg:
    """One stage of a run: its programs, its batches, its loop."""

    def __init__(self, run: _Run, index: int, offset: int, parts: int, layout: State) -> None:
        self.owner, self.index, self.offset, self.parts, self.layout = run, index, offset, parts, layout
        self.engine, self.stage = run.engine, run.config.stages[index]
        self.task = self.stage.task
        self.programs: dict[str, _Program] = {}
        self.meter = _Meter(self, len(self.task.programs) > 1)
        self.preview: Any = None

    def run(self, state: State) -> State:
        """Trains from `state` to the end of the stage, or to where the run is to stop."""
        run, offset = self.owner, self.offset
        first = offset + int(state.step)
        end = min(offset + self.stage.steps, run.stop)
        if first >= end:
            return state
        run.status.note(
            describe_state(self.stage, state, run.frozen, dict(run.mesh.shape), self.engine.mesh.shard_from)
        )
        batches = _batches(self.stage, self.engine.seed, first)
        try:
            batch = self._checked(next(batches))
            for step in range(first, end):
                run.profile(step)
                name = self.task.select(step - offset)
                used = batch
                state, metrics = self._program(name)(state, used, self.task.inputs(step - offset))
                if step + 1 < end:  # the next batch travels while the device works
                    batch = self._put(next(batches))
                self.meter.add(step + 1, name, metrics, used)
                self._after(step + 1, end, state)
        finally:
            _close(batches)
        return state

    def _after(self, step: int, end: int, state: State) -> None:
        """What is due after global step `step`: hooks, pictures, a checkpoint, leaving."""
        run, engine, last = self.owner, self.engine, step == self.offset + self.stage.steps
        due = [hook for hook in run.hooks if last or step % hook.every == 0]
        pictures = last or (engine.preview_every and step % engine.preview_every == 0)
        judged = False
        if due or pictures:
            self.meter.flush()
            began = time.monotonic()
            for hook in due:
                values = hook.call(self.stage.name, step, state, run.frozen)
                if values:
                    run.record(step, self.stage, {key: float(value) for key, value in values.items()})
                judged = judged or engine.best in (values or {})
            if pictures:
                self._write_preview(step, state)
            self.meter.pause(time.monotonic() - began)
        leave = run.asked_to_stop(step)
        if step == end or leave:
            self.meter.flush()
            run.save(step, state, self.index)
        elif judged or step % engine.checkpoint_every == 0:
            single = jax.process_count() == 1
            if judged or not single or time.monotonic() - run.last_save >= engine.checkpoint_seconds:
                self.meter.flush()  # a run that ends here and goes on from this checkpoint has logged this step
                run.save(step, state, self.index)
        if leave:
            run.checkpoints.wait()
            number = run.signal or signal.SIGTERM
            raise Interrupted(
                f"stopped by {signal.Signals(number).name} after step {step}; the same command goes on from there",
                number,
            )

    def _program(self, name: str) -> "_Program":
        if name not in self.programs:
            if name not in self.task.programs:
                raise GenError(f"task selects program '{name}'; it has {', '.join(self.task.programs)}")
            self.programs[name] = _Program(self, name, self.task.programs[name])
        return self.programs[name]

    def _checked(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The first batch, put on the devices after a look at its shapes and values."""
        local = self.stage.batch // jax.process_count()
        for name, array in batch.items():
            if np.ndim(array) < 1 or len(array) != local:
                raise GenError(
                    f"data '{name}' has shape {np.shape(array)}; expected {local} rows, one for each sample of the "
                    "batch; change what the data source yields"
                )
            if np.issubdtype(np.asarray(array).dtype, np.floating) and not np.isfinite(array).all():
                raise GenError(f"data '{name}' of stage '{self.stage.name}' holds NaN or infinity; make the data again")
        return self._put(batch)

    def _put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        where = batch_sharding(self.owner.mesh)
        if jax.process_count() == 1:
            return jax.device_put(dict(batch), where)
        return {k: jax.make_array_from_process_local_data(where, np.asarray(v)) for k, v in batch.items()}

    def _write_preview(self, step: int, state: State) -> None:
        run = self.owner
        key = jax.random.fold_in(jax.random.key(self.engine.seed), _PREVIEW)
        if self.preview is None:
            self.preview = jax.jit(self.task.preview, out_shardings=replicated(run.mesh))
        for name, images in self.preview(state, run.frozen, key).items():
            if run.main:
                write_picture(run.outdir / "previews" / f"{self.stage.name}-{step:07d}-{name}.png", np.asarray(images))


def _batches(stage: Stage, seed: int, start: int) -> Iterator[Mapping[str, np.ndarray]]:
    """This process's batches of a stage's data from a global step on; raises what is wrong with the data."""
    found: Iterator[Mapping[str, np.ndarray]] = stage.data.batches(
        batch=stage.batch, seed=seed, start=start, process=jax.process_index(), processes=jax.process_count()
    )
    return found


def _close(batches: Iterator[Any]) -> None:
    """Ends the threads behind an iterator, where it has any."""
    close = getattr(batches, "close", None)
    if close is not None:
        close()


class _Program:
    """One update function: compiled once, at its first call, for fixed shapes and layouts."""

    def __init__(self, leg: _Leg, name: str, program: Callable[..., Any]) -> None:
        self.leg, self.name, self.program = leg, name, program
        self.metrics: tuple[str, ...] = ()
        self._compiled: Any = None

    def __call__(
        self, state: State, batch: Mapping[str, jax.Array], inputs: Mapping[str, np.ndarray]
    ) -> tuple[State, jax.Array]:
        run = self.leg.owner
        schedule = {key: np.asarray(value) for key, value in inputs.items()}
        args = (state, run.frozen, batch, schedule, np.int32(self.leg.offset), np.uint32(run.engine.seed))
        if self._compiled is None:
            self._compiled = self._compile(args)
        state, metrics = self._compiled(*args)
        return state, metrics

    def _step(self, state: State, frozen: Frozen, batch: Any, schedule: Any, offset: Any, seed: Any) -> Any:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _STEPS), offset + state.step)
        new, metrics = self.program(state, frozen, {**batch, "schedule": schedule}, key)
        self.metrics = tuple(sorted(metrics))
        row = jnp.stack([jnp.asarray(metrics[name], jnp.float32).reshape(()) for name in self.metrics])
        return dataclasses.replace(new, step=state.step + 1), row

    def _compile(self, args: tuple[Any, ...]) -> Any:
        leg = self.leg
        began = time.monotonic()
        out = (leg.layout, replicated(leg.owner.mesh))
        with microbatches(leg.parts):
            traced = jax.jit(self._step, donate_argnums=0, out_shardings=out).trace(*args)
        before, after = _avals(args[0]), _avals(traced.out_info[0])
        changed = [f"{path}: {before[path]} became {after[path]}" for path in before if after[path] != before[path]]
        if changed:
            raise TypeError(f"program '{self.name}' changes the types of the state: {'; '.join(changed[:3])}")
        self._check_memory(args, traced)
        compiled = traced.lower().compile()
        memory = compiled.memory_analysis()
        text = f"compiled '{self.name}' in {time.monotonic() - began:.1f} s"
        if memory is not None:
            text += f"; temporaries {_size(memory.temp_size_in_bytes)} per device"
        leg.owner.status.note(text)
        return compiled

    def _check_memory(self, args: tuple[Any, ...], traced: Any) -> None:
        """Raises GenError when the step, as traced, needs more memory than a device has."""
        leg, (state, frozen, batch), limit = self.leg, args[:3], self.leg.owner.limit
        if limit is None:
            return
        sizes, shard_from = dict(leg.owner.mesh.shape), leg.engine.mesh.shard_from
        rows, cut = batch_parts(sizes), cut_parts((state, frozen), sizes, shard_from)
        memory = dataclasses.replace(
            held(state, frozen, sizes, shard_from), batch=sum(array.nbytes for array in batch.values()) // rows
        )

        def with_activations(closed: Any) -> Memory:
            return dataclasses.replace(memory, activations=temporaries(closed, len(jax.tree.leaves(state)), cut))

        needed = with_activations(traced.jaxpr)
        if rows > 1 and needed.total > limit:  # what does not fit with every row of the batch may with a device's part
            local = {k: jax.ShapeDtypeStruct((len(v) // rows, *v.shape[1:]), v.dtype) for k, v in batch.items()}
            with microbatches(leg.parts):
                needed = with_activations(jax.make_jaxpr(self._step)(state, frozen, local, *args[3:]))
        refuse(f"a step of '{self.name}'", needed, limit, sizes)


class _Meter:
    """Metrics of a leg, read one step late so that the device is never waited for; the NaN guard's count."""

    def __init__(self, leg: _Leg, named: bool) -> None:
        self.leg, self.named = leg, named
        self.pending: tuple[int, str, jax.Array, Any] | None = None
        self.sums: dict[str, tuple[np.ndarray, int]] = {}
        self.skips: dict[str, int] = {}
        self.mark = (time.monotonic(), -1)  # when and at which step the last record was written
        self.rate = math.nan

    def add(self, step: int, name: str, row: jax.Array, batch: Any) -> None:
        """Takes the row of step `step` (still being computed) and reads the one before."""
        late, self.pending = self.pending, (step, name, row, batch)
        if late is not None:
            self._read(*late)
        if self.mark[1] < 0:  # the first step compiles; rates count from its end
            jax.block_until_ready(row)
            self.mark = (time.monotonic(), step)

    def pause(self, seconds: float) -> None:
        """Leaves out of the rate what was not training: scores and pictures."""
        self.mark = (self.mark[0] + seconds, self.mark[1])

    def flush(self) -> None:
        """Reads what is pending."""
        late, self.pending = self.pending, None
        if late is not None:
            self._read(*late)

    def _read(self, step: int, name: str, row: jax.Array, batch: Any) -> None:
        run, values = self.leg.owner, np.asarray(row, np.float64)
        metrics = dict(zip(self.leg.programs[name].metrics, values, strict=True))
        skipped = not math.isfinite(metrics.get("loss", 0.0)) or any(
            value > 0 for key, value in metrics.items() if key.split("/")[-1] == "skipped"
        )
        self.skips[name] = self.skips.get(name, 0) + 1 if skipped else 0
        if self.skips[name] >= run.engine.nan_patience:
            self._give_up(step, name, batch)
        total, n = self.sums.get(name, (np.zeros_like(values), 0))
        self.sums[name] = (total + values, n + 1)
        end = self.leg.offset + self.leg.stage.steps
        if step % run.engine.log_every == 0 or step == end:
            self._record(step)
        if run.status.due() or step == end:
            run.status.show(self._line(step, end, metrics))

    def _record(self, step: int) -> None:
        run, now = self.leg.owner, time.monotonic()
        values: dict[str, float] = {}
        for name, (total, n) in self.sums.items():
            prefix = f"{name}/" if self.named else ""
            means = total / n
            values |= {prefix + key: float(v) for key, v in zip(self.leg.programs[name].metrics, means, strict=True)}
        self._update_rate(step, now)
        run.record(step, self.leg.stage, values | {"images_per_second": round(self.rate, 3)})
        self.sums = {}
        self.mark = (now, step)

    def _update_rate(self, step: int, now: float) -> None:
        since, begun = self.mark
        if begun >= 0 and step > begun and now > since:
            self.rate = (step - begun) * self.leg.stage.batch / (now - since)

    def _line(self, step: int, end: int, metrics: Mapping[str, float]) -> str:
        run, stage = self.leg.owner, self.leg.stage
        self._update_rate(step, time.monotonic())
        left = (end - step) * stage.batch / self.rate if self.rate > 0 else math.nan
        parts = [f"{stage.name} {step - self.leg.offset}/{stage.steps}", f"{run.images(step):,} img"]
        if self.rate > 0:
            parts += [f"{self.rate:,.0f} img/s", f"{duration(left)} left"]
        names = {"loss": "loss", "grad_norm": "grad"}
        return "  ".join(parts + [f"{text} {metrics[key]:.4g}" for key, text in names.items() if key in metrics])

    def _give_up(self, step: int, name: str, batch: Any) -> None:
        run, k = self.leg.owner, self.skips[name]
        path = run.outdir / f"nonfinite-step-{step}.npz"
        if run.main and all(array.is_fully_addressable for array in batch.values()):
            arrays: dict[str, Any] = {key: np.asarray(value) for key, value in batch.items()}
            atomic(path, lambda file: np.savez(file, **arrays, step=step))
        raise GenError(
            f"loss or gradients of '{name}' were not finite for {k} steps in a row, up to step {step}; its batch is in "
            f"{path}, the last checkpoint is good: lower the learning rate or clip gradients"
        )


def abstract_states(config: RunConfig, frozen: Frozen) -> list[State]:
    """Shapes of the state at the start of each stage; nothing is allocated. `frozen` may hold shapes."""
    states: list[State] = []
    previous: State | None = None
    for stage in config.stages:
        previous = jax.eval_shape(stage.task.init, jax.eval_shape(jax.random.key, 0), frozen, previous)
        states.append(previous)
    return states


def dry_run(
    config: RunConfig,
    *,
    frozen: Frozen | None = None,
    batch_gpu: int | None = None,
    devices: int | None = None,
    platform: str | None = None,
) -> list[str]:
    """Prints and returns lines for each stage: parameters per network, bytes per device, activations by policy.

    Allocates and compiles nothing; reads one row of each stage's data.

    Args:
      config: the run.
      frozen: arrays or shapes by role.
      batch_gpu: as for `train`; checked.
      devices: number of devices to plan for; those present by default.
      platform: "cpu", "gpu" or "tpu" to plan for; the present one by default.

    Raises:
      GenError: a mesh or a batch that does not divide.
    """
    sizes = mesh_sizes(config.engine.mesh, jax.device_count() if devices is None else devices)
    frozen = dict(frozen or {})
    states = abstract_states(config, frozen)
    lines = []
    for stage, state in zip(config.stages, states, strict=True):
        parts = microbatch_count(stage.batch, batch_gpu, sizes)
        lines.append(describe_state(stage, state, frozen, sizes, config.engine.mesh.shard_from))
        lines.append(_describe_step(config.engine, stage, state, frozen, sizes, parts, platform))
    print("\n".join(lines))
    return lines


def describe_state(stage: Stage, state: State, frozen: Frozen, sizes: Mapping[str, int], shard_from: int) -> str:
    """One line: networks with their parameters, bytes per device of state and frozen arrays, the mesh."""
    nets = ", ".join(f"{name} {count(tree):,}" for name, tree in state.params.items())
    kinds = {"parameters": state.params, "optimisers": state.opt, "averages": state.ema, "frozen": frozen}
    held = ", ".join(f"{k} {_size(bytes_per_device(t, sizes, shard_from))}" for k, t in kinds.items() if t)
    mesh = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    return f"stage '{stage.name}': {nets} parameters; per device: {held}; mesh {mesh}"


def _describe_step(
    engine: EngineConfig,
    stage: Stage,
    state: State,
    frozen: Frozen,
    sizes: Mapping[str, int],
    parts: int,
    platform: str | None,
) -> str:
    """One line: activations per device under each rematerialisation policy, the step's total, what a device has."""
    choices = {policy: task for policy, task in remat_choices(stage.task).items() if task != stage.task}
    own = next((policy for policy in remat_choices(stage.task) if policy not in choices), "")

    def needed(task: Any) -> Any:
        planned = dataclasses.replace(stage, task=task)
        return stage_memory(planned, state, frozen, sizes, engine.mesh.shard_from, parts, platform)

    memory = needed(stage.task)
    where = platform or jax.default_backend()
    rows = stage.batch // batch_parts(sizes) // parts
    text = f"  a step on {where}, {rows} samples per device at a time: activations {_size(memory.activations)}"
    text += f" with remat {own}" if own else ""
    for policy, task in choices.items():
        text += f", {_size(needed(task).activations)} with {policy}"
    text += f"; {_size(memory.total)} per device in all"
    limit = device_bytes(engine.memory_gib) if platform in (None, jax.default_backend()) or engine.memory_gib else None
    if limit is not None:
        text += f", of {_size(limit)}" + ("" if memory.total <= limit else ": DOES NOT FIT")
    return text


def enable_compile_cache(folder: str | Path | None = None) -> Path:
    """Keeps compiled programs on disk, small ones too, so that the second start is fast.

    Args:
      folder: by default ``$XDG_CACHE_HOME/gen/jax`` or ``~/.cache/gen/jax``; JAX_COMPILATION_CACHE_DIR wins.

    Returns:
      The folder in use.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR") or folder or Path(home) / "gen" / "jax"
    path = Path(chosen).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


def load_config(run_dir: str | Path) -> RunConfig:
    """The configuration of a run folder. Raises GenError when there is none."""
    path = Path(run_dir) / "config.json"
    if not path.exists():
        raise GenError(f"{run_dir} is not a run folder (no config.json); give the folder that `gen train` wrote")
    config: RunConfig = from_json(read_json(path), RunConfig)
    return config


def load_run(run_dir: str | Path, step: int | None = None) -> tuple[RunConfig, Stage, State]:
    """A run's configuration, the stage its checkpoint (the newest by default) is in, and the weights there."""
    config = load_config(run_dir)
    step = latest_step(run_dir) if step is None else step
    meta = load_meta(run_dir, step)
    return config, config.stages[meta["stage_index"]], load_weights(run_dir, step)


def _semantic(data: Any) -> Any:
    """The part of a run's JSON that decides what is computed."""
    return {k: v for k, v in data.items() if k not in ("engine", "generator")} | {"seed": data["engine"]["seed"]}


def _check_config(config: RunConfig, outdir: Path, *, write: bool) -> None:
    """Refuses a folder of another configuration; the last stage may get more steps. Writes config.json."""
    path, new = outdir / "config.json", to_json(config)
    if path.exists():
        old = read_json(path)
        difference = _first_difference(_extensible(old), _extensible(new), "")
        done = latest_step(outdir) if any((outdir / "checkpoints").glob("[0-9]*/meta/metadata")) else 0
        if difference is None and config.steps < done:
            difference = ("steps", f"{done} already done", config.steps)
        if difference is not None:
            where, was, now = difference
            raise GenError(
                f"{outdir} was made with {where} = {was}, this run has {now}; "
                "use the same configuration or another output folder"
            )
        if old == new:
            return
    if write:
        write_json(path, new)


def _extensible(data: Any) -> Any:
    try:
        *head, last = data["stages"]
        return _semantic(data) | {"stages": [*head, {k: v for k, v in last.items() if k != "steps"}]}
    except (KeyError, TypeError, ValueError):
        return data


def _first_difference(old: Any, new: Any, where: str) -> tuple[str, Any, Any] | None:
    """(path, old value, new value) of the first leaf in which two JSON values differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*new, *(k for k in old if k not in new)]:
            place = f"{where}.{key}" if where else str(key)
            if (key in old) != (key in new):
                return place, old.get(key, "(absent)"), new.get(key, "(absent)")
            found = _first_difference(old[key], new[key], place)
            if found:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = (_first_difference(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(old, new, strict=True)))
        return next((found for found in pairs if found), None)
    return None if old == new else (where, old, new)


def _with_sharding(shape: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _avals(tree: Any) -> dict[str, str]:
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in pairs}


def _size(size: float) -> str:
    """1234567 -> "1.23 MB"."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB"
