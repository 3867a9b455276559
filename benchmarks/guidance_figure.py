"""The same noise under every guidance: a row of samples each, with distance and recall.

    gen demo
    python -m benchmarks.guidance_figure runs/demo/teacher --out docs/guidance.png

Takes a run of the embedded digits that knows their classes; solver, grid and steps are its own. Scores are of --count
samples against the training images, in the digits classifier's features; they are also written as JSON beside the
picture. Nothing is tuned: the scales show what each guidance does, not how good it can be.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

import gen
from gen.data.sources import digits
from gen.experiments.demo import score_images
from gen.features.digits import DigitsExtractor
from gen.metrics.reference import make_reference
from gen.metrics.sources import from_arrays
from gen.sampling.guidance import AdaptiveProjected, ClassifierFree, Interval, ZeroStar
from gen.training.program import enable_compile_cache

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GUIDANCE: dict[str, Any] = {
    "none": ClassifierFree(),
    "cfg 1.5": ClassifierFree(1.5),
    "cfg 4": ClassifierFree(4.0),
    "cfg 4, rescale 0.7": ClassifierFree(4.0, rescale=0.7),
    "cfg 4 for 0.1 <= t < 0.6": Interval(ClassifierFree(4.0), 0.1, 0.6),
    "apg 4, eta 0": AdaptiveProjected(4.0, eta=0.0),
    "cfg-zero-star 4": ZeroStar(4.0),
}
SHOWN = 30


def main(arguments: list[str] | None = None) -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("guidance.png"))
    parser.add_argument("--count", type=int, default=1797, help="samples (1797)")
    options = parser.parse_args(arguments)
    enable_compile_cache()
    run, real, extractor = gen.load(options.run), digits("train").arrays, DigitsExtractor()
    reference = make_reference("digits", from_arrays(real["image"], real["label"]), extractor, split="train")
    figure, rows = plt.subplots(len(GUIDANCE), 1, figsize=(9, 0.52 * len(GUIDANCE)), layout="constrained")
    seeds, found = range(options.count), {}
    for row, (name, guidance) in zip(rows, GUIDANCE.items(), strict=True):
        guided = run.with_sampler(dataclasses.replace(run.config.sampler, guidance=guidance))
        images = guided.sample(seeds, batch=1024)
        values = score_images(images, np.asarray(seeds) % 10, reference, extractor, seeds).values
        found[name] = {measure: values[measure] for measure in ("frechet_distance", "recall", "accuracy")}
        print(
            f"{name:<26}" + "".join(f"{measure} {value:8.3f}   " for measure, value in found[name].items()), flush=True
        )
        row.imshow(np.concatenate(list(images[:SHOWN, ..., 0]), axis=1), cmap="gray", vmin=0, vmax=255)
        row.set(xticks=[], yticks=[])
        row.spines[:].set_visible(False)
        about = f"{name}\ndistance {values['frechet_distance']:.2f}, recall {values['recall']:.2f}"
        row.set_ylabel(about, rotation=0, ha="right", va="center", fontsize=7)
    figure.savefig(options.out, dpi=130)
    options.out.with_suffix(".json").write_text(json.dumps(found, indent=1))
    print(f"wrote {options.out} and {options.out.with_suffix('.json')}")


if __name__ == "__main__":
    main()
