"""Images per second of the training pipeline and of the conversion, beside PyTorch's DataLoader and plain Pillow.

    python benchmarks/loader.py --peer-python /path/to/python --data photographs-256.zip

Every comparison runs in turns within one call (us, them, us, ...), so that a machine whose speed drifts does not decide
it; the ratio is the median over the turns. Both load the same files with the same transforms on as many workers as
there are processors:

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
from gen.data.convert import Encode, convert
from gen.data.images import Images
from gen.data.stores import open_store
from gen.data.transforms import adm_center_crop

SIZE, BATCH = 256, 64
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


def ours(path: Path, crop: int) -> Callable[[float], float]:
    """Seconds -> images per second of the training pipeline."""
    data = Images(str(path), size=SIZE, crop="adm" if crop else "none", flip=True, labels="none")
    stream = data.batches(batch=BATCH, seed=0, start=0)

    def measure(seconds: float) -> float:
        for _ in range(PREPARED):
            next(stream)
        began, images = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            images += len(next(stream)["image"])
        return images / (time.monotonic() - began)

    return measure


def theirs(python: str, path: Path, crop: int) -> Callable[[float], float]:
    """The same of torch's DataLoader, in a process of its own."""
    script = Path(__file__).with_name("torch_loader.py")
    command = [python, str(script), str(path), str(crop), str(BATCH), str(os.cpu_count() or 1)]
    env = os.environ | {"PYTHONPATH": str(Path(transforms.__file__).parents[2])}
    peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def measure(seconds: float) -> float:
        assert peer.stdin is not None
        assert peer.stdout is not None
        peer.stdin.write(f"{seconds}\n")
        peer.stdin.flush()
        return float(peer.stdout.readline())

    return measure


def without_extra(measure: Callable[[float], float]) -> Callable[[float], float]:
    """The same as if simplejpeg were not installed."""

    def plain(seconds: float) -> float:
        known, transforms._simplejpeg = transforms._simplejpeg, lambda: None
        try:
            return measure(seconds)
        finally:
            transforms._simplejpeg = known

    return plain


def conversion(path: Path, out: Path) -> float:
    """Images per second of `gen data convert`."""
    store = open_store(path)
    began = time.monotonic()
    convert(store, out, Encode(SIZE, "adm"))
    return len(store) / (time.monotonic() - began)


def plain_conversion(path: Path, out: Path) -> float:
    """Images per second of one image after the other with Pillow, into the same zip."""
    began = time.monotonic()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(out, "w") as made:
        names = archive.namelist()
        for i, name in enumerate(names):
            image = adm_center_crop(Image.open(io.BytesIO(archive.read(name))).convert("RGB"), SIZE)
            file = io.BytesIO()
            image.save(file, "PNG", compress_level=0)
            made.writestr(f"{i // 1000:05d}/img{i:08d}.png", file.getvalue())
    return len(names) / (time.monotonic() - began)


def compare(title: str, turns: int, ways: dict[str, Callable[[], float]]) -> None:
    """Runs the ways in turn and prints the median of each, and of the first's ratio to it."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            rates[name].append(way())
    first = next(iter(rates.values()))
    for name, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(first, found, strict=True))
        print(f"{title}, {name}: {statistics.median(found):.0f} images/s, ratio {ratio:.2f}", flush=True)


def rounds(seconds: float, ways: dict[str, Callable[[float], float]]) -> dict[str, Callable[[], float]]:
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
