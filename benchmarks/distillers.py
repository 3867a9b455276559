"""What a student's update costs beside a step of its teacher's training.

    python benchmarks/distillers.py [--repeats 5] [--only meanflow ...]

A DiT of width 256 and depth 6 on 64 tokens, batches of 16, float32. Each figure is the median over interleaved repeats
of a method's seconds per update over the teacher's own (flow matching with label dropout), so that what else the
machine does falls on both. Methods with several programs are timed with all of them, by the ratio of their paper: an
update of DMD2's student is one step of the student and five of the fake score. CPU seconds count all threads; on a busy
machine they are the steadier. MeanFlow from scratch without guidance is the figure to compare with flow matching: one
call in forward mode and a gradient. The last line is a one-step student's whole sampling program over a bare forward
pass of its network.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.data.partitioned import contiguous
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.consistency_maps import data_map, trig_map
from gen.diffusion.denoiser import Denoiser
from gen.diffusion.flowmap import jump_map
from gen.diffusion.meanflow import MeanFlowTask, average_map
from gen.diffusion.process import Linear
from gen.diffusion.shortcut import ShortcutTask
from gen.diffusion.train import DenoiserTask
from gen.distill.consistency import ConsistencyDistillationTask, ConsistencyTask
from gen.distill.ctm import CTMTask
from gen.distill.dmd2 import DMD2Task
from gen.distill.f_distill import FDistillTask
from gen.distill.guided_distillation import GuidedTask, guided_student
from gen.distill.kd import KDTask
from gen.distill.ladd import LADDTask
from gen.distill.multi_student import MultiStudentTask, ScoreMatchingTask
from gen.distill.pairs import Fixed, GridPairs, ShrinkingPairs
from gen.distill.progressive_distillation import ProgressiveTask
from gen.distill.rectified_flow import ReflowTask
from gen.distill.scm import SCDTask, SCMTask
from gen.distill.slimflow import FlowGuidedTask
from gen.experiments._heads import bottleneck_head, every_block
from gen.sampling.generator import FewSteps
from gen.sampling.guidance import ClassifierFree
from gen.training.ema import Constant

CLASSES, BATCH, UPDATES = 10, 16, 4
TEACHER = Denoiser(DiTConfig((64,), 8, 1, 256, 6, 8, num_classes=CLASSES, remat="none", scan=False), Linear())
_PERIOD = 60  # a multiple of every ratio of a method's programs
SHARED: dict[str, Any] = {"emas": (Constant(0.999),)}
GUIDED = {"teacher": TEACHER, "guidance": ClassifierFree(1.5), "dropout": 0.0, **SHARED}
TASKS: Mapping[str, Any] = {
    "teacher": DenoiserTask(TEACHER, **SHARED),
    "meanflow": MeanFlowTask(flow_map=average_map(TEACHER), **SHARED),
    "meanflow, own guidance": MeanFlowTask(flow_map=average_map(TEACHER), omega=1.0, kappa=0.5, **SHARED),
    "meanflow, guided teacher": MeanFlowTask(flow_map=average_map(TEACHER), **GUIDED),
    "shortcut": ShortcutTask(flow_map=average_map(TEACHER, "halvings"), **SHARED),
    "shortcut, guided teacher": ShortcutTask(flow_map=average_map(TEACHER, "halvings"), every=2, **GUIDED),
    "consistency distillation": ConsistencyDistillationTask(
        flow_map=data_map(TEACHER), teacher=TEACHER, pairs=GridPairs(Fixed(18)), weight="uniform", **SHARED
    ),
    "easy consistency tuning": ConsistencyTask(flow_map=data_map(TEACHER), pairs=ShrinkingPairs(), **SHARED),
    "sct": SCMTask(flow_map=trig_map(TEACHER), **SHARED),
    "scd": SCDTask(flow_map=trig_map(TEACHER), teacher=TEACHER, **SHARED),
    "ctm": CTMTask(flow_map=jump_map(TEACHER), teacher=TEACHER, last_layer="final/kernel", **SHARED),
    "kd": KDTask(teacher=TEACHER, **SHARED),
    "reflow": ReflowTask(teacher=TEACHER, **SHARED),
    "slimflow, second stage": FlowGuidedTask(teacher=TEACHER, **SHARED),
    "progressive distillation": ProgressiveTask(teacher=TEACHER, **SHARED),
    "guided distillation": GuidedTask(teacher=TEACHER, student=guided_student(TEACHER), **SHARED),
    "teacher score matching": ScoreMatchingTask(teacher=TEACHER, **SHARED),
    "dmd2": DMD2Task(teacher=TEACHER, **bottleneck_head(TEACHER), **SHARED),
    "f-distill": FDistillTask(teacher=TEACHER, **every_block(TEACHER), **SHARED),
    "ladd": LADDTask(teacher=TEACHER, **every_block(TEACHER), **SHARED),
    "multi-student, two of half a batch": MultiStudentTask(
        DMD2Task(teacher=TEACHER, **bottleneck_head(TEACHER), **SHARED), contiguous(CLASSES, 2)
    ),
}


def prepared(task: Any) -> Callable[[], np.ndarray]:
    """A function that makes some updates of the student and gives the (wall, CPU) seconds of one; compiled and warm."""
    rows = np.random.default_rng(0).normal(size=(2, BATCH, 64, 8)).astype(np.float32)
    label = np.arange(BATCH, dtype=np.int32) % CLASSES
    batch = jax.device_put({"latent": rows[0], "noise": rows[1], "label": label})
    frozen = {"teacher": TEACHER.net.init(jax.random.key(0))}
    state = jax.jit(task.init, static_argnums=2)(jax.random.key(1), frozen, None)
    programs = {name: jax.jit(program, donate_argnums=0) for name, program in task.programs.items()}
    schedule = {name: jnp.asarray(value) for name, value in task.inputs(0, 1).items()}
    steps = [task.select(i) for i in range(_PERIOD)]
    steps = steps[: _PERIOD // steps.count(next(iter(programs)))] * UPDATES
    held = [state]
    for program in programs.values():
        held[0] = program(held[0], frozen, batch, schedule, jax.random.key(2))[0]
    jax.block_until_ready(held)

    def run() -> np.ndarray:
        began = np.array([time.perf_counter(), time.process_time()])
        for i, name in enumerate(steps):
            held[0] = programs[name](held[0], frozen, batch, schedule, jax.random.key(i))[0]
        jax.block_until_ready(held)
        return (np.array([time.perf_counter(), time.process_time()]) - began) / UPDATES

    return run


def sampling() -> tuple[float, float]:
    """One-step sampling over a bare forward pass, in (wall, CPU) seconds: medians of interleaved repeats."""
    params, label = TEACHER.net.init(jax.random.key(0)), np.arange(BATCH, dtype=np.int32) % CLASSES
    task = KDTask(teacher=TEACHER, **SHARED)
    generator = jax.jit(FewSteps().generator(task.models(), None))
    keys, cond = jax.random.split(jax.random.key(1), BATCH), {"label": jnp.asarray(label)}
    bare = jax.jit(lambda p, x, t: TEACHER.net(p, x, (t,), cond)[0])
    x, t = jax.random.normal(jax.random.key(2), (BATCH, 64, 8)), jnp.ones(BATCH)
    runs = (lambda: generator({"net": params}, keys, cond), lambda: bare(params, x, t))
    for run in runs:
        jax.block_until_ready(run())
    times = np.zeros((25, 2, 2))
    for i in range(len(times)):
        for j, run in enumerate(runs):
            began = np.array([time.perf_counter(), time.process_time()])
            jax.block_until_ready([run() for _ in range(UPDATES)])
            times[i, j] = np.array([time.perf_counter(), time.process_time()]) - began
    wall, cpu = np.median(times[:, 0] / times[:, 1], axis=0)
    return float(wall), float(cpu)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[name for name in TASKS if name != "teacher"], choices=list(TASKS))
    args = parser.parse_args()
    runs = {name: prepared(TASKS[name]) for name in ("teacher", *args.only)}
    times = {name: np.zeros((args.repeats, 2)) for name in runs}
    for i in range(args.repeats):
        for name, run in runs.items():
            times[name][i] = run()
    own = times["teacher"]
    print(f"| method | seconds per update | over the teacher's | in CPU seconds |\n|{'---|' * 4}")
    for name, found in times.items():
        wall, cpu = np.median(found / own, axis=0)
        print(f"| {name} | {np.median(found[:, 0]):.3f} | {wall:.2f} | {cpu:.2f} |")
    wall, cpu = sampling()
    print(f"one-step sampling over a bare forward pass: {wall:.2f}, in CPU seconds {cpu:.2f}")


if __name__ == "__main__":
    main()
