"""Steps of the comparison of tokenizers: what a CPU-second trains here, codes as latents, the real images."""

import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from gen.features.efficientnet_lite import EfficientNetLite
from gen.files import read_json, write_json
from gen.metrics.reference import Reference, make_reference
from gen.metrics.sources import ImageSet
from gen.runs import Loaded
from gen.steps import Encode
from gen.tokenizers.code_vectors import CodeVectors
from gen.training.engine import Hook, train

__all__ = ["Calibrate", "Codes", "EncodeCodes", "Real"]


@dataclasses.dataclass(frozen=True)
class Real:
    """The step that computes the held-out images' statistics, once for all tokenizers.

    Attributes:
      images: the images.
      name: of the step.
      about: what it is for.
    """

    images: ImageSet
    name: str = "real"
    about: str = "statistics of the held-out images"
    takes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def settings(self, given: Mapping[str, Any]) -> Any:
        """The images' identity."""
        del given
        return {"images": self.images.identity, "features": EfficientNetLite().fingerprint()}

    def run(self, given: Mapping[str, Any], out: Path) -> None:
        """Computes the statistics and keeps them."""
        del given
        found = make_reference("held-out images", self.images, EfficientNetLite(), split="held-out", batch=64)
        if jax.process_index() == 0:
            out.mkdir(parents=True, exist_ok=True)
            found.save(out / "reference.npz")

    def open(self, out: Path) -> Reference:
        """The statistics."""
        return Reference.load(out / "reference.npz")


@dataclasses.dataclass(frozen=True)
class Calibrate:
    """The step that measures how many images a tokenizer trains on in a second of CPU time here, and keeps the answer.

    CPU time is that of all threads of this process (`time.process_time`). Other work on the machine hardly changes it,
    where it would halve the number of images in a minute by the clock.

    Attributes:
      name: of the step.
      recipe: of a run of that many steps; all but its first third are timed.
      about: what it is for.
    """

    name: str
    recipe: Any
    about: str = "how much CPU time a step takes on this machine"
    takes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def settings(self, given: Mapping[str, Any]) -> Any:
        """Nothing decides but the machine."""
        del given
        return {}

    def run(self, given: Mapping[str, Any], out: Path) -> None:
        """Trains a little, in a folder of its own; an interrupted measurement begins again."""
        del given
        shutil.rmtree(out / "run", ignore_errors=True)
        recipe, marks = self.recipe(), []
        (stage,) = recipe.config.stages

        def mark(name: str, step: int, state: Any, frozen: Any) -> None:
            del name, frozen
            jax.block_until_ready(state)
            marks.append((step, time.process_time()))

        watch = Hook(max(1, stage.steps // 3), mark)
        train(recipe.config, out / "run", frozen=recipe.frozen, artifacts=recipe.artifacts, hooks=(watch,))
        (first, began), (last, ended) = marks[0], marks[-1]
        if jax.process_index() == 0:
            write_json(out / "pace.json", {"images_per_cpu_second": (last - first) * stage.batch / (ended - began)})

    def open(self, out: Path) -> float:
        """Images per CPU-second."""
        return float(read_json(out / "pace.json")["images_per_cpu_second"])


@dataclasses.dataclass(frozen=True)
class Codes:
    """A run whose discrete tokenizer is seen through its code vectors."""

    run: Loaded

    @property
    def tokenizer(self) -> Any:
        """Continuous."""
        own = self.run.tokenizer
        return own if own.spec.kind == "continuous" else CodeVectors(own)

    @property
    def params(self) -> Mapping[str, Any]:
        """The tokenizer's."""
        return self.run.params


@dataclasses.dataclass(frozen=True)
class EncodeCodes(Encode):
    """`Encode` to latents, or to the code vectors of a discrete tokenizer."""

    def run(self, given: Mapping[str, Any], out: Path) -> None:
        """See `gen.plan.Step`."""
        super().run({"tokenizer": Codes(given["tokenizer"])}, out)
