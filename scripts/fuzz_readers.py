"""Damages data files in every layout for a while, and checks that readers only ever say so in one line.

    python scripts/fuzz_readers.py --seconds 600

A reader may succeed or raise GenError, within five seconds and 1 GiB of memory; anything else is printed with the
seed that makes it again, and ends the script with status 1. Each layout is read in a process of its own, so that a
crash or a hang is seen as well. Nothing may appear beside the damaged file. The layouts are those of images, their
labels ("dataset.json" of a folder, tar shards), arrays, and latent caches.
"""

import argparse
import io
import json
import multiprocessing
import os
import resource
import shutil
import tarfile
import tempfile
import time
import traceback
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gen.data.caches import Cache
from gen.data.stores import open_store
from gen.errors import GenError

LAYOUTS = ("zip", "tar", "npz", "npy", "png", "jpg", "gif", "tif", "webp", "bmp", "ppm", "array_record")
LAYOUTS += ("avif", "dataset.json", "cache.json", "latent.npy")
PIECES = (b"", b"\0" * 8, b"\xff" * 8, b"PK\3\4", b"PK\5\6", b"(99999999999,)", b"IHDR", b"../../x", b"{" * 64)
SECONDS, MEMORY = 5, 1 << 30
CACHE = {
    "count": 3, "arrays": {"latent": ["<f4", [9, 11, 3]]}, "shift": [0.0] * 3, "scale": [1.0] * 3,
    "tokenizer": "t", "data": "d", "identity": "i",
}  # fmt: skip


def original(layout: str) -> bytes:
    """A small good file."""
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (9, 11, 3), np.uint8) for _ in range(3)]
    out = io.BytesIO()

    def picture(i: int, kind: str) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels[i]).save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(kind, kind.upper()))
        return file.getvalue()

    if layout == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for i in range(3):
                archive.writestr(f"{i}.png", picture(i, "png"))
            archive.writestr("dataset.json", json.dumps({"labels": [[f"{i}.png", i] for i in range(3)]}))
    elif layout == "tar":
        with tarfile.open(fileobj=out, mode="w") as archive:
            for i in range(3):
                for name, data in ((f"{i}.png", picture(i, "png")), (f"{i}.cls", str(i).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    elif layout == "npz":
        np.savez_compressed(out, image=np.stack(pixels), label=np.arange(3))
    elif layout in ("npy", "latent.npy"):
        np.save(out, np.stack(pixels) if layout == "npy" else np.stack(pixels).astype(np.float32))
    elif layout == "dataset.json":
        out.write(json.dumps({"labels": [[f"{i}.png", i] for i in range(3)], "class_names": ["a", "b", "c"]}).encode())
    elif layout == "cache.json":
        return json.dumps(CACHE).encode()
    elif layout == "array_record":
        from array_record.python.array_record_module import ArrayRecordWriter

        with tempfile.TemporaryDirectory() as folder:
            writer = ArrayRecordWriter(f"{folder}/a", "group_size:1")
            for i in range(3):
                writer.write(json.dumps({"name": f"{i}.png", "label": i}).encode() + b"\n" + picture(i, "png"))
            writer.close()
            return Path(folder, "a").read_bytes()
    else:
        return picture(0, layout)
    return out.getvalue()


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Some of: bits flipped, a piece overwritten, cut, repeated."""
    raw = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        where = int(rng.integers(len(raw))) if raw else 0
        kind = int(rng.integers(5))
        if kind == 0 and raw:
            raw[where] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            piece = PIECES[int(rng.integers(len(PIECES)))]
            raw[where : where + len(piece)] = piece
        elif kind == 2:
            del raw[where : where + int(rng.integers(1, 64))]
        elif kind == 3 and rng.random() < 0.3:
            del raw[where:]
        else:
            raw[where:where] = raw[where : where + int(rng.integers(1, 64))]
    return bytes(raw)


def place(layout: str, data: bytes, folder: Path) -> Path:
    """Writes the file where its reader looks for it; returns what the reader is given."""
    if layout in ("dataset.json", "cache.json", "latent.npy"):
        if layout == "dataset.json":
            for i in range(3):
                (folder / f"{i}.png").write_bytes(original("png"))
        else:
            (folder / "latent.npy").write_bytes(original("latent.npy"))
            (folder / "cache.json").write_bytes(original("cache.json"))
        (folder / layout).write_bytes(data)
        return folder
    (folder / f"a.{layout}").write_bytes(data)
    return folder / f"a.{layout}" if layout in ("zip", "tar", "npz", "npy", "array_record") else folder


def read_all(layout: str, path: Path) -> None:
    """Reads everything that is at `path`."""
    if layout in ("cache.json", "latent.npy"):
        source = Cache(str(path)).source()
        source.gather(np.arange(len(source)))
        return
    store = open_store(path)
    for index in range(len(store)):
        store.image(index)


def work(layout: str, seed: int, count: int, folder: str, pipe: Any) -> None:
    """Reads `count` damaged files; sends (seed, None) before each, then (seed, problem) of the first, or (seed, "")."""
    good = original(layout)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    # The native reader of ArrayRecord reserves (but does not use) stacks and heaps for 64 threads.
    limit = now + MEMORY + ((6 << 30) if layout == "array_record" else 0)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    inside = Path(folder) / "data"
    for number in range(seed, seed + count):
        pipe.send((number, None))
        shutil.rmtree(inside, ignore_errors=True)
        inside.mkdir()
        path = place(layout, damaged(good, np.random.default_rng(number)), inside)
        began, problem = time.monotonic(), ""
        try:
            read_all(layout, path)
        except GenError as error:
            problem = f"more than one line: {error}" if "\n" in str(error) else ""
        except BaseException:
            problem = traceback.format_exc()
        if time.monotonic() - began > SECONDS:
            problem = f"took {time.monotonic() - began:.1f} s"
        if strangers := [name for name in os.listdir(folder) if name != "data"]:
            problem = f"wrote {strangers} outside of the data"
        if problem:
            pipe.send((number, problem))
            return
    pipe.send((seed + count, ""))


def block(layout: str, seed: int, count: int) -> str:
    """What went wrong among `count` files of a layout from `seed` on; "" when nothing did."""
    with tempfile.TemporaryDirectory() as folder:
        here, there = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(target=work, args=(layout, seed, count, folder, there))
        process.start()
        there.close()
        last = seed
        try:
            while True:
                if not here.poll(12 * SECONDS):  # which includes the imports
                    return f"seed {last}: hangs"
                try:
                    last, problem = here.recv()
                except EOFError:
                    process.join()
                    return f"seed {last}: the process died ({process.exitcode})"
                if problem is not None:
                    process.join(12 * SECONDS)  # a process that has read everything must be able to end
                    stays = "" if process.exitcode is not None else "the process does not end"
                    return f"seed {last}: {problem or stays}" if problem or stays else ""
        finally:
            process.kill()
            process.join()


def main() -> int:
    """Runs until the time is over; the status is 1 when anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=list(LAYOUTS))
    args = parser.parse_args()
    began, seed, files, problems = time.monotonic(), args.seed, 0, 0
    while time.monotonic() - began < args.seconds:
        for layout in args.layouts:
            problem = block(layout, seed, 100)
            files += 100
            if problem:
                problems += 1
                print(f"{layout}: {problem}", flush=True)
        seed += 100
    print(f"{files} damaged files, {problems} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
