"""Frechet distance ratios over several feature spaces (Yang et al. 2026, arXiv 2604.28190: FDr-6).

The ratio of a space is the distance of the samples over the distance of held-out real images, both from the statistics
of the training images: 1 is as near as real images come, whatever the space's units. A model whose training saw one
space is told by the others.
"""

import dataclasses
import math
from collections.abc import Mapping

from gen.config import suggest
from gen.errors import GenError
from gen.metrics.protocol import Protocol, Result, differences

__all__ = ["RATIOS", "FeatureSpace", "combined", "frechet_ratios", "ratios_of", "space_of"]

DISTANCE = "frechet_distance"
_OF_A_SPACE = ("extractor", "extractor_fingerprint", "resize", "precision", "reference", "reference_fingerprint")
_NEEDLESS = ("neighbours", "neighbour_rule", "neighbour_limit", "score_splits", "beside")


@dataclasses.dataclass(frozen=True)
class FeatureSpace:
    """A feature space of a protocol of ratios.

    Attributes:
      extractor: what the scores' protocol calls its feature network, or its beginning.
      heldout: the distance of held-out real images from the training images there.
    """

    extractor: str
    heldout: float


# the validation images of ImageNet-256 against its training images, constants of the official code (two decimals, so
# that MAE's alone is known to within 12 per cent)
RATIOS: dict[str, dict[str, FeatureSpace]] = {
    "fdr6": {
        "inception": FeatureSpace("inception", 1.68),
        "convnext": FeatureSpace("convnext", 56.87),
        "dinov2": FeatureSpace("dinov2", 14.19),
        "mae": FeatureSpace("mae", 0.04),
        "siglip": FeatureSpace("siglip", 0.60),
        "clip": FeatureSpace("clip", 5.60),
    }
}


def frechet_ratios(distances: Mapping[str, float], heldout: Mapping[str, float]) -> dict[str, float]:
    """Gives distance over held-out distance by space, for the spaces that have both.

    Raises GenError for a held-out distance that is not positive.
    """
    for space, value in heldout.items():
        if not value > 0.0:
            raise GenError(f"held-out images are {value} from the reference in {space}; expected a positive distance")
    return {space: distance / heldout[space] for space, distance in distances.items() if space in heldout}


def combined(ratios: Mapping[str, float], members: tuple[str, ...]) -> float:
    """Gives the mean of the members' ratios. Raises GenError where one is missing."""
    missing = [space for space in members if space not in ratios]
    if missing:
        raise GenError(f"no ratio in {', '.join(missing)}, of {len(members)} spaces; score the samples there as well")
    return math.fsum(ratios[space] for space in members) / len(members)


def space_of(protocol: Protocol, spaces: Mapping[str, FeatureSpace]) -> str:
    """Gives the space that scores under this protocol are of. Raises GenError where it is none of them."""
    found = [name for name, space in spaces.items() if protocol.extractor.startswith(space.extractor)]
    if len(found) != 1:
        known = suggest(protocol.extractor, [space.extractor for space in spaces.values()])
        raise GenError(f"a score in the features of {protocol.extractor} is of no space of this protocol; {known}")
    return found[0]


def ratios_of(
    scores: Mapping[str, Result], heldout: Mapping[str, Result] | None = None, protocol: str = "fdr6"
) -> dict[str, float]:
    """Gives the ratio of each space, and ``mean``.

    Args:
      scores: of the same samples, by file or name, one in each space.
      heldout: of held-out real images, under the same protocols; None takes the constants of `protocol`.
      protocol: one of `RATIOS`; its spaces must all be there.

    Raises GenError for two scores of one space, a space that is missing, a score without the distance, and for scores
    that do not share the samples' number, labels and rounding.
    """
    if protocol not in RATIOS:
        raise GenError(f"unknown protocol of ratios '{protocol}'; {suggest(protocol, RATIOS)}")
    _check(scores)
    if heldout is None:
        spaces = RATIOS[protocol]
        names = _by_space({name: space_of(result.protocol, spaces) for name, result in scores.items()})
        members, real = tuple(spaces), {name: space.heldout for name, space in spaces.items()}
    else:
        _check(heldout)
        names = _by_space({name: result.protocol.extractor for name, result in scores.items()})
        other = _by_space({name: result.protocol.extractor for name, result in heldout.items()})
        members, real = tuple(names), {space: heldout[name].values[DISTANCE] for space, name in other.items()}
        for space in set(names) & set(other):
            differing = differences(scores[names[space]].protocol, heldout[other[space]].protocol)
            wrong = {field for field in differing if field in _OF_A_SPACE}
            if wrong:
                raise GenError(
                    f"{names[space]} and {other[space]} differ in {', '.join(sorted(wrong))}; score both alike"
                )
    ratios = frechet_ratios({space: scores[name].values[DISTANCE] for space, name in names.items()}, real)
    return {**ratios, "mean": combined(ratios, members)}


def _by_space(spaces: Mapping[str, str]) -> dict[str, str]:
    """space -> name of its score."""
    found: dict[str, str] = {}
    for name, space in spaces.items():
        if space in found:
            raise GenError(f"{found[space]} and {name} are both scores in {space}; give one of each space")
        found[space] = name
    return found


def _check(results: Mapping[str, Result]) -> None:
    """Raises GenError unless the results are distances of one set of samples."""
    if not results:
        raise GenError("no scores to make ratios of; give one score file for each feature space")
    names = list(results)
    for name, result in results.items():
        if DISTANCE not in result.values:
            raise GenError(f"{name} holds no {DISTANCE}; score the samples against a reference")
        differing = differences(results[names[0]].protocol, result.protocol)
        wrong = [field for field in differing if field not in (*_OF_A_SPACE, *_NEEDLESS)]
        if wrong:
            first, second = differing[wrong[0]]
            raise GenError(f"{names[0]} and {name} differ in {wrong[0]} ({first!r} and {second!r}); score both alike")
