"""The same noise under every guidance: a row of samples each, with distance and recall.

    gen demo
    gen train demo-teacher --tokenizer runs/demo/tokenizer --data runs/demo/latents --steps 500 --outdir runs/weak
    python -m benchmarks.guidance_figure runs/demo/teacher --guide runs/weak --out docs/guidance.png

Takes a run of the embedded digits that knows their classes; solver, grid and steps are its own. Scores are of --count
samples against the training images, in the digits classifier's features. Nothing is tuned: the scales
show what each guidance does, not how good it can be. Autoguidance has the same network after a ninth of the steps.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

import gen
from benchmarks.pictures import SHOWN, rows_of_images
from gen.data.sources import digits
from gen.experiments.demo import score_images
from gen.features.digits import DigitsExtractor
from gen.metrics.reference import make_reference
from gen.metrics.sources import from_arrays
from gen.sampling.guidance import AdaptiveProjected, Autoguidance, ClassifierFree, Interval, ZeroStar
from gen.training.program import enable_compile_cache

GUIDANCE: dict[str, Any] = {
    "none": ClassifierFree(),
    "cfg 1.5": ClassifierFree(1.5),
    "cfg 4": ClassifierFree(4.0),
    "cfg 4, rescale 0.7": ClassifierFree(4.0, rescale=0.7),
    "cfg 4 for 0.1 <= t < 0.6": Interval(ClassifierFree(4.0), 0.1, 0.6),
    "apg 4, eta 0": AdaptiveProjected(4.0, eta=0.0),
    "cfg-zero-star 4": ZeroStar(4.0),
    "autoguidance 1.5": Autoguidance(1.5),
    "autoguidance 4": Autoguidance(4.0),
}


def main(arguments: list[str] | None = None) -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--guide", type=Path, required=True, help="a weaker model of the same images")
    parser.add_argument("--out", type=Path, default=Path("guidance.png"))
    parser.add_argument("--count", type=int, default=1797, help="samples (1797)")
    options = parser.parse_args(arguments)
    enable_compile_cache()
    run, weak = gen.load(options.run), gen.load(options.guide)
    real, extractor = digits("train").arrays, DigitsExtractor()
    run = dataclasses.replace(run, params={**run.params, "guide": weak.params["net"]})
    reference = make_reference("digits", from_arrays(real["image"], real["label"]), extractor, split="train")
    seeds, rows = range(options.count), {}
    for name, guidance in GUIDANCE.items():
        guide = weak.denoiser if isinstance(guidance, Autoguidance) else None
        guided = run.with_sampler(dataclasses.replace(run.config.sampler, guidance=guidance, guide=guide))
        images = guided.sample(seeds, batch=1024)
        values = score_images(images, np.asarray(seeds) % 10, reference, extractor, seeds).values
        told = (f"{measure} {values[measure]:8.3f}" for measure in ("frechet_distance", "recall", "accuracy"))
        print(f"{name:<26}" + "   ".join(told), flush=True)
        rows[f"{name}\ndistance {values['frechet_distance']:.2f}, recall {values['recall']:.2f}"] = images[:SHOWN]
    rows_of_images(rows, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
