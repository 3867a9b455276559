"""Image-generation research in one JAX codebase; the names below are what ten lines of Python need.

Importing this package imports nothing heavy: each name is fetched from its module when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gen.config import from_json, to_json
    from gen.diffusion.backbones.dit import DiTConfig
    from gen.diffusion.ddpm import DDPM
    from gen.diffusion.denoiser import Denoiser, EDMPrecondition, Predict
    from gen.diffusion.process import EDM, VE, VP, Linear, Trigonometric
    from gen.errors import GenError
    from gen.runs import Loaded, load
    from gen.sampling.generator import DiffusionGenerator, OneStepGenerator, Sampler
    from gen.sampling.grids import Karras, Uniform
    from gen.sampling.guidance import ClassifierFree
    from gen.sampling.solvers import Euler, Heun
    from gen.training.engine import train
    from gen.training.indexed import sample_keys
    from gen.training.run import EngineConfig, RunConfig
    from gen.training.task import Stage, State

_NAMES = {
    "gen.config": ("from_json", "to_json"),
    "gen.diffusion.backbones.dit": ("DiTConfig",),
    "gen.diffusion.ddpm": ("DDPM",),
    "gen.diffusion.denoiser": ("Denoiser", "EDMPrecondition", "Predict"),
    "gen.diffusion.process": ("EDM", "Linear", "Trigonometric", "VE", "VP"),
    "gen.errors": ("GenError",),
    "gen.runs": ("Loaded", "load"),
    "gen.sampling.generator": ("DiffusionGenerator", "OneStepGenerator", "Sampler"),
    "gen.sampling.grids": ("Karras", "Uniform"),
    "gen.sampling.guidance": ("ClassifierFree",),
    "gen.sampling.solvers": ("Euler", "Heun"),
    "gen.training.engine": ("train",),
    "gen.training.indexed": ("sample_keys",),
    "gen.training.run": ("EngineConfig", "RunConfig"),
    "gen.training.task": ("Stage", "State"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "DDPM",
    "EDM",
    "VE",
    "VP",
    "ClassifierFree",
    "Denoiser",
    "DiTConfig",
    "DiffusionGenerator",
    "EDMPrecondition",
    "EngineConfig",
    "Euler",
    "GenError",
    "Heun",
    "Karras",
    "Linear",
    "Loaded",
    "OneStepGenerator",
    "Predict",
    "RunConfig",
    "Sampler",
    "Stage",
    "State",
    "Trigonometric",
    "Uniform",
    "from_json",
    "load",
    "sample_keys",
    "to_json",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("gen-image")
    if name not in _HOME:
        raise AttributeError(f"module 'gen' has no attribute '{name}'")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
