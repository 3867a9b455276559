"""Official file -> gen convert -> gen.load -> the generator's own sampler: the official samples; and back."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gen
from gen import cli
from gen.pretrained import lightningdit
from gen.pretrained.readers import read_weights
from gen.runs import Loaded
from gen.sampling.integrate import Problem, integrate
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_dit import nchw, nhwc


def converted(fx: Fixture, folder: Path, *options: str) -> Loaded:
    """The fixture's weights as a run folder, loaded; the run exported again is the file."""
    heads = str(fx.config["args"]["num_heads"])
    run, back = str(folder / "run"), folder / "back.safetensors"
    file = str(fx.path / "weights.safetensors")
    assert cli.main(["convert", file, "--out", run, "--network.heads", heads, *options]) == 0
    assert cli.main(["convert", run, "--out", str(back)]) == 0
    exported = read_weights(back)
    assert exported.keys() == fx.weights.keys()
    for name, array in fx.weights.items():
        if name.startswith("feat_rope"):  # computed, not stored
            np.testing.assert_allclose(exported[name], array, atol=1e-6)
        else:
            np.testing.assert_array_equal(exported[name], array, err_msg=name)
    return gen.load(run)


def samples(loaded: Loaded, z: Any, label: Any, draws: Any, **changes: Any) -> np.ndarray:
    """What the loaded generator's sampler, with `changes`, makes of the latents z (B, C, H, W)."""
    sampler, net = dataclasses.replace(loaded.generator.sampler, **changes), loaded.denoiser
    params, cond = loaded.params["net"], {"label": jnp.asarray(label)}
    denoise = sampler.guidance(net.bind(params), lambda c: net.net.apply(params, c, method="null"))
    draws, grid = jnp.asarray(nhwc(draws)), sampler.times(net.process)
    x = jnp.asarray(nhwc(z))
    return nchw(
        jax.jit(lambda x: integrate(sampler.solver, Problem(denoise, x, grid, lambda i: draws[i], cond, {})))(x)
    )


@pytest.mark.parametrize("fx", fixtures("sit-sampling*"), ids=str)
def test_sit(fx: Fixture, tmp_path: Path) -> None:
    loaded = converted(fx, tmp_path, "--system", "sit")
    solver = loaded.generator.sampler.solver
    published = {
        "path": "Linear",
        "prediction": "velocity",
        "sampling_method": "Euler",
        "diffusion_form": solver.form,
        "diffusion_norm": solver.norm,
        "last_step": "Mean",
        "last_step_size": 0.04,
    }
    names = [k for k, run in fx.config["runs"].items() if published.items() <= run.items()]
    for name in names:
        steps = fx.config["runs"][name]["num_steps"]
        found = samples(loaded, fx.io["z"], fx.io["y"], fx.io["sde_noise"], steps=steps)
        fx.close(found, fx.io[name][-1], rtol=1e-3)


@pytest.mark.parametrize("fx", fixtures("repa-alignment*"), ids=str)
def test_repa(fx: Fixture, tmp_path: Path) -> None:
    loaded = converted(fx, tmp_path, "--network.encoder_depth", str(fx.config["args"]["encoder_depth"]))
    found = samples(loaded, fx.io["sample_z"], fx.io["sample_y"], fx.io["sde_noise"], steps=6)
    fx.close(found, "sde_plain")


@pytest.mark.parametrize("fx", fixtures("lightningdit-sampling*"), ids=str)
def test_lightningdit(fx: Fixture, tmp_path: Path) -> None:
    loaded = converted(fx, tmp_path)
    published = {"method": "euler", "timestep_shift": 0.3, "cfg_interval": True}
    for name, run in fx.config["runs"].items():
        if published.items() <= run.items():
            guidance = lightningdit.guidance(run["cfg_scale"], run["cfg_interval_start"])
            steps, none = run["num_sampling_steps"] - 1, np.zeros((1, *fx.io["z"].shape))
            found = samples(loaded, fx.io["z"], fx.io["y"], none, steps=steps, guidance=guidance)
            fx.close(found, fx.io[f"{name}_traj"][-1], rtol=1e-3)
