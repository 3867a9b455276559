"""Which records a teacher makes for students that regress on what it made."""

from typing import Any

from gen.autoregressive.generator import TokenGenerator
from gen.distill.noise_decoder import FlowedTokens
from gen.sampling.records import Make, Solved

__all__ = ["make_of"]


def make_of(generator: Any) -> Make:
    """Gives what is stored of a teacher's generator: noise with the solver's sample, or with the tokens it decides.

    Raises GenError for a teacher that neither a solver samples nor writes token by token.
    """
    return FlowedTokens(generator) if isinstance(generator, TokenGenerator) else Solved(generator)
