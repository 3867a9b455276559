"""SiT: the network of DiT on interpolant paths (Ma et al. 2024, "SiT").

The network is `DiT`; what is SiT's own is the clock (0 = noise, 1 = data, not scaled) and the meaning of the output.
With learned variance the official network computes twice the channels and returns the first half.
"""

from typing import Any, Literal

from gen.config import suggest
from gen.diffusion.backbones.dit import DiTConfig, dit
from gen.diffusion.denoiser import Predict
from gen.diffusion.prediction import PredictionKind
from gen.errors import GenError

__all__ = ["parameterization", "sit"]

_OUTPUTS: dict[str, tuple[PredictionKind, int]] = {
    "velocity": ("velocity", -1),
    "noise": ("eps", 1),
    "score": ("score", 1),
}


def sit(name: str, *, learned_variance: bool = False, **changes: Any) -> DiTConfig:
    """Gives a published size by name, "S/2" to "XL/8", for 32 x 32 x 4 latents and 1000 classes.

    Args:
      learned_variance: the released XL/2 file carries the unused half of the output channels.
    Raises GenError for an unknown name.
    """
    return dit(name, learned_variance=learned_variance, **changes)


def parameterization(network: DiTConfig, prediction: Literal["velocity", "noise", "score"] = "velocity") -> Predict:
    """Says what the output of an official SiT network means on our clock. Raises GenError for another prediction."""
    if prediction not in _OUTPUTS:
        raise GenError(f"unknown prediction '{prediction}'; {suggest(prediction, _OUTPUTS)}")
    output, sign = _OUTPUTS[prediction]
    return Predict(output, clock="reversed", sign=sign, learned_variance=network.learned_variance)
