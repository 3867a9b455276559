"""``gen compile``: what a preset would need on hardware that is not here, as its compiler says."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from gen.cli.estimates import estimates
from gen.cli.flags import flag
from gen.cli.opening import Overrides
from gen.cli.overrides import mesh_overrides

__all__ = ["as_json", "compile_preset", "rows"]


def compile_preset(
    preset: Annotated[str, tyro.conf.Positional, flag("PRESET|FILE.py:PRESET")],
    /,
    *,
    target: Annotated[str, flag("NAME[:SHAPE]")],
    mesh: Annotated[str | None, flag("AXIS=N,...")] = None,
    batch: Annotated[int | None, flag("N")] = None,
    batch_gpu: Annotated[int | None, flag("N")] = None,
    data: Annotated[str | None, flag("DATA")] = None,
    teacher: Annotated[str | None, flag("RUN|PRESET")] = None,
    tokenizer: Annotated[str | None, flag("RUN|PRESET")] = None,
    programs: Annotated[str, flag("KIND,...")] = "train,sample,one-step",
    json: Annotated[Path | None, flag("FILE")] = None,
    hlo: Annotated[Path | None, flag("DIR")] = None,
    quick: bool = False,
    overrides: Overrides = (),
) -> None:
    """Compiles a preset's programs for TPUs or GPUs that are not here, and shows what the compiler says of them.

    Memory against what a device has, products, fused attention, traffic between devices, and for TPUs the compiler's
    own estimate of a step and its dearest operations. These are estimates, good for comparing; measured is nothing.
    The compilers come in wheels (docs/accelerators.md). Data are not needed: random arrays take their place.

    Examples:
      gen compile dit-xl2 --target v5e:8x8
      gen compile dit-b2 --target h200 --programs train
      gen compile edm2-xxl-512 --target v5p:4x4x4 --mesh data=8,fsdp=8 --json xxl.json
      gen compile dit-b2 --target v5e:2x2 --stages.0.task.denoiser.network.remat none

    Args:
      preset: a preset from gen list or of your own file.
      target: v5e:8x8, v5p:4x4x4, v6e:4x4: a slice of TPUs; h200, or h200:8 for the GPUs of one machine.
      mesh: axis sizes, as for gen info; the preset's own by default.
      batch: global batch size of every stage.
      batch_gpu: samples per device at a time, in training as for gen train and in sampling.
      data: the data or latent cache; random arrays of the shapes that the preset takes by default.
      teacher: the teacher's run folder, or its preset, whose shapes are enough.
      tokenizer: the tokenizer's run folder, or its preset.
      programs: what to compile: train, sample (at the preset's number of steps), one-step (a student of the model),
        evaluate (Inception features, the same for all models of images of a size; minutes of compiling for TPUs).
      json: a file for the same figures.
      hlo: a folder for the compiled programs as text.
      quick: for TPUs: memory and traffic alone, in a fraction of the time. Memory comes out a little higher, gathered
        weights may count in float32.
    """
    from gen.training.targets import find_target
    from gen.training.targets import prepare as prepare_compilers

    found = find_target(target)
    prepare_compilers()
    kinds = [kind.strip() for kind in programs.split(",")]
    inputs = {"data": data, "teacher": teacher, "tokenizer": tokenizer}
    config, made = estimates(
        preset,
        found,
        inputs=inputs,
        overrides=(*mesh_overrides(mesh), *overrides),
        batch=batch,
        batch_gpu=batch_gpu,
        kinds=kinds,
        hlo=hlo,
        quick=quick,
        say=print,
    )
    _show(found, made)
    if json is not None:
        from gen.files import write_json

        write_json(json, as_json(config, found, made))


def as_json(config: Any, target: Any, made: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """Gives the figures as JSON."""
    import jax

    return {
        "preset": config.name,
        "target": target.name,
        "mesh": dataclasses.asdict(config.engine.mesh),
        "jax": jax.__version__,
        "note": "a compiler's estimates, not measurements",
        "programs": [
            {"images": program.images, "parameters": program.parameters, **dataclasses.asdict(found)}
            for program, found in made
        ],
    }


def _show(target: Any, made: Sequence[tuple[Any, Any]]) -> None:
    """Prints the table of the programs, and the dearest operations of those that are trained with."""
    from gen.cli.tables import print_table

    print()
    print_table(["per device and call", *(program.name for program, _ in made)], rows(target, made))
    for program, found in made:
        if found.dearest and program.kind == "train":
            print(f"\nthe dearest operations of '{program.name}', by the compiler's estimate")
            print_table(
                ["operation", "time", "of the step", "times"],
                [
                    [label, f"{1e3 * seconds:.2f} ms", f"{100 * seconds / found.step:.1f} %", str(times)]
                    for label, seconds, times in found.dearest
                ],
            )
    print("\nThese are a compiler's estimates for comparing programs, not measurements.")


def rows(target: Any, made: Sequence[tuple[Any, Any]]) -> list[list[str]]:
    """Gives the table's rows: what is asked of every program."""
    chip, kinds = target.chip, sorted({kind for _, found in made for kind in found.traffic})

    def row(label: str, cell: Any) -> list[str]:
        return [label, *(cell(program, found) for program, found in made)]

    def traffic(kind: str) -> Any:
        def cell(program: Any, found: Any) -> str:
            if kind not in found.traffic:
                return "-"
            return f"{found.traffic[kind].count} x, {size(found.traffic[kind].sent)}"

        return cell

    table = [
        row("images of all devices", lambda p, f: str(p.images)),
        row("compile", lambda p, f: f"{f.seconds:.0f} s"),
        row("arguments", lambda p, f: gib(f.arguments)),
        row("temporaries", lambda p, f: gib(f.temporaries)),
        row(f"of {chip.memory / 2**30:.0f} GiB", lambda p, f: f"{100 * f.memory / chip.memory:.0f} %"),
        row("products", lambda p, f: f"{f.flops.model / 1e12:.2f} TFLOP"),
        row("recomputed", lambda p, f: f"{f.flops.recomputed / 1e12:.2f} TFLOP" if f.flops.recomputed else "-"),
        row("fused attention", lambda p, f: ", ".join(f"{n} x {name}" for name, n in f.attention.items()) or "-"),
        *(row(f"{kind}, sent", traffic(kind)) for kind in kinds),
        row("sent / parameters", lambda p, f: f"{f.sent / (2 * p.parameters):.2f} of 2 bytes" if p.parameters else "-"),
    ]
    if any(found.step for _, found in made):
        table += [
            row("estimated time", lambda p, f: f"{1e3 * f.step:.1f} ms"),
            row(f"of {chip.peak / 1e12:.0f} TFLOP/s", lambda p, f: f"{100 * f.share:.0f} %"),
        ]
    return table


def gib(value: float) -> str:
    """Writes bytes of memory as text."""
    return f"{value / 2**30:.2f} GiB"


def size(value: float) -> str:
    """Writes bytes as text, decimal as traffic is given."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
