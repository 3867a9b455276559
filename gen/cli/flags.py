"""What the flags of several commands share: how their help is written, and the flags of commands that sample a run."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

__all__ = ["USUAL", "Sampling", "SamplingFlags", "Switch", "flag"]


def flag(metavar: str | None = None, *, name: str | None = None) -> Any:
    """Gives the annotation of a flag, or of a positional argument.

    Args:
      metavar: what its value is, in capitals.
      name: how it is typed, where that is not the parameter's own name; "" for a group, whose flags stand alone.

    The help of a flag says in words what happens without it; only defaults that are values are shown beside.
    """
    return tyro.conf.arg(metavar=metavar, name=name, help_behavior_hint=_hint)


def _hint(default: str) -> str:
    return "" if default in ("None", "", "''", "False") else f"(default: {default})"


Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff, flag()]  # a flag without a value, off where it is not given


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the images of a run are made.

    Attributes:
      steps: number of solver steps.
      solver: one of gen list solver, or dopri5, which chooses its steps itself.
      grid: the solver's times: gen list grid, or FILE of gen search.
      guidance: guidance scale; 1 is none.
      guide: autoguidance by a weaker run of the same images; of distilled decoding the teacher, writing in between.
      weights: ema, the averaged weights, or raw.
      cond: conditions such as text=features.npy: an array for all images or a row for each; a mask as text_mask=FILE.
    """

    steps: Annotated[int | None, flag("N")] = None
    solver: Annotated[str | None, flag("KIND")] = None
    grid: Annotated[str | None, flag("KIND")] = None
    guidance: Annotated[float | None, flag("W", name="cfg-scale")] = None
    guide: Annotated[Path | None, flag("RUN")] = None
    weights: Literal["ema", "raw"] = "ema"
    cond: Annotated[tuple[str, ...], flag("NAME=FILE.npy")] = ()

    def arrays(self) -> dict[str, Any]:
        """Reads the arrays of --cond by name. Raises GenError for text of another form and for files that are none."""
        import numpy as np

        from gen.errors import GenError

        arrays = {}
        for text in self.cond:
            name, equals, file = text.partition("=")
            if not equals:
                raise GenError(f"--cond '{text}' is not like text=features.npy")
            try:
                arrays[name] = np.load(file, allow_pickle=False)
            except (OSError, ValueError) as error:
                raise GenError(
                    f"--cond {name}: {file} cannot be read as an array ({error}); give an .npy file"
                ) from None
        return arrays


USUAL = Sampling()
SamplingFlags = Annotated[Sampling, flag(name="")]  # its fields are flags of the command
