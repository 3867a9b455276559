"""Converted latent models joined with their autoencoder make images through the command line; refusals."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import gen
from gen import arrays
from gen.cli import main
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.backbones.edm2_unet import EDM2Config
from gen.diffusion.backbones.lamamba import LaMambaConfig
from gen.diffusion.backbones.lightningdit import LightningDiTConfig
from gen.nn.network import param_shapes
from gen.pretrained import edm2
from gen.pretrained.systems import system
from gen.tokenizers.kl_vae import KLVAEConfig
from tests.pretrained.layouts import component, dit_names

VAE = KLVAEConfig(image=(16, 16, 3), width=4, mult=(1, 1), blocks=1, groups=2, middle_attention=True)
DIT = DiTConfig((4, 4), 4, 2, 16, 1, 2, num_classes=5, learned_variance=True)
LIGHT = LightningDiTConfig((4, 4), 4, 1, 16, 1, 2, num_classes=5)
LAMAMBA = LaMambaConfig(
    (8, 8), 4, 2, 8, (1, 1, 1, 1), 1, False, (1, 1, 1, 1), window=2, num_classes=5, learned_variance=True
)
EDM2 = EDM2Config(8, 4, 5, (16, 16), 1, (4,), 16)


def official(name: str, config: Any) -> dict[str, np.ndarray]:
    """Random weights under official names."""
    rng = np.random.default_rng(0)

    def draw(shape: Any) -> np.ndarray:
        return (0.1 * rng.standard_normal(shape.shape)).astype(shape.dtype)

    return system(name).save(config, jax.tree.map(draw, param_shapes(config)))


def written(path: Path, weights: dict[str, np.ndarray]) -> str:
    arrays.write(path, weights)
    return str(path)


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    weights = official("sd-vae", VAE)
    return component(tmp_path / "vae", "AutoencoderKL", weights, norm_num_groups=2, latent_channels=4)


@pytest.mark.parametrize(
    ("name", "config", "side", "flags"),
    [
        pytest.param("dit", DIT, 8, ["--network.heads", "2"], marks=pytest.mark.slow),
        pytest.param("sit", DIT, 8, ["--network.heads", "2"], marks=pytest.mark.slow),
        ("lightningdit", LIGHT, 8, ["--normalizer", "STATS"]),
        pytest.param("lamamba", LAMAMBA, 16, [], marks=pytest.mark.slow),
        pytest.param("edm2", EDM2, 16, ["--network.head_width", "16"], marks=pytest.mark.slow),
    ],
)
def test_file_and_autoencoder_to_images(
    name: str, config: Any, side: int, flags: list[str], vae: Path, tmp_path: Path
) -> None:
    source = written(tmp_path / "net.safetensors", official(name, config))
    stats = {"mean": np.arange(4.0).reshape(1, 4, 1, 1), "std": np.full((1, 4, 1, 1), 2.0)}
    flags = [written(tmp_path / "stats.safetensors", stats) if f == "STATS" else f for f in flags]
    args = ["convert", source, "--out", str(tmp_path / "run"), "--system", name, "--vae", str(vae), *flags]
    assert main(args) == 0
    loaded = gen.load(tmp_path / "run")
    assert loaded.tokenizer.spec.image == (side, side, 3)
    normalizer = {k: np.asarray(v) for k, v in loaded.params["normalizer"].items()}
    expected = {"lightningdit": (np.arange(4.0), np.full(4, 2.0)), "edm2": (edm2.NORMALIZER.shift, None)}
    shift, scale = expected.get(name, (np.zeros(4), np.full(4, 1 / 0.18215)))
    np.testing.assert_allclose(normalizer["shift"], shift, rtol=1e-6)
    np.testing.assert_allclose(normalizer["scale"], edm2.NORMALIZER.scale if scale is None else scale, rtol=1e-6)
    args = ["sample", str(tmp_path / "run"), "--seeds", "0-2", "--out", str(tmp_path / "x.npz"), "--steps", "2"]
    assert main(args) == 0
    with np.load(tmp_path / "x.npz") as file:
        images = file["arr_0"]
    assert images.dtype == np.uint8
    assert images.shape == (3, side, side, 3)
    assert len(np.unique(images.reshape(3, -1), axis=0)) == 3


def test_a_pipeline_brings_its_autoencoder_and_factor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe"
    weights = dit_names(official("dit", DIT))
    component(pipe / "transformer", "DiTTransformer2DModel", weights, sample_size=4, num_attention_heads=2)
    settings = {"norm_num_groups": 2, "latent_channels": 4, "scaling_factor": 0.5, "shift_factor": 0.25}
    component(pipe / "vae", "AutoencoderKL", official("sd-vae", VAE), **settings)
    assert main(["convert", str(pipe), "--out", str(tmp_path / "run")]) == 0
    assert "joined with sd-vae weights vae: latents (4, 4, 4), images (8, 8, 3)" in capsys.readouterr().out
    loaded = gen.load(tmp_path / "run")
    assert loaded.denoiser.network == DIT
    np.testing.assert_allclose(loaded.params["normalizer"]["scale"], np.full(4, 2.0))
    np.testing.assert_allclose(loaded.params["normalizer"]["shift"], np.full(4, 0.25))
    # the official file of the same network gives the same run
    source = written(tmp_path / "dit.safetensors", official("dit", DIT))
    args = ["--vae", str(pipe / "vae"), "--network.heads", "2", "--normalizer", "0.5"]
    assert main(["convert", source, "--out", str(tmp_path / "other"), *args]) == 0
    other = gen.load(tmp_path / "other")
    assert other.generator == loaded.generator
    jax.tree.map(np.testing.assert_array_equal, other.params["net"], loaded.params["net"])


def test_a_run_is_an_autoencoder_too(vae: Path, tmp_path: Path) -> None:
    assert main(["convert", str(vae), "--out", str(tmp_path / "coder")]) == 0
    source = written(tmp_path / "dit.safetensors", official("dit", DIT))
    args = ["--network.heads", "2", "--vae", str(tmp_path / "coder")]
    assert main(["convert", source, "--out", str(tmp_path / "run"), *args]) == 0
    assert gen.load(tmp_path / "run").tokenizer.spec.image == (8, 8, 3)
    assert main(["convert", str(tmp_path / "run"), "--out", str(tmp_path / "back.safetensors")]) == 0


def test_which_of_two_alike_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path / "x.safetensors", official("sit", DIT))
    heads = ["--network.heads", "2"]
    assert main(["convert", source, "--out", str(tmp_path / "a"), *heads]) == 0
    said = capsys.readouterr().out
    assert "taken for dit; sit files have the same names and shapes" in said
    assert "convert again with --system sit" in said
    assert main(["convert", source, "--out", str(tmp_path / "b"), *heads, "--system", "sit"]) == 0
    assert "taken for" not in capsys.readouterr().out
    processes = [gen.load(tmp_path / run).denoiser.process for run in "ab"]
    assert [type(process).__name__ for process in processes] == ["DDPM", "Linear"]


def test_refusals(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*args: str) -> str:
        capsys.readouterr()
        assert main(["convert", *args, "--out", str(tmp_path / "run")]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert not (tmp_path / "run").exists()
        return err

    source = written(tmp_path / "dit.safetensors", official("dit", DIT))
    light = written(tmp_path / "light.safetensors", official("lightningdit", LIGHT))
    heads = ["--network.heads", "2"]
    assert "without an autoencoder; add --vae" in fails(source, *heads, "--normalizer", "1")
    assert "no weights file at" in fails(source, *heads, "--vae", str(tmp_path / "nothing.pt"))
    assert "no normaliser 'x.pt'; give a factor" in fails(source, *heads, "--vae", str(vae), "--normalizer", "x.pt")
    assert "no normaliser '-1'" in fails(source, *heads, "--vae", str(vae), "--normalizer=-1")
    assert "dit.safetensors holds no autoencoder for --vae: the names in the file (blocks.0.adaLN" in fails(
        source, *heads, "--vae", source
    )
    assert "sd-vae weights make no latents" in fails(
        str(vae / "diffusion_pytorch_model.safetensors"), "--vae", str(vae), "--network.groups", "2"
    )
    wide = official("sd-vae", KLVAEConfig((16, 16, 3), 4, (1, 1), 1, 6, 6, groups=2))
    wide_vae = component(tmp_path / "wide", "AutoencoderKL", wide, norm_num_groups=2, latent_channels=6)
    assert "makes latents (4, 4, 4), the autoencoder decodes (128, 128, 6)" in fails(
        source, *heads, "--vae", str(wide_vae)
    )
    assert main(["convert", str(vae), "--out", str(tmp_path / "coder")]) == 0  # tells no normaliser
    assert "no normaliser of the latents of lightningdit is known; add --normalizer" in fails(
        light, "--vae", str(tmp_path / "coder")
    )
    stats = written(tmp_path / "s.safetensors", {"mean": np.zeros(3), "std": np.ones(3)})
    assert "is the normaliser of 3 channels; the model has 4" in fails(light, "--vae", str(vae), "--normalizer", stats)
    differing = dit_names(official("dit", DiTConfig((4, 4), 4, 2, 16, 2, 2, num_classes=5)))
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    differing[name] = differing[name] + 1
    folder = component(tmp_path / "two", "DiTTransformer2DModel", differing, sample_size=4, num_attention_heads=2)
    assert "embedders of time or label differ" in fails(str(folder))
    (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    assert "holds a UNet2DModel; expected a DiTTransformer2DModel" in fails(str(folder))
    (folder / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    assert "has no diffusion_pytorch_model.safetensors" in fails(str(folder))
