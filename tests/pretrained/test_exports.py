"""There and back: what a run means is what its export means, or the export is refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gen
from gen import arrays
from gen.cli import main
from gen.config import to_json
from gen.diffusion.ddpm import DDPM
from gen.errors import GenError
from gen.files import write_json
from gen.pretrained import diffusers, dit, lightningdit
from gen.pretrained.decoder import read_decoder
from gen.pretrained.schedulers import obeyed, read_scheduler, scheduler_settings
from gen.sampling.grids import Spaced
from gen.sampling.guidance import ClassifierFree, Clip
from gen.sampling.multistep import DPMSolver
from gen.sampling.solvers import DDIM, Ancestral, Heun
from gen.training.run import RunConfig
from gen.training.task import Model
from tests.pretrained.layouts import component, dit_names
from tests.pretrained.test_decoder import DIT, LIGHT, VAE, official


def run(folder: Path, generator: Any, importer: Any, weights: dict[str, np.ndarray], **others: Any) -> Path:
    """A run folder with these weights, as if trained here."""
    _, params, _ = importer.load(weights, generator.denoiser.network)
    arrays.save(folder / "artifacts" / "net.safetensors", params)
    for role, tree in others.items():
        arrays.save(folder / "artifacts" / f"{role}.safetensors", tree)
    parts = {
        "sampler": generator.sampler,
        "tokenizer": generator.tokenizer,
        "models": {"net": Model(generator.denoiser)},
    }
    write_json(folder / "config.json", to_json(RunConfig("mine", **parts)))
    return folder


def fails(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_sampler_heads_and_normaliser_come_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = dit.generator(DIT, 7, ClassifierFree(4.0, channels=3))
    source = run(
        tmp_path / "mine",
        generator,
        dit.IMPORTER,
        official("dit", DIT),
        normalizer={"shift": np.full(4, 0.5, np.float32), "scale": np.full(4, 2.0, np.float32)},
    )
    file, back = tmp_path / "x.safetensors", tmp_path / "back"
    assert "was trained here; say the layout with --system" in fails(capsys, "convert", source, "--out", file)
    assert main(["convert", str(source), "--out", str(file), "--system", "dit"]) == 0
    assert arrays.metadata(file)["gen.system"] == "dit"
    vae = component(tmp_path / "vae", "AutoencoderKL", official("sd-vae", VAE), norm_num_groups=2)
    assert main(["convert", str(file), "--out", str(back), "--vae", str(vae)]) == 0
    loaded = gen.load(back)
    assert dataclasses.replace(loaded.generator, tokenizer=None) == generator
    np.testing.assert_array_equal(loaded.params["normalizer"]["scale"], np.full(4, 2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameterization": {"scale": 10.0}}, "parameterization.scale 10.0"),
        ({"parameterization": {"sign": 1}}, "parameterization.sign 1"),
        ({"parameterization": {"clock": "time"}}, "parameterization.clock 'time'"),
        ({"process": {"sigma_min": 0.1}}, "process.sigma_min 0.1"),
    ],
)
def test_other_conventions_are_refused_by_name(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = lightningdit.generator(LIGHT)
    parts = {k: dataclasses.replace(getattr(generator.denoiser, k), **v) for k, v in change.items()}
    generator = dataclasses.replace(generator, denoiser=dataclasses.replace(generator.denoiser, **parts))
    source = run(tmp_path / "mine", generator, lightningdit.IMPORTER, official("lightningdit", LIGHT))
    said = fails(capsys, "convert", source, "--out", tmp_path / "x.safetensors", "--system", "lightningdit")
    assert message in said
    assert not (tmp_path / "x.safetensors").exists()
    assert "which edm2 has no names for" in fails(
        capsys, "convert", source, "--out", tmp_path / "x.safetensors", "--system", "edm2"
    )


def test_a_pipeline_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Chain, prediction, clip, normaliser and autoencoder stand in the folders of diffusers."""
    generator = dit.generator(DIT, 5)
    chain = DDPM("scaled-linear", 100, ends=(0.001, 0.02), zero_snr=True)
    denoiser = dataclasses.replace(
        generator.denoiser,
        process=chain,
        parameterization=dataclasses.replace(generator.denoiser.parameterization, output="v"),
    )
    sampler = dataclasses.replace(generator.sampler, grid=Spaced("leading", 1), guidance=Clip(-2.0, 2.0))
    image = dataclasses.replace(VAE, image=(4, 4, 3))
    generator = dataclasses.replace(generator, denoiser=denoiser, sampler=sampler, tokenizer=image)
    _, tokenizer, _ = diffusers_vae(official("sd-vae", VAE))
    source = run(
        tmp_path / "mine",
        generator,
        dit.IMPORTER,
        official("dit", DIT),
        tokenizer=tokenizer,
        normalizer={"shift": np.zeros(4, np.float32), "scale": np.full(4, 8.0, np.float32)},
    )
    folder, back = tmp_path / "pipeline", tmp_path / "back"
    assert main(["convert", str(source), "--out", str(folder), "--system", "dit-diffusers"]) == 0
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    weights = "diffusion_pytorch_model.safetensors"
    assert files == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        f"transformer/{weights}",
        "vae/config.json",
        f"vae/{weights}",
    }
    assert json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"] == 0.125
    assert arrays.read(folder / "transformer" / weights).keys() == dit_names(official("dit", DIT)).keys()
    assert main(["convert", str(folder), "--out", str(back)]) == 0
    loaded = gen.load(back)
    assert loaded.generator == dataclasses.replace(generator, tokenizer=loaded.tokenizer)
    np.testing.assert_array_equal(loaded.params["normalizer"]["scale"], np.full(4, 8.0))
    assert main(["convert", str(source), "--out", str(tmp_path / "vae"), "--system", "sd-vae"]) == 0
    assert "already holds something" in fails(capsys, "convert", source, "--out", folder, "--system", "dit-diffusers")
    for name in ("sd-vae", "kl-vae"):
        file = tmp_path / f"{name}.safetensors"
        assert main(["convert", str(source), "--out", str(file), "--system", name]) == 0
        assert arrays.read(file).keys() == official(name, VAE).keys()
        decoder = read_decoder(file)  # its groups and the scale of its latents stand in the file
        assert decoder.config == dataclasses.replace(VAE, image=(4, 4, 3))
        assert decoder.normalizer is not None
        np.testing.assert_array_equal(decoder.normalizer["scale"], np.full(4, 8.0))
    damaged = arrays.metadata(file) | {"gen.network": "{"}
    arrays.write(file, arrays.read(file), damaged)
    assert "the header of" in fails(capsys, "convert", file, "--out", tmp_path / "none")


def diffusers_vae(weights: dict[str, np.ndarray]) -> Any:
    from gen.pretrained.systems import system

    return system("sd-vae").load(weights, VAE)


SETTINGS = {"num_train_timesteps": 50, "beta_start": 0.001, "beta_end": 0.02}


@pytest.mark.parametrize(
    ("found", "solver", "guidance", "output"),
    [
        ({"_class_name": "DDPMScheduler"}, Ancestral("small"), Clip(), "eps"),
        (
            {
                "_class_name": "DDPMScheduler",
                "variance_type": "learned_range",
                "clip_sample": False,
                "prediction_type": "v_prediction",
            },
            Ancestral("learned"),
            ClassifierFree(),
            "v",
        ),
        (
            {"_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": "sample"},
            DDIM(),
            ClassifierFree(),
            "x",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3, "euler_at_final": False},
            DPMSolver(3),
            ClassifierFree(),
            "eps",
        ),
    ],
)
def test_schedulers_are_obeyed(found: Any, solver: Any, guidance: Any, output: str, tmp_path: Path) -> None:
    write_json(tmp_path / "scheduler" / "scheduler_config.json", SETTINGS | found)
    settings = read_scheduler(tmp_path)
    assert settings is not None
    made = obeyed(dit.generator(DIT, 10), settings)
    assert made.denoiser.process == DDPM("linear", 50, ends=(0.001, 0.02))
    assert (made.sampler.solver, made.sampler.guidance, made.sampler.steps) == (solver, guidance, 10)
    assert (made.denoiser.parameterization.output, made.denoiser.parameterization.learned_variance) == (output, True)
    assert obeyed(made, scheduler_settings(made)) == made


def test_betas_of_a_scheduler(tmp_path: Path) -> None:
    base = {"_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": "v_prediction"}
    for change, chain in (
        ({"trained_betas": [0.1, 0.2, 0.3]}, DDPM("given", 3, table=(0.1, 0.2, 0.3))),
        ({"beta_schedule": "squaredcos_cap_v2"}, DDPM("cosine")),
        ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, DDPM("scaled-linear")),
        ({"rescale_betas_zero_snr": True}, DDPM("linear", zero_snr=True)),
    ):
        write_json(tmp_path / "scheduler" / "scheduler_config.json", base | change)
        settings = read_scheduler(tmp_path)
        assert settings is not None
        assert obeyed(dit.generator(DIT, 2), settings).denoiser.process == chain


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"_class_name": "PNDMScheduler"}, "asks for PNDMScheduler; expected DDPMScheduler"),
        ({"_class_name": "DDPMScheduler", "thresholding": True}, "thresholding True"),
        ({"_class_name": "DDPMScheduler", "new_trick": 0.5}, "sets new_trick to 0.5"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}, "beta_schedule sigmoid"),
        ({"_class_name": "DDPMScheduler", "prediction_type": "flow"}, "prediction_type flow"),
        ({"_class_name": "DDPMScheduler", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, "variance_type learned"),
        ({"_class_name": "DDIMScheduler"}, "clip_sample True"),
        ({"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False}, "set_alpha_to_one False"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "algorithm_type dpmsolver"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, "sets use_karras_sigmas"),
    ],
)
def test_schedulers_are_refused_by_name(found: Any, message: str, tmp_path: Path) -> None:
    write_json(tmp_path / "scheduler" / "scheduler_config.json", found)
    with pytest.raises(GenError, match=message):
        obeyed(dit.generator(DIT, 2), read_scheduler(tmp_path) or {})


def test_samplers_without_a_scheduler_are_refused() -> None:
    generator = dit.generator(DIT, 2)
    heun = dataclasses.replace(generator, sampler=dataclasses.replace(generator.sampler, solver=Heun()))
    with pytest.raises(GenError, match="no scheduler for Heun"):
        scheduler_settings(heun)
    with pytest.raises(GenError, match="no chain like this Linear"):
        scheduler_settings(lightningdit.generator(LIGHT))


def test_averages_and_settings_of_a_pipeline(tmp_path: Path) -> None:
    weights = dit_names(official("dit", DIT))
    settings = {"sample_size": 4, "num_attention_heads": 2}
    raw = component(tmp_path / "transformer", "DiTTransformer2DModel", weights, **settings)
    assert diffusers.component(tmp_path).entry == ""
    component(tmp_path / "transformer_ema", "DiTTransformer2DModel", {k: 2 * v for k, v in weights.items()}, **settings)
    held = diffusers.component(tmp_path)
    assert held.entry == "transformer_ema"
    np.testing.assert_array_equal(held.weights["proj_out_2.bias"], 2 * weights["proj_out_2.bias"])
    np.testing.assert_array_equal(
        diffusers.component(tmp_path, "transformer").weights["proj_out_2.bias"], weights["proj_out_2.bias"]
    )
    with pytest.raises(GenError, match=r"no unet with a config\.json"):
        diffusers.component(tmp_path, "unet")
    for name, value in (("activation_fn", "geglu"), ("norm_type", "layer_norm"), ("cross_attention_dim", 768)):
        config = {"_class_name": "DiTTransformer2DModel", **settings, name: value}
        (raw / "config.json").write_text(json.dumps(config))
        with pytest.raises(GenError, match=name):
            diffusers.component(raw)


def test_an_autoencoder_s_latents_are_scaled_as_its_folder_says(tmp_path: Path) -> None:
    weights = official("sd-vae", VAE)
    said = {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [2.0] * 4, "scaling_factor": 0.5, "shift_factor": 0.25}
    held = diffusers.component(component(tmp_path / "vae", "AutoencoderKL", weights, latent_channels=4, **said))
    assert held.normalizer is not None
    np.testing.assert_allclose(held.normalizer["shift"], [1.5, 2.5, 3.5, 4.5])
    np.testing.assert_allclose(held.normalizer["scale"], np.full(4, 4.0))


def test_variants_and_shards_of_a_component(tmp_path: Path) -> None:
    folder = component(tmp_path / "vae", "AutoencoderKL", official("sd-vae", VAE))
    whole = folder / "diffusion_pytorch_model.safetensors"
    half = whole.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert diffusers.component(folder).file == half
    half.rename(folder / "diffusion_pytorch_model.non_ema.safetensors")
    arrays.write(half, official("sd-vae", VAE))
    with pytest.raises(GenError, match="variants fp16, non_ema"):
        diffusers.component(folder)
    part = "diffusion_pytorch_model-00001-of-00001.safetensors"
    arrays.write(folder / part, official("sd-vae", VAE))
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(official("sd-vae", VAE), part)}))
    assert diffusers.component(folder).file == index
