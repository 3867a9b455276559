"""Small data sets in every layout the stores read."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, height: int = 12, width: int = 16) -> np.ndarray:
    """(H, W, 3) uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(pixels: np.ndarray, **options: object) -> bytes:
    """A PNG file's bytes."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", **options)
    return out.getvalue()


def folder(path: Path, count: int = 6, classes: int = 2) -> Path:
    """Class folders c0, c1 ...; image i in folder i mod classes."""
    for i in range(count):
        place = path / f"c{i % classes}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:03d}.png").write_bytes(png(picture(i)))
    return path


def edm_zip(path: Path, labels: object, count: int = 6) -> Path:
    """An EDM zip with the given labels in dataset.json (None: no file)."""
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            archive.writestr(f"00000/img{i:08d}.png", png(picture(i)))
        if labels is not None:
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar of the given members."""
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path
