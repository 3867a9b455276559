"""The ``scheduler`` of a diffusers pipeline: what it says of chain, prediction and sampler, obeyed or refused by name.

Defaults are those of the library's classes, for settings that a ``scheduler_config.json`` leaves out.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from gen.diffusion.ddpm import DDPM
from gen.errors import GenError
from gen.files import read_json, write_json
from gen.sampling.generator import DiffusionGenerator
from gen.sampling.grids import Spaced
from gen.sampling.guidance import Clip
from gen.sampling.multistep import DPMSolver
from gen.sampling.solvers import DDIM, Ancestral

__all__ = ["obeyed", "read_scheduler", "scheduler_settings", "write_scheduler"]

FILE = "scheduler_config.json"
_ALONE = "export its weights alone, to a .safetensors file"
_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "cosine"}
_OUTPUTS = {"epsilon": "eps", "v_prediction": "v", "sample": "x"}
_VARIANCES = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "fixed_large_log": "large",
    "learned_range": "learned",
}
# settings of the noise chain and of the prediction, which all classes share
_CHAIN: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "thresholding": False,
    "steps_offset": 0,
}
_CLIPPED = {"clip_sample": True, "clip_sample_range": 1.0, "timestep_spacing": "leading"}
# class -> its other settings and their defaults
_CLASSES: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {**_CLIPPED, "variance_type": "fixed_small"},
    "DDIMScheduler": {**_CLIPPED, "set_alpha_to_one": True},
    "DPMSolverMultistepScheduler": {
        "timestep_spacing": "linspace",
        "solver_order": 2,
        "solver_type": "midpoint",
        "algorithm_type": "dpmsolver++",
        "lower_order_final": True,
        "final_sigmas_type": "zero",
    },
}
# read by nothing where what they belong to is off
_IDLE = {"dynamic_thresholding_ratio", "sample_max_value", "clip_sample_range", "beta_start", "beta_end"}


def read_scheduler(folder: Path) -> dict[str, Any] | None:
    """Gives the scheduler's settings of a pipeline's folder with all defaults filled in; None where it has no
    scheduler.

    Raises GenError for a class or a setting that is not known, by name.
    """
    file = folder / "scheduler" / FILE
    if not file.is_file():
        return None
    found = read_json(file)
    kind = found.get("_class_name") if isinstance(found, dict) else None
    if kind not in _CLASSES:
        raise GenError(
            f"{file} asks for {str(kind)[:60]}; expected {', '.join(_CLASSES)}: save the pipeline with one of these"
        )
    settings = _CHAIN | _CLASSES[kind]
    for name, value in found.items():
        idle = name.startswith("_") or name in _IDLE or value in (None, False, [])
        if name not in settings and not idle:
            raise GenError(f"{file} sets {name} to {str(value)[:40]}, which {kind} has no place for here; remove it")
    return {"_class_name": kind} | settings | {name: v for name, v in found.items() if name in settings}


def obeyed(generator: DiffusionGenerator, settings: Mapping[str, Any]) -> DiffusionGenerator:
    """Gives the generator under the chain, the prediction and the sampler of `read_scheduler`'s settings; steps stay.

    Raises GenError, by name, for what is not possible here.
    """
    if settings["thresholding"]:
        raise _refused(settings, "thresholding", "save the pipeline without it")
    chain = _chain(settings)
    output = _one_of(settings, "prediction_type", _OUTPUTS)
    if chain.zero_snr and output == "eps":
        raise _refused(
            settings, "rescale_betas_zero_snr", "a chain that ends in pure noise needs v_prediction or sample"
        )
    parameterization = dataclasses.replace(generator.denoiser.parameterization, output=output)
    denoiser = dataclasses.replace(generator.denoiser, process=chain, parameterization=parameterization)
    solver, clip = _solver(settings, parameterization.learned_variance)
    spacing = _one_of(settings, "timestep_spacing", {name: name for name in ("linspace", "leading", "trailing")})
    grid = Spaced(cast(Any, spacing), int(settings["steps_offset"]), isinstance(solver, DPMSolver))
    sampler = dataclasses.replace(generator.sampler, solver=solver, grid=grid)
    if clip:
        high = float(settings["clip_sample_range"])
        sampler = dataclasses.replace(sampler, guidance=Clip(-high, high))
    return dataclasses.replace(generator, denoiser=denoiser, sampler=sampler)


def _chain(settings: Mapping[str, Any]) -> DDPM:
    steps, zero = int(settings["num_train_timesteps"]), bool(settings["rescale_betas_zero_snr"])
    if settings["trained_betas"] is not None:
        betas = tuple(float(beta) for beta in settings["trained_betas"])
        return DDPM("given", len(betas), table=betas, zero_snr=zero)
    schedule = cast(Any, _one_of(settings, "beta_schedule", _SCHEDULES))
    ends = None if schedule == "cosine" else (float(settings["beta_start"]), float(settings["beta_end"]))
    published = DDPM(schedule, steps, zero_snr=zero)
    given = DDPM(schedule, steps, ends=ends, zero_snr=zero)
    return published if (published.betas == given.betas).all() else given


def _solver(settings: Mapping[str, Any], learned: bool) -> tuple[Any, bool]:
    """The solver, and whether the denoised prediction is clipped."""
    match settings["_class_name"]:
        case "DDPMScheduler":
            variance = _one_of(settings, "variance_type", _VARIANCES)
            if variance == "learned" and not learned:
                raise _refused(settings, "variance_type", "this network predicts no variance")
            return Ancestral(cast(Any, variance)), bool(settings["clip_sample"])
        case "DDIMScheduler":
            if settings["clip_sample"]:
                raise _refused(settings, "clip_sample", "DDIM keeps the unclipped noise there: save it with false")
            if not settings["set_alpha_to_one"]:
                raise _refused(settings, "set_alpha_to_one", "samples end in clean data here: save it with true")
            return DDIM(), False
    if settings["final_sigmas_type"] != "zero":
        raise _refused(settings, "final_sigmas_type", "samples end in clean data here: save it with zero")
    algorithm = _one_of(settings, "algorithm_type", {"dpmsolver++": False, "sde-dpmsolver++": True})
    form = _one_of(settings, "solver_type", {"midpoint": "midpoint", "heun": "heun"})
    lower = bool(settings["lower_order_final"])
    return DPMSolver(int(settings["solver_order"]), cast(Any, form), bool(algorithm), lower), False


def _one_of(settings: Mapping[str, Any], name: str, known: Mapping[str, Any]) -> Any:
    if settings[name] not in known:
        raise _refused(settings, name, f"expected {', '.join(known)}")
    return known[settings[name]]


def _refused(settings: Mapping[str, Any], name: str, advice: str) -> GenError:
    return GenError(f"{settings['_class_name']} has {name} {str(settings[name])[:40]} ({FILE}); {advice}")


def write_scheduler(folder: Path, generator: DiffusionGenerator) -> None:
    """Writes `scheduler_settings` as ``scheduler/scheduler_config.json`` of a pipeline's folder."""
    write_json(folder / "scheduler" / FILE, scheduler_settings(generator))


def scheduler_settings(generator: DiffusionGenerator) -> dict[str, Any]:
    """Gives the settings that mean a generator's chain, prediction and sampler: the inverse of `obeyed`.

    The number of steps and the guidance scale are no settings of a scheduler.

    Raises GenError for a process, a prediction, a solver or a grid that diffusers' schedulers do not have.
    """
    settings = _settings(generator)
    there = obeyed(generator, settings).sampler
    times = [sampler.times(generator.denoiser.process).times for sampler in (there, generator.sampler)]
    if there.solver != generator.sampler.solver or not np.array_equal(*times):
        raise GenError(f"diffusers' {settings['_class_name']} cannot sample as this run does; {_ALONE}")
    return settings


def _settings(generator: DiffusionGenerator) -> dict[str, Any]:
    denoiser, sampler = generator.denoiser, generator.sampler
    chain = denoiser.process
    published = isinstance(chain, DDPM) and (
        chain.schedule != "cosine" or (chain.offset, chain.max_beta) == (0.008, 0.999)
    )
    if not published:
        raise GenError(f"diffusers' schedulers have no chain like this {type(chain).__name__}; {_ALONE}")
    outputs = {ours: name for name, ours in _OUTPUTS.items()}
    if denoiser.parameterization.output not in outputs:
        raise GenError(f"diffusers has no prediction_type for {denoiser.parameterization.output}; {_ALONE}")
    found: dict[str, Any] = _CHAIN | {
        "num_train_timesteps": chain.steps,
        "prediction_type": outputs[denoiser.parameterization.output],
        "rescale_betas_zero_snr": chain.zero_snr,
    }
    if chain.schedule == "given":
        found["trained_betas"] = list(chain.table)
    else:
        found["beta_schedule"] = {ours: name for name, ours in _SCHEDULES.items()}[chain.schedule]
        if chain.schedule != "cosine":
            plain = dataclasses.replace(chain, zero_snr=False).betas
            found |= {"beta_start": float(plain[0]), "beta_end": float(plain[-1])}
            found |= {} if chain.ends is None else dict(zip(("beta_start", "beta_end"), chain.ends, strict=True))
    if isinstance(sampler.grid, Spaced):
        found |= {"timestep_spacing": sampler.grid.spacing, "steps_offset": sampler.grid.offset}
    match sampler.solver:
        case Ancestral(variance):
            kinds = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}
            clip = sampler.guidance if isinstance(sampler.guidance, Clip) else None
            found |= {"_class_name": "DDPMScheduler", "variance_type": kinds[variance], "clip_sample": clip is not None}
            found["clip_sample_range"] = 1.0 if clip is None else clip.high
        case DDIM():
            found |= {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": True}
        case DPMSolver() as solver:
            algorithm = "sde-dpmsolver++" if solver.stochastic else "dpmsolver++"
            found |= {"_class_name": "DPMSolverMultistepScheduler", "solver_order": solver.solver_order}
            found |= {"solver_type": solver.form, "algorithm_type": algorithm, "lower_order_final": solver.lower_final}
            found["final_sigmas_type"] = "zero"
        case other:
            raise GenError(f"diffusers has no scheduler for {type(other).__name__}; {_ALONE}")
    return {"timestep_spacing": "linspace"} | found
