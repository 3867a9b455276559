"""Seeds as people write them: ``0-63,70,80-89``."""

from collections.abc import Sequence

from gen.errors import GenError

__all__ = ["parse_range", "parse_seeds", "spell"]


def parse_range(text: str, what: str = "seeds") -> range:
    """Gives ``"0-63"`` (both ends included) or ``"7"`` as a range. Raises GenError that names `what` for anything
    else.
    """
    first, dash, last = text.strip().partition("-")
    if first.isdecimal() and (last.isdecimal() if dash else True):
        numbers = range(int(first), int(last or first) + 1)
        if len(numbers) and numbers.stop <= 2**31:
            return numbers
    raise GenError(f"{what} '{text}' are not a range; write FIRST-LAST such as 0-63, or one number")


def parse_seeds(text: str) -> list[int]:
    """Ranges and single numbers separated by commas, in this order. Raises GenError for anything else, or a repeat."""
    seeds = [seed for part in text.split(",") for seed in parse_range(part)]
    if len(set(seeds)) < len(seeds):
        raise GenError(f"seeds '{text}' name one seed twice; name each once, for its image depends on the seed alone")
    return seeds


def spell(seeds: Sequence[int]) -> str:
    """Gives the text that `parse_seeds` reads."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in parts)
