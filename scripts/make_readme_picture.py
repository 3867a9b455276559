"""Makes docs/demo.png from a finished demo:  python scripts/make_readme_picture.py runs/demo"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import gen
from gen.data.sources import digits


def main(demo: Path) -> None:
    """Three rows: real held-out digits 0..9 twice, the teacher, the student from the same noise."""
    heldout = digits("test").arrays
    real = [np.flatnonzero(heldout["label"] == i % 10)[i // 10] for i in range(20)]
    teacher = gen.load(demo / "teacher")
    rows = {
        "held-out images": heldout["image"][real],
        f"teacher, {teacher.generator.nfe} calls": teacher.sample(range(20)),
        "student, 1 call": gen.load(demo / "student").sample(range(20)),
    }
    figure, axes = plt.subplots(len(rows), 20, figsize=(12, 2.0), gridspec_kw={"wspace": 0.06, "hspace": 0.08})
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            picture = Image.fromarray(image[..., 0]).resize((48, 48), Image.Resampling.LANCZOS)
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
            axis.axis("off")
        line[0].text(-10, 24, name, ha="right", va="center", fontsize=10)
    figure.savefig("docs/demo.png", dpi=110, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
