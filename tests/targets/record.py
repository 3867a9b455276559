"""Compiles cases and writes what the compiler said of them to recorded.json.

.venv-targets/bin/python -m tests.targets.record dit-b2 "edm2-xs-512 v5e"      cases whose names start so
.venv-targets/bin/python -m tests.targets.record --missing                       those that are not recorded
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from tests.targets.cases import CASES, Case
from tests.targets.conftest import RECORDED

__all__ = ["compile_case"]

# VGG16's convolutions (Simonyan & Zisserman 2015, table 1, D) in the slices of LPIPS: (in, out) by index of the layer
_VGG = (
    {0: (3, 64), 2: (64, 64)},
    {5: (64, 128), 7: (128, 128)},
    {10: (128, 256), 12: (256, 256), 14: (256, 256)},
    {17: (256, 512), 19: (512, 512), 21: (512, 512)},
    {24: (512, 512), 26: (512, 512), 28: (512, 512)},
)


def compile_case(case: Case) -> dict[str, Any]:
    """Figures of the case's training programs by their names, in a process of its own: compilers keep their memory."""
    command = [sys.executable, "-m", "tests.targets.record", "--one", case.name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=7200)
    if done.returncode:
        raise AssertionError(f"{case.name}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _perceptual() -> None:
    """Writes the networks of tokenizers' losses, of zeros: steps must not depend on which of them this machine has."""
    from gen.arrays import unflatten
    from gen.features.convnext import ConvNeXt
    from gen.features.weights import cache_path, store_weights

    convnext = ConvNeXt()
    lpips: dict[str, tuple[int, ...]] = {f"lin{i}": (max(layers.values())[1],) for i, layers in enumerate(_VGG)}
    for i, layers in enumerate(_VGG):
        for index, channels in layers.items():
            path = f"net/slice{i + 1}/{index}"
            lpips |= {f"{path}/kernel": (3, 3, *channels), f"{path}/bias": channels[1:]}
    for name, shapes in ((convnext.name, convnext.shapes()), ("lpips-vgg", lpips)):
        tree = unflatten({path: np.zeros(shape, np.float32) for path, shape in shapes.items()})
        store_weights(cache_path(name), tree, origin="zeros")


def _figures(case: Case) -> dict[str, Any]:
    from gen.training.targets import prepare

    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        prepare()
        _perceptual()
        return _compiled(case)


def _compiled(case: Case) -> dict[str, Any]:
    from gen.cli.estimates import estimates
    from gen.cli.overrides import mesh_overrides
    from gen.config import to_json
    from gen.training.targets import find_target

    inputs = {"data": None, "teacher": case.teacher, "tokenizer": case.tokenizer}
    config, made = estimates(
        case.preset,
        find_target(case.target),
        inputs=inputs,
        overrides=mesh_overrides(case.mesh),
        batch=case.batch,
        quick=case.quick,
    )
    wide = case.quick and "fsdp" in case.mesh  # a quick compiler gathers in float32
    width = 2 if "bfloat16" in json.dumps(to_json(config)) and not wide else 4
    return {
        program.name: {
            "step_ms": None if found.step is None else round(1e3 * found.step, 3),
            "share": None if found.share is None else round(found.share, 3),
            "arguments": found.arguments,
            "temporaries": found.temporaries,
            "parameters": program.parameters,
            "width": width,
            "sent": round(found.sent),
            "collectives": {kind: traffic.count for kind, traffic in found.traffic.items()},
            "attention": dict(found.attention),
        }
        for program, found in made
    }


def main() -> None:
    """Records what is asked for, a case at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--one", help="prints the figures of one case and records nothing")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(_figures(next(case for case in CASES if case.name == given.one))))
        return
    known = json.loads(RECORDED.read_text())
    for case in CASES:
        if not (given.missing and case.name not in known) and not any(case.name.startswith(n) for n in given.names):
            continue
        try:
            known[case.name] = compile_case(case)
        except AssertionError as error:
            print(error, file=sys.stderr, flush=True)
            continue
        RECORDED.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        print(case.name, json.dumps(known[case.name]), flush=True)


if __name__ == "__main__":
    main()
