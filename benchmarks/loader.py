"""Images per second of the training pipeline and of the conversion, beside PyTorch's DataLoader and plain Pillow.

    python benchmarks/loader.py --peer-python /path/to/python --data photographs-256.zip

Every comparison runs in turns within one call (us, them, us, ...), so that a machine whose speed drifts does not decide
it; ratios are medians over the turns. On a machine that others use as well, images per second of CPU time say more than
images per second: times the number of idle processors, they are what it can do. Both load the same files with the same
transforms on as many workers as there are processors:

- stored: JPEG files that have their size already; decoding and a flip.
- cropped: JPEG files of 400 x 340 pixels; decoding, ADM's centre crop to 256 pixels, a flip.

The conversion is compared with what EDM's dataset tool does: one image after the other with Pillow, decoded, cropped,
and written as PNG without compression into a stored zip.
"""

import argparse
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from gen.data import transforms
from gen.data.convert import Transcode, convert
from gen.data.images import Images
from gen.data.stores import open_store
from gen.data.transforms import adm_center_crop

SIZE, BATCH = 256, 64
Rate = tuple[float, float]  # images per second, images per second of CPU time
PREPARED = 10  # batches that may lie ready when a turn begins


def photographs(path: Path, count: int, width: int, height: int) -> Path:
    """A zip of JPEG files with the structure of photographs (smooth noise)."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (height // 10, width // 10, 3), np.uint8))
            out = io.BytesIO()
            coarse.resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=92)
            archive.writestr(f"{i:05d}.jpg", out.getvalue())
    return path


def timed(began: float, used: float, images: int) -> Rate:
    """The rate since a moment of `time.monotonic` and `time.process_time`."""
    return images / (time.monotonic() - began), images / (time.process_time() - used)


def ours(path: Path, crop: int) -> Callable[[float], Rate]:
    """Seconds -> images per second of the training pipeline."""
    data = Images(str(path), size=SIZE, crop="adm" if crop else "none", flip=True, labels="none")
    stream = data.batches(batch=BATCH, seed=0, start=0)

    def measure(seconds: float) -> Rate:
        for _ in range(PREPARED):
            next(stream)
        began, used, images = time.monotonic(), time.process_time(), 0
        while time.monotonic() - began < seconds:
            images += len(next(stream)["image"])
        return timed(began, used, images)

    return measure


def theirs(python: str, path: Path, crop: int) -> Callable[[float], Rate]:
    """The same of torch's DataLoader, in a process of its own."""
    script = Path(__file__).with_name("torch_loader.py")
    command = [python, str(script), str(path), str(crop), str(BATCH), str(os.cpu_count() or 1)]
    env = os.environ | {"PYTHONPATH": str(Path(transforms.__file__).parents[2])}
    peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def measure(seconds: float) -> Rate:
        assert peer.stdin is not None
        assert peer.stdout is not None
        peer.stdin.write(f"{seconds}\n")
        peer.stdin.flush()
        wall, cpu = map(float, peer.stdout.readline().split())
        return wall, cpu

    return measure


def without_extra(measure: Callable[[float], Rate]) -> Callable[[float], Rate]:
    """The same as if simplejpeg were not installed."""

    def plain(seconds: float) -> Rate:
        known, transforms._simplejpeg = transforms._simplejpeg, lambda: None
        try:
            return measure(seconds)
        finally:
            transforms._simplejpeg = known

    return plain


def conversion(path: Path, out: Path) -> Rate:
    """Of `gen data convert`."""
    began, used = time.monotonic(), time.process_time()
    done, _ = convert(open_store(path), out, Transcode(SIZE, "adm"))
    return timed(began, used, done)


def plain_conversion(path: Path, out: Path) -> Rate:
    """Of one image after the other with Pillow, into the same zip."""
    began, used = time.monotonic(), time.process_time()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(out, "w") as made:
        names = archive.namelist()
        for i, name in enumerate(names):
            image = adm_center_crop(Image.open(io.BytesIO(archive.read(name))).convert("RGB"), SIZE)
            file = io.BytesIO()
            image.save(file, "PNG", compress_level=0)
            made.writestr(f"{i // 1000:05d}/img{i:08d}.png", file.getvalue())
    return timed(began, used, len(names))


def compare(title: str, turns: int, ways: dict[str, Callable[[], Rate]]) -> None:
    """Runs the ways in turn and prints the median of each, and the first's ratio to it."""
    rates: dict[str, list[Rate]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            rates[name].append(way())
    first = next(iter(rates.values()))
    for name, found in rates.items():
        texts = []
        for kind, unit in enumerate(("images/s", "images per CPU second")):
            ratio = statistics.median(a[kind] / b[kind] for a, b in zip(first, found, strict=True))
            texts.append(f"{statistics.median(rate[kind] for rate in found):.0f} {unit} (ratio {ratio:.2f})")
        print(f"{title}, {name}: {', '.join(texts)}", flush=True)


def rounds(seconds: float, ways: dict[str, Callable[[float], Rate]]) -> dict[str, Callable[[], Rate]]:
    """The ways with their time bound."""
    return {name: lambda way=way: way(seconds) for name, way in ways.items()}


def main() -> None:
    """Prints one line per way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4, help="of each turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--images", type=int, default=512, help="that are generated")
    parser.add_argument("--data", type=Path, help="a zip of JPEG files of 256 pixels instead of generated ones")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has torch (this one)")
    args = parser.parse_args()
    print(f"{os.cpu_count()} processors, simplejpeg {'not ' if transforms._simplejpeg() is None else ''}installed")
    with tempfile.TemporaryDirectory() as folder:
        stored = args.data or photographs(Path(folder) / "stored.zip", args.images, SIZE, SIZE)
        large = photographs(Path(folder) / "large.zip", args.images, 400, 340)
        for title, path, crop in (("stored", stored, 0), ("cropped", large, SIZE)):
            measure = ours(path, crop)
            ways = {"gen": measure, "torch DataLoader": theirs(args.peer_python, path, crop)}
            compare(title, args.turns, rounds(args.seconds, ways | {"gen without simplejpeg": without_extra(measure)}))
        numbers: Iterator[int] = iter(range(10**6))
        outs = (Path(folder) / f"{number}.zip" for number in numbers)
        converted = {"gen": conversion, "Pillow, one thread": plain_conversion}
        ways = {name: lambda way=way: way(large, next(outs)) for name, way in converted.items()}
        compare("convert", args.turns, ways)


if __name__ == "__main__":
    main()
