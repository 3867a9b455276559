"""Kills jobs on image data with SIGKILL at random moments, again and again, and compares what they end with.

    python scripts/kill_data.py --kills 20

The jobs: `gen data convert` to a zip, to tar shards and to ArrayRecord; training on a zip; encoding a zip into a latent
cache. Each is killed until it has been killed often enough; whenever it ends, its files (of training: its weights and
logged losses) must equal those of an undisturbed run to the last bit. The status is 1 when any differ.
"""

import argparse
import dataclasses
import io
import json
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

TOKENIZER = "tokenizer"  # the job that another one needs, which nobody kills


@dataclasses.dataclass(frozen=True)
class Job:
    """One command and what it leaves.

    Attributes:
      arguments: of ``gen``; run in a folder of its own, where it writes `out`.
      out: the file or folder that stands there once it is done.
      content: of `out`, by name.
      whole: whether `out` appears only when it is done; run again, the command then refuses to replace it.
    """

    arguments: list[str]
    out: str
    content: Callable[[Path], dict[str, bytes]]
    whole: bool = False


def photographs(path: Path, count: int, width: int, height: int) -> str:
    """A zip of JPEG files with ten classes; gives its path."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (height // 10 + 1, width // 10 + 1, 3), np.uint8))
            file = io.BytesIO()
            coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG")
            archive.writestr(f"{i:05d}.jpg", file.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": [[f"{i:05d}.jpg", i % 10] for i in range(count)]}))
    return str(path)


def files(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of the files of a folder."""
    return {file.name: file.read_bytes() for file in ([path] if path.is_file() else path.iterdir())}


def trained(path: Path) -> dict[str, bytes]:
    """Weights and logged losses of a run folder."""
    import jax

    import gen

    leaves = jax.tree_util.tree_leaves_with_path(gen.load(path).params)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    losses = {f"loss at step {row['step']}": str(row["loss"]).encode() for row in rows if "loss" in row}
    return losses | {jax.tree_util.keystr(name): np.asarray(leaf).tobytes() for name, leaf in leaves}


def jobs(folder: Path, images: int) -> dict[str, Job]:
    """All of them by name, and the training of the tokenizer that encodes; makes their data."""
    large = photographs(folder / "large.zip", images, 240, 200)
    small = photographs(folder / "small.zip", 2 * images, 32, 32)
    options = ["--size", "128", "--shard", "256"]
    smoke = ["train", "cifar10-tokenizer-smoke", "--data", small, "--engine.checkpoint_every", "10"]
    smoke += ["--engine.checkpoint_seconds", "0", "--engine.log_every", "5"]
    encode = ["encode", str(folder / "tokenizer"), "--data", small, "--batch", "16", "--out", "latents"]
    return {
        "convert to zip": Job(["data", "convert", large, "out.zip", *options], "out.zip", files, True),
        "convert to shards": Job(["data", "convert", large, "shards", *options], "shards", files, True),
        "convert to ArrayRecord": Job(
            ["data", "convert", large, "a.array_record", *options], "a.array_record", files, True
        ),
        TOKENIZER: Job([*smoke, "--outdir", "tokenizer", "--steps", "20"], "tokenizer", trained),
        "training on a zip": Job([*smoke, "--outdir", "run", "--steps", "100"], "run", trained),
        "latent cache": Job(encode, "latents", files),
    }


def run(job: Job, folder: Path, limit: float | None = None) -> bool:
    """Runs the job, killed after `limit` seconds; True when it ended by itself."""
    folder.mkdir(exist_ok=True)
    command = [str(Path(sys.executable).absolute().with_name("gen")), *job.arguments]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False
    if process.returncode:
        raise RuntimeError(f"gen {' '.join(job.arguments)} ended with {process.returncode}: {errors.decode()[-500:]}")
    return True


def hurt(name: str, job: Job, folder: Path, kills: int, rng: random.Random) -> bool:
    """Kills the job `kills` times, over as many complete runs as that takes; True when all end alike."""
    run(job, folder / f"{name} warm")  # fills the compile cache, so that the kills fall into the work itself
    began = time.monotonic()
    run(job, folder / f"{name} whole")
    span = time.monotonic() - began
    expected = job.content(folder / f"{name} whole" / job.out)
    done, runs, same = 0, 0, True
    while done < kills:
        place, runs = folder / f"{name} {runs}", runs + 1
        while not (job.whole and (place / job.out).exists()):  # a kill may fall between the end and the exit
            if run(job, place, rng.uniform(0.2, 1.0) * span if done < kills else None):
                break
            done += 1
        same = same and job.content(place / job.out) == expected
        print(f"{name}: run {runs} ended after {done} kills in all{'' if same else ', DIFFERENT'}", flush=True)
    print(
        f"{name}: {done} kills in {runs} runs, undisturbed {span:.1f} s; {'equal' if same else 'DIFFERENT'}", flush=True
    )
    return same


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each job")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of a job's name")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        known = jobs(Path(folder), args.images)
        tokenizer = known.pop(TOKENIZER)
        chosen = {name: job for name, job in known.items() if args.only in name}
        if any(job.out == "latents" for job in chosen.values()):
            run(tokenizer, Path(folder))
        same = [hurt(name, job, Path(folder), args.kills, rng) for name, job in chosen.items()]
    return 0 if same and all(same) else 1


if __name__ == "__main__":
    raise SystemExit(main())
