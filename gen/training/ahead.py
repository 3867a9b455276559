"""Programs compiled ahead of time, and what their compiler says of them: memory, traffic, kernels, time."""

import dataclasses
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from gen.errors import GenError
from gen.training import hlo
from gen.training.flops import Flops, count_flops
from gen.training.hlo import Traffic
from gen.training.targets import Target

__all__ = ["Estimate", "estimate"]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What the compiler says of one program; a measurement it is not. Everything is per device and call.

    Attributes:
      program: what it is called.
      seconds: that compiling took.
      arguments, temporaries: bytes of what it is given, and of what it needs at one time beside that.
      flops: of products and convolutions, an equal share of the whole.
      attention: calls of fused attention by kernel.
      traffic: between devices, by kind of collective.
      step: seconds by the compiler's estimate of cycles; None where it makes none (GPUs).
      dearest: (operation, seconds, how often), the ten dearest.
      share: of the device's peak, if the model's products were all that it did in `step` seconds.
    """

    program: str
    seconds: float
    arguments: int
    temporaries: int
    flops: Flops
    attention: Mapping[str, int]
    traffic: Mapping[str, Traffic]
    step: float | None
    dearest: tuple[tuple[str, float, int], ...]
    share: float | None

    @property
    def memory(self) -> int:
        """Bytes at one time."""
        return self.arguments + self.temporaries

    @property
    def sent(self) -> float:
        """Bytes that a device sends."""
        return sum(traffic.sent for traffic in self.traffic.values())


def estimate(name: str, traced: Any, target: Target, dump: Path | None = None, *, quick: bool = False) -> Estimate:
    """Compiles a program traced for the devices of `target`; several may compile at a time, each in a thread.

    Args:
      name: what the program is called.
      traced: as of ``jax.jit(...).trace(...)``, of shapes whose shardings name those devices.
      dump: a file that gets the text of the compiled program; None for none.
      quick: whether a TPU's compiler looks no further for fast code. Collectives stay what they are, but weights that
        are gathered may travel in float32; memory comes out a little higher, and of time nothing is said: it would be
        several times too long.

    Raises GenError for a program that needs more memory than a device has, and one that the compiler refuses.
    """
    began, quick = time.monotonic(), quick and target.chip.clock > 0
    try:
        compiled = traced.lower().compile(compiler_options=_QUICK if quick else None)
    except jax.errors.JaxRuntimeError as error:
        raise GenError(_refused(name, target, str(error))) from None
    seconds, text, memory = time.monotonic() - began, compiled.as_text(), compiled.memory_analysis()
    if dump is not None:
        dump.parent.mkdir(parents=True, exist_ok=True)
        dump.write_text(text)
    flops, clock = count_flops(traced.jaxpr.jaxpr), target.chip.clock
    flops = Flops(flops.model / target.count, flops.recomputed / target.count)
    rows = _labelled(hlo.cycles(text))
    total = sum(cycles for cycles, _ in rows.values())
    step = total / clock if clock and total and not quick else None
    dearest = sorted(rows.items(), key=lambda row: -row[1][0])[:10]
    return Estimate(
        name,
        seconds,
        int(memory.argument_size_in_bytes),
        int(memory.temp_size_in_bytes) + int(memory.output_size_in_bytes) - int(memory.alias_size_in_bytes),
        flops,
        hlo.attention_calls(text),
        hlo.collectives(text),
        step,
        tuple((label, cycles / clock, times) for label, (cycles, times) in dearest) if step else (),
        flops.model / target.chip.peak / step if step else None,
    )


# of the scale from -1 to 1 on which XLA places how long it may look for fast code
_QUICK = {"exec_time_optimization_effort": -1.0}

# the two ways in which a TPU's compiler says that its memory does not do
_BEYOND = re.compile(r"Used ([\d.]+[KMGT]) of [\d.]+[KMGT] hbm|\(([\d.]+[KMGT])\) exceeds available HBM")


def _refused(name: str, target: Target, text: str) -> str:
    """One line of what the compiler said."""
    has = f"{target.chip.memory / 2**30:.0f} GiB"
    if found := _BEYOND.search(text):
        return (
            f"'{name}' needs {found.group(1) or found.group(2)}iB per device and a {target.chip.title} has {has}: take "
            "fewer samples at a time (--batch-gpu N), cut the state over more devices (--mesh fsdp=N) or recompute "
            "more (remat full)"
        )
    first = next((line for line in text.splitlines() if line.strip()), "no reason given")
    return f"the compiler of {target.chip.title} refuses '{name}': {first[:300]}"


def _labelled(rows: list[tuple[str, int, int]]) -> dict[str, tuple[int, int]]:
    """(cycles, how often) by what people call an operation: where in the step, and which of jax's."""
    found: dict[str, tuple[int, int]] = {}
    for origin, cycles, times in rows:
        label = _label(origin)
        before = found.get(label, (0, 0))
        found[label] = (before[0] + cycles, before[1] + times)
    return found


# what jax wraps around an operation: functions, loops, branches, transformations
_FRAMES = re.compile(
    r"^(jit\(_?\w*\)|pjit|while|body|cond|branch_\d+_fun|closed_call|checkpoint|rematted_computation|jvp\(.*|)$"
)


def _label(origin: str) -> str:
    """ "jit(_step)/transpose(jvp())/while/body/checkpoint/dot_general" -> "backward dot_general"."""
    if not origin:
        return "(the compiler's own)"
    where = "other"
    if "jvp(" in origin:
        where = "backward" if "transpose(" in origin else "forward"
    if "rematted_computation" in origin:
        where = "recomputed"
    parts = [part for part in origin.split("/")[1:] if not part.startswith("transpose(") and not _FRAMES.match(part)]
    return f"{where} {'/'.join(parts[-2:]) or origin.rpartition('/')[2]}"
