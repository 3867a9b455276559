"""What the first tokens of an image give back: scores and pictures of a tokenizer that decodes any number of them."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from gen.config import to_json
from gen.errors import GenError
from gen.files import atomic, write_json
from gen.metrics.report import Report, mosaic
from gen.tokenizers.base import TokenizerSpec
from gen.tokenizers.reconstruct import Reconstructed

__all__ = ["KeepCurve", "keep_curve", "keep_numbers"]

_DRAWN = ("psnr", "ssim_original", "frechet_distance")  # scores that the page draws; the table has all
_SHOWN = 12  # images of the grid


def keep_numbers(spec: TokenizerSpec) -> tuple[int, ...]:
    """Gives the powers of two below the number of tokens, and that number.

    Raises GenError for a tokenizer that always decodes all of its tokens.
    """
    if "keep" not in spec.conditions:
        raise GenError("this tokenizer decodes all of its tokens or none; a curve over their number is FlexTok's")
    (tokens,) = spec.shape
    return (*(2**i for i in range((tokens - 1).bit_length())), tokens)


@dataclasses.dataclass(frozen=True)
class KeepCurve:
    """Reconstructions of the same images by the number of tokens that were used, in rising order."""

    found: Mapping[int, Reconstructed]

    @property
    def grid(self) -> np.ndarray:
        """(rows, images, H, W, C) uint8: the originals, then a row for each number of tokens."""
        parts = list(self.found.values())
        return np.stack([part[:_SHOWN] for part in (parts[0].before, *(p.after for p in parts))])

    def page(self, title: str) -> Report:
        """Gives the curves, the grid and the table of all scores."""
        page = Report(title, "Reconstructions from the first tokens alone, by their number.")
        results = {number: part.result for number, part in self.found.items()}
        known = next(iter(results.values())).values
        for name in (name for name in _DRAWN if name in known):
            line = ([float(number) for number in results], [result.values[name] for result in results.values()])
            page.curves({name: line}, x="tokens", y=name.replace("_", " "), log_x=True)
        labels = ["original", *(_called(number) for number in results)]
        page.pictures(dict(zip(labels, self.grid, strict=True)), columns=_SHOWN)
        return page.results({_called(number): result for number, result in results.items()})

    def write(self, path: Path, title: str) -> None:
        """Writes ``path``.json, .png and .html: scores by number of tokens, the grid, the page."""
        write_json(path.with_suffix(".json"), {str(n): to_json(part.result) for n, part in self.found.items()})
        picture = mosaic(self.grid.reshape(-1, *self.grid.shape[2:]), columns=self.grid.shape[1])
        atomic(path.with_suffix(".png"), lambda file: picture.save(file, "png"))
        self.page(title).write(path.with_suffix(".html"))


def keep_curve(score: Callable[[int], Reconstructed], numbers: tuple[int, ...]) -> KeepCurve:
    """Gives the curve over `numbers` of tokens.

    Args:
      score: number of tokens -> reconstructions of all images from as many. The number is an array of the condition, so
        that one compiled program serves all.
    """
    return KeepCurve({number: score(number) for number in numbers})


def _called(number: int) -> str:
    return f"{number} token{'' if number == 1 else 's'}"
