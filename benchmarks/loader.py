"""Images per second of the loader and of the conversion, on generated JPEG files.

    python benchmarks/loader.py --seconds 10

Beside each figure stands the plain way, in the same run: one thread that opens, crops and stacks with Pillow; and,
where torch is installed, its DataLoader with the same transforms.
"""

import argparse
import io
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from gen.data.convert import Encode, convert
from gen.data.images import Images
from gen.data.stores import open_store
from gen.data.transforms import adm_center_crop

SIZE, BATCH = 256, 64


def photographs(path: Path, count: int) -> None:
    """A zip of JPEG files of 400 x 340 pixels with the structure of photographs (smooth noise)."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (34, 40, 3), np.uint8))
            out = io.BytesIO()
            coarse.resize((400, 340), Image.Resampling.BICUBIC).save(out, "JPEG", quality=92)
            archive.writestr(f"{i:05d}.jpg", out.getvalue())


def rate(steps: Iterator[int], seconds: float) -> float:
    """Images per second of a stream of batch sizes, after one batch of warming up."""
    next(steps)
    began, images = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        images += next(steps)
    return images / (time.monotonic() - began)


def ours(path: Path) -> Iterator[int]:
    """The training pipeline."""
    data = Images(str(path), size=SIZE, crop="adm", flip=True, labels="none")
    for batch in data.batches(batch=BATCH, seed=0, start=0):
        yield len(batch["image"])


def pillow(path: Path) -> Iterator[int]:
    """One thread, no pipeline."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        while True:
            made = []
            for name in rng.choice(names, BATCH):
                image = np.asarray(adm_center_crop(Image.open(io.BytesIO(archive.read(name))).convert("RGB"), SIZE))
                made.append(image[:, ::-1] if rng.random() < 0.5 else image)
            yield len(np.stack(made))


def torch_loader(path: Path) -> Iterator[int]:
    """torch's DataLoader with one worker per processor."""
    import torch

    class Set(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.names = zipfile.ZipFile(path).namelist()
            self.archive = None

        def __len__(self) -> int:
            return len(self.names)

        def __getitem__(self, index: int) -> np.ndarray:
            self.archive = self.archive or zipfile.ZipFile(path)
            data = io.BytesIO(self.archive.read(self.names[index]))
            image = np.asarray(adm_center_crop(Image.open(data).convert("RGB"), SIZE))
            return np.ascontiguousarray(image[:, ::-1]) if torch.rand(()) < 0.5 else image

    loader = torch.utils.data.DataLoader(Set(), BATCH, shuffle=True, num_workers=os.cpu_count() or 1, drop_last=True)
    while True:
        for batch in loader:
            yield len(batch)


def conversion(path: Path, out: Path) -> float:
    """Images per second of `gen data convert`."""
    store = open_store(path)
    began = time.monotonic()
    convert(store, out, Encode(SIZE, "adm"))
    return len(store) / (time.monotonic() - began)


def plain_conversion(path: Path, out: Path) -> float:
    """Images per second of one thread of Pillow, writing the same zip."""
    began = time.monotonic()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(out, "w") as made:
        names = archive.namelist()
        for i, name in enumerate(names):
            image = adm_center_crop(Image.open(io.BytesIO(archive.read(name))).convert("RGB"), SIZE)
            file = io.BytesIO()
            image.save(file, "PNG", compress_level=0)
            made.writestr(f"{i // 1000:05d}/img{i:08d}.png", file.getvalue())
    return len(names) / (time.monotonic() - began)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--images", type=int, default=512)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photographs.zip"
        photographs(path, args.images)
        streams: dict[str, Callable[[Path], Iterator[int]]] = {"gen": ours, "Pillow, one thread": pillow}
        try:
            import torch  # noqa: F401

            streams["torch DataLoader"] = torch_loader
        except ImportError:
            print("torch is not installed: no DataLoader to compare with")
        print(f"{os.cpu_count()} processors, JPEG 400 x 340 to {SIZE} px, images/s")
        for name, stream in streams.items():
            print(f"  load, {name}: {rate(stream(path), args.seconds):.0f}", flush=True)
        print(f"  convert, gen: {conversion(path, Path(folder) / 'a.zip'):.0f}")
        print(f"  convert, Pillow, one thread: {plain_conversion(path, Path(folder) / 'b.zip'):.0f}")


if __name__ == "__main__":
    main()
