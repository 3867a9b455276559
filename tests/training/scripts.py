"""Runs of the toy in their own process, for tests that kill them or need several devices or processes."""

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from gen.kinds import KINDS
from gen.training.engine import Hook, Interrupted, train
from gen.training.program import enable_compile_cache
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage
from tests.training.toy import OPTIM, ToyData, ToyTask, teacher

STEPS = (30, 20)
TOYS = {f"toy-{name.lower()}": f"tests.training.toy:{name}" for name in ("ToyTask", "ToyData", "LinearConfig", "Held")}


def register() -> None:
    """Gives the toys their kinds in this process."""
    KINDS["toy"] = TOYS


def build() -> Any:
    """(task, data, frozen) for the conformance checks."""
    register()
    return ToyTask(), ToyData(), teacher()


def config(checkpoint_every: int = 7, **engine: Any) -> RunConfig:
    """Two stages; the second starts from the first one's student."""
    stages = (
        Stage("one", ToyTask(), STEPS[0], 16, ToyData()),
        Stage("two", ToyTask(optim=dataclasses.replace(OPTIM, lr=5e-3)), STEPS[1], 16, ToyData()),
    )
    return RunConfig(
        "toy",
        stages,
        frozen={"teacher": "toy"},
        engine=EngineConfig(checkpoint_every=checkpoint_every, quiet=True, **engine),
    )


def killed_at(step: int, number: int) -> Hook:
    """Sends this process a signal after a global step."""

    def call(stage: str, now: int, state: Any, frozen: Any) -> None:
        if now == step:
            os.kill(os.getpid(), number)

    return Hook(1, call)


def main(outdir: str, step: str, cache: str) -> None:
    """Runs the toy in `outdir`; killed by SIGKILL after `step` unless that is 0."""
    register()
    enable_compile_cache(cache)
    hooks = (killed_at(int(step), signal.SIGKILL),) if int(step) else ()
    train(config(), Path(outdir), frozen=teacher(), hooks=hooks)


def two_processes(outdir: str, port: str, process: str, step: str = "0") -> None:
    """One of two processes with two simulated devices each; told to leave at `step`, process 1 alone gets SIGTERM."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    register()
    slow = Hook(1, lambda *_: time.sleep(0.2))  # the processes agree on a step some tenths of a second ahead
    notice = (killed_at(int(step), signal.SIGTERM),) if process == "1" else ()
    try:
        train(config(), Path(outdir), frozen=teacher(), hooks=(slow, *notice) if int(step) else ())
    except Interrupted as stop:
        print(stop, file=sys.stderr, flush=True)
        sys.exit(3)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
