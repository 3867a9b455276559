"""Every system from its file to samples through the command line, and back; mismatches and hostile files refused."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gen
from gen import arrays
from gen.autoregressive.binary_diffusion import BinaryDiffusion
from gen.autoregressive.gpt import GPTConfig
from gen.autoregressive.instella import InstellaDiffusionConfig
from gen.autoregressive.instella_ar import InstellaARConfig
from gen.autoregressive.mar import MARConfig
from gen.autoregressive.maskgit import MaskGITConfig, MaskGITSkipConfig
from gen.autoregressive.rar import RARConfig
from gen.cli import main
from gen.diffusion.backbones.aligned import AlignedConfig
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.backbones.edm_unet import DhariwalUNetConfig, SongUNetConfig
from gen.diffusion.backbones.rae_v2 import RAEv2Config
from gen.pretrained.readers import read_weights
from gen.pretrained.systems import SYSTEMS
from tests.pretrained.test_consistency import NETWORKS
from tests.pretrained.test_decoder import DIT, EDM2, LAMAMBA, LIGHT, VAE, official
from tests.pretrained.test_readers import HOSTILE, torch_zip

SONG = SongUNetConfig(8, width=16, mult=(1, 2), blocks=1, attention=(4,), augment=9, num_classes=3)
CHAIN = DhariwalUNetConfig(8, 3, 6, 3, width=64, mult=(1, 1), emb=4, blocks=1, attention=(4,))
ADM = DhariwalUNetConfig(
    8, out_channels=6, num_classes=3, width=32, mult=(1, 2), blocks=1, attention=(4,), head_width=32, groups=32
)
HEADS = ["--network.heads", "2"]
GRID = ["--network.shape", "[2, 2]"]
MASKED: dict[str, Any] = {
    "shape": (6,),
    "vocabulary": 8,
    "num_classes": 5,
    "width": 16,
    "depth": 2,
    "heads": 2,
    "hidden": 32,
}
RAE_V2 = RAEv2Config(
    (4, 4), 6, width=16, depth=2, heads=2, head_width=24, head_depth=1, head_heads=2, early=1, num_classes=5
)
ADM_FLAGS = ["--network.size", "8", "--network.head_width", "32"]
# system -> (a tiny network, flags for what its file does not tell)
TINY: dict[str, tuple[Any, list[str]]] = {
    "dit": (DIT, HEADS),
    "dit-diffusers": (DIT, [*HEADS, "--network.size", "4"]),
    "sit": (DIT, HEADS),
    "repa": (AlignedConfig(DiTConfig((4, 4), 4, 2, 16, 1, 2, num_classes=5), "block_0", (6,), 9), HEADS),
    "lightningdit": (LIGHT, []),
    "lamamba": (LAMAMBA, []),
    "rae-v2": (RAE_V2, ["--network.early", "1"]),
    "edm2": (EDM2, ["--network.head_width", "16"]),
    "edm": (SONG, []),
    "edm-vp": (SONG, []),
    "edm-ve": (SONG, []),
    "edm-iddpm": (CHAIN, []),
    "dmd2": (dataclasses.replace(CHAIN, out_channels=3), []),
    "rfpp": (SONG, []),
    "slimflow": (SongUNetConfig(8, width=16, mult=(1, 2), blocks=1, attention=(4,)), ["--network.size", "8"]),
    "adm": (ADM, ADM_FLAGS),
    "adm-new-order": (ADM, ADM_FLAGS),
    "llamagen": (GPTConfig((2, 2), 8, 16, 1, 2, 24, num_classes=3), [*HEADS, *GRID]),
    "rar": (RARConfig((2, 2), 8, 16, 1, 2, 24, num_classes=3), GRID),
    "maskgit": (MaskGITConfig(**MASKED, dropout=0.1), HEADS),
    "maskgit-uvit": (MaskGITSkipConfig(**MASKED), HEADS),
    "mar": (
        MARConfig(shape=(4, 4, 2), num_classes=5, width=16, depth=1, heads=2, buffer=2, head_width=8, head_depth=1),
        [*HEADS, "--network.channels", "2"],
    ),
    "sd-vae": (VAE, ["--network.groups", "2"]),
    "sd-vae-old": (VAE, ["--network.groups", "2"]),
    "kl-vae": (VAE, ["--network.groups", "2"]),
}
INSTELLA: dict[str, Any] = {"shape": (4, 3), "width": 16, "depth": 2, "heads": 2, "text": (3, 5)}
TINY |= {
    "instella-ar": (InstellaARConfig(**INSTELLA), ["--network.text_tokens", "3"]),
    "instella-diffusion": (
        BinaryDiffusion(InstellaDiffusionConfig(**INSTELLA), target="flip", times="logit-normal"),
        ["--network.text_tokens", "3"],
    ),
}
TINY |= {n: (c, ["--network.head_width", "32"] if "adm" in n or n == "ctm" else []) for n, c in NETWORKS.items()}
# systems whose files go there and back in tests of their own
ELSEWHERE = {
    "binary-diffusion": "test_scale_and_bit_presets.py",
    "llamagen-dd": "distill/test_distilled_decoding.py",
    "var-dd": "distill/test_distilled_decoding.py",
    "var": "test_scale_and_bit_presets.py",
    "binary-autoencoder": "pretrained/test_tokenizer_files.py",
    "detok": "parity/test_detok.py",
    "flextok": "parity/test_flextok.py",
    "flowtok": "parity/test_flowtok_sampling.py",
    "instella-tokenizer": "parity/test_instella_tokenizer.py",
    "llamagen-vq": "parity/test_vqgan.py",
    "maskgen": "parity/test_maskgen.py",
    "maskgit-vqgan": "parity/test_vqgan.py",
    "rae": "parity/test_rae.py",
    "titok": "parity/test_titok.py",
    "var-vqvae": "pretrained/test_tokenizer_files.py",
    "vitok": "parity/test_vitok.py",
}
FLAGS = {"repa": ["--network.encoder_depth", "1"]}
ALIKE = (
    *NETWORKS,
    "adm-new-order",
    "instella-ar",
    "instella-diffusion",
    "dmd2",
    "edm-ve",
    "edm-vp",
    "kl-vae",
    "maskgit-uvit",
    "repa",
    "rfpp",
    "sd-vae-old",
)  # read by the code of others here
TOKENS = ("llamagen", "rar")  # joined with a tokenizer and sampled in test_token_files.py
CAPTIONED = ("instella-ar", "instella-diffusion")  # sampled with captions in test_bits.py
ONE_STEP = ("dmd2",)
QUICK = ("edm",)  # the rest compile for some seconds each


def arguments(name: str, source: Path, out: Path) -> list[str]:
    flags = [*TINY[name][1], *FLAGS.get(name, [])]
    return ["convert", str(source), "--out", str(out), "--system", name, *flags]


def test_every_system_is_here() -> None:
    assert {*TINY, *ELSEWHERE} == set(SYSTEMS)
    for name, file in ELSEWHERE.items():
        text = (Path(__file__).parents[1] / file).read_text()
        assert '"convert"' in text, f"{file} converts no file of {name}"


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in ALIKE else n for n in TINY])
def test_there_and_back(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was matched is said; what was read is written again, bit for bit."""
    weights = official(name, TINY[name][0])
    arrays.write(tmp_path / "a.safetensors", weights)
    assert main(arguments(name, tmp_path / "a.safetensors", tmp_path / "run")) == 0
    assert f"{name}: {len(weights)} matched" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "run"), "--out", str(tmp_path / "back.safetensors")]) == 0
    back = read_weights(tmp_path / "back.safetensors")
    assert back.keys() == weights.keys()
    for key, array in weights.items():
        np.testing.assert_array_equal(back[key], array, err_msg=key, strict=True)


@pytest.mark.parametrize("name", ["dit", "edm", pytest.param("edm2", marks=pytest.mark.slow)])
def test_other_tensors_are_refused_by_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = official(name, TINY[name][0])
    one = min(weights)  # not the label table: without it a DiT is unconditional
    changed = {
        "missing": {k: v for k, v in weights.items() if k != one},
        "misshaped": weights | {one: np.zeros((7, 7, 7), np.float32)},
        "unexpected": weights | {"stranger.weight": np.zeros(3, np.float32)},
    }
    for what, content in changed.items():
        arrays.write(tmp_path / f"{what}.safetensors", content)
        capsys.readouterr()
        assert main(arguments(name, tmp_path / f"{what}.safetensors", tmp_path / "none")) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert what in err
        assert ("stranger.weight" if what == "unexpected" else one) in err
        assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name, (config, _) in TINY.items()
        if config is not VAE and name not in (*TOKENS, *CAPTIONED)
    ],
)
def test_from_file_to_samples(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays.write(tmp_path / "a.safetensors", official(name, TINY[name][0]))
    assert main(arguments(name, tmp_path / "a.safetensors", tmp_path / "run")) == 0
    loaded = gen.load(tmp_path / "run")
    out = tmp_path / "x.npz"
    steps = "1" if name in ONE_STEP else "3"
    assert main(["sample", str(tmp_path / "run"), "--seeds", "0-2", "--steps", steps, "--out", str(out)]) == 0
    assert "network calls per image" in capsys.readouterr().out
    with np.load(out) as file:
        assert file["arr_0"].shape == (3, *loaded.generator.shape)
        assert len(np.unique(file["arr_0"].reshape(3, -1), axis=0)) == 3


def test_a_system_in_the_place_of_a_feature_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "dit", "file.pt", "--out", "run"]) == 2
    assert "write gen convert file.pt --system dit --out RUN" in capsys.readouterr().err


def test_hostile_files_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for what, content in HOSTILE.items():
        file = torch_zip(tmp_path / "x.pt", content, {"0": b""})
        assert main(["convert", str(file), "--out", "run", "--system", "dit"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert what in err
        assert "refused" in err
    assert not (tmp_path / "hostile").exists()
    assert not (tmp_path / "run").exists()
