"""Many chips on paper: what the compiler says of a training step on 8, 64 and 256 TPUs.

    python benchmarks/scale.py [--presets dit-xl2,edm2-xxl-512] [--targets v5e:2x4,v5e:8x8,v5e:16x16] [--json FILE]

The images of a chip stay as they are while chips are added (weak scaling), and so does the part of the parameters that
it holds (fsdp 8). The time that the collectives of a step need is what a chip sends over what its links carry; the
efficiency is the time of the smallest slice over that of this one, once where nothing of it hides behind work and once
where everything does that can. Estimates of a compiler (docs/accelerators.md), not measurements.
"""

import argparse
import json
from pathlib import Path
from typing import Any

IMAGES = {"dit-xl2": 16, "edm2-xxl-512": 4}  # of a chip


def row(preset: str, name: str) -> dict[str, Any]:
    """Compiles a training step of `preset` for the slice `name`."""
    from gen.cli.estimates import estimates
    from gen.cli.overrides import mesh_overrides
    from gen.training.targets import find_target

    target = find_target(name)
    mesh = mesh_overrides(f"data={target.count // 8},fsdp=8")
    batch = IMAGES.get(preset, 16) * target.count
    inputs = {"data": None, "teacher": None, "tokenizer": None}
    _, ((_, found),) = estimates(preset, target, inputs=inputs, overrides=mesh, batch=batch)
    return {
        "preset": preset,
        "target": name,
        "chips": target.count,
        "batch": batch,
        "compile_s": round(found.seconds),
        "memory": found.memory,
        "sent": found.sent,
        "step": found.step,
        "links": found.sent / target.chip.links,
        "share": found.share,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Gives the rows as Markdown, with the efficiency against the fewest chips of the same preset."""
    lines = [
        "| preset | chips | batch | GiB a chip | GB sent | estimated step | of peak | links busy | efficiency |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for found in rows:
        first = min((r for r in rows if r["preset"] == found["preset"]), key=lambda r: r["chips"])
        apart = (first["step"] + first["links"]) / (found["step"] + found["links"])
        hidden = max(first["step"], first["links"]) / max(found["step"], found["links"])
        lines.append(
            f"| {found['preset']} | {found['chips']} | {found['batch']} | {found['memory'] / 2**30:.1f} "
            f"| {found['sent'] / 1e9:.2f} | {1e3 * found['step']:.0f} ms | {100 * found['share']:.0f} % "
            f"| {1e3 * found['links']:.0f} ms | {100 * apart:.0f} to {100 * hidden:.0f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    """Compiles what is asked for and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default="dit-xl2,edm2-xxl-512")
    parser.add_argument("--targets", default="v5e:2x4,v5e:8x8,v5e:16x16")
    parser.add_argument("--json", type=Path, help="keeps rows, and goes on with those that are not there yet")
    given = parser.parse_args()
    from gen.training.targets import prepare

    prepare()
    rows: list[dict[str, Any]] = json.loads(given.json.read_text()) if given.json and given.json.exists() else []
    for preset in given.presets.split(","):
        for name in given.targets.split(","):
            if any((r["preset"], r["target"]) == (preset, name) for r in rows):
                continue
            rows.append(row(preset, name))
            print(json.dumps(rows[-1]), flush=True)
            if given.json:
                given.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
