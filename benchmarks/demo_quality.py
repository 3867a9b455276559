"""Holds finished demo folders to the demo's quality targets.

    gen demo --outdir runs/demo0 --seed 0        (and so on for other seeds)
    python benchmarks/demo_quality.py runs/demo0 runs/demo1 runs/demo2

Beyond the scores each demo stores, a support vector classifier trained on the training pixels (scikit-learn) reads
one-step samples: it should be right about as often as on held-out images. Exits with 1 when a target is missed.
"""

import json
import sys
from pathlib import Path

import numpy as np
from sklearn.svm import SVC

import gen
from gen.data.sources import digits
from gen.experiments.demo import CONTROL, STUDENT, TEACHER_NAME
from gen.metrics.image import psnr
from gen.metrics.memorisation import memorisation


def classifier_accuracy(images: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(accuracy on the samples, on the held-out images) of an SVC trained on the training pixels, 0..16 scale."""

    def pixels(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1) * (16 / 255)

    train, heldout = digits("train").arrays, digits("test").arrays
    machine = SVC(gamma=0.001, C=10.0).fit(pixels(train["image"]), train["label"])
    return machine.score(pixels(images), labels), machine.score(pixels(heldout["image"]), heldout["label"])


def measure(folder: Path) -> dict[str, float]:
    """The figures of one demo."""
    files = json.loads((folder / "scores" / "subjects.json").read_text())
    scores = {name: json.loads((folder / "scores" / file).read_text())["values"] for name, file in files.items()}
    teacher, student, control = (scores[name] for name in (TEACHER_NAME, STUDENT, CONTROL))
    tokenizer, one_step = gen.load(folder / "tokenizer"), gen.load(folder / "student")
    heldout = digits("test").arrays["image"]
    samples = one_step.sample(range(1797), batch=1024)
    read, expected = classifier_accuracy(samples, np.arange(1797) % 10)
    copies = memorisation(samples, digits("train").arrays["image"], heldout).share
    return {
        "psnr": float(psnr(tokenizer.decode(tokenizer.encode(heldout)), heldout).mean()),
        "teacher": teacher["frechet_distance"],
        "teacher_over_gaussian": teacher["frechet_distance"] / scores["Gaussian of each class"]["frechet_distance"],
        "teacher_recall": teacher["recall"],
        "student_over_teacher": student["frechet_distance"] / teacher["frechet_distance"],
        "student_recall_loss": teacher["recall"] - student["recall"],
        "control_over_student": control["frechet_distance"] / student["frechet_distance"],
        "near_copies": copies,
        "svc_loss": expected - read,
        "minutes": sum(step["seconds"] for step in json.loads((folder / "plan.json").read_text()).values()) / 60,
    }


# figure -> (limit, whether the figure must be at least the limit), for the mean over seeds
TARGETS = {
    "psnr": (26.0, True),
    "teacher_over_gaussian": (0.2, False),
    "teacher_recall": (0.7, True),
    "student_over_teacher": (1.25, False),
    "student_recall_loss": (0.1, False),
    "control_over_student": (10.0, True),
    "near_copies": (0.02, False),
    "svc_loss": (0.01, False),
}


def main(folders: list[str]) -> int:
    """Prints the figures of every folder and their mean against the targets; 1 when one is missed."""
    rows = [measure(Path(folder)) for folder in folders]
    missed = []
    print(f"{'':<24}" + "".join(f"{Path(f).name:>12}" for f in folders) + f"{'mean':>12}{'target':>12}")
    for name in rows[0]:
        values = [row[name] for row in rows]
        mean = float(np.mean(values))
        target = ""
        if name in TARGETS:
            limit, least = TARGETS[name]
            target = f"{'>=' if least else '<='} {limit:g}"
            if (mean < limit) if least else (mean > limit):
                missed.append(name)
        if name == "student_over_teacher" and max(values) > 1.4:
            missed.append("student_over_teacher of one seed (1.4)")
        print(f"{name:<24}" + "".join(f"{v:>12.4f}" for v in values) + f"{mean:>12.4f}{target:>12}")
    print("missed: " + ", ".join(missed) if missed else "all targets met")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
