"""PyTorch's DataLoader over a zip of JPEG files; `loader.py` runs this file and talks to it.

    python torch_loader.py ZIP CROP BATCH WORKERS

CROP is the side of ADM's centre crop, 0 for none. Each line on stdin, a number of seconds, is answered by images per
second, and images per second of CPU time (its own and the workers'), over about that time. Decodes with Pillow, flips
half of the images, collates uint8 (B, H, W, 3). Needs torch.
"""

import io
import os
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gen.data.transforms import adm_center_crop


class Photographs(torch.utils.data.Dataset):
    """The images of a zip, opened once in each worker."""

    def __init__(self, path: str, crop: int) -> None:
        self.path, self.crop = path, crop
        with zipfile.ZipFile(path) as archive:
            self.names = [name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg"))]
        self.archive: zipfile.ZipFile | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.archive = self.archive or zipfile.ZipFile(self.path)
        image = Image.open(io.BytesIO(self.archive.read(self.names[index]))).convert("RGB")
        if self.crop:
            image = adm_center_crop(image, self.crop)
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image))


def cpu_seconds() -> float:
    """CPU time of this process and of its children that live."""
    children = Path("/proc/self/task").glob("*/children")
    pids = ["self", *(pid for file in children for pid in file.read_text().split())]
    ticks = sum(sum(map(int, Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split()[11:13])) for p in pids)
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Answers until stdin ends."""
    path, crop, batch, workers = sys.argv[1], *map(int, sys.argv[2:5])
    loader = torch.utils.data.DataLoader(
        Photographs(path, crop), batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True
    )

    def endless():
        while True:
            yield from loader

    stream = endless()
    for line in sys.stdin:
        for _ in range(2 * workers + 2):  # what the workers had prepared before the clock starts
            next(stream)
        began, used, images = time.monotonic(), cpu_seconds(), 0
        while time.monotonic() - began < float(line):
            images += len(next(stream))
        print(images / (time.monotonic() - began), images / (cpu_seconds() - used), flush=True)


if __name__ == "__main__":
    main()
