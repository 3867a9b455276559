"""Files of token models joined with a tokenizer, sampled through the command line."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import gen
from gen import arrays
from gen.cli import main
from gen.config import to_json
from gen.files import write_json
from gen.nn.network import Network
from gen.tokenizers.quantizers.vq import VQ
from gen.tokenizers.titok import TiTokConfig, Tower
from gen.training.run import RunConfig
from gen.training.task import Model
from tests.pretrained.test_decoder import official
from tests.pretrained.test_from_file import TINY, TOKENS, arguments

TOWER = Tower(16, 1, 4)
TITOK = TiTokConfig((8, 8, 1), 4, 4, None, TOWER, TOWER, VQ(8, 3), scan=False)


def tokenizer_run(folder: Path, codes: int = 8) -> str:
    """A run folder with a small tokenizer of four tokens."""
    config = dataclasses.replace(TITOK, quantizer=VQ(codes, 3))
    params = jax.device_get(Network(config).init(jax.random.key(0)))
    arrays.save(folder / "artifacts" / "tokenizer.safetensors", params, {"origin": "here"})
    write_json(folder / "config.json", to_json(RunConfig("toy", models={"tokenizer": Model(config)})))
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENS)
def test_from_file_to_images(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(TINY[name][0], shape=(4,))
    arrays.write(tmp_path / "a.safetensors", official(name, config))
    flags = ["--network.shape", "[4]", "--vae"]
    command = [*arguments(name, tmp_path / "a.safetensors", tmp_path / "run"), *flags]
    assert main([*command, tokenizer_run(tmp_path / "other", 9)]) == 2
    assert "a vocabulary of 9, and the model one of 8" in capsys.readouterr().err
    assert main([*command, tokenizer_run(tmp_path / "tokenizer")]) == 0
    out = tmp_path / "x.npz"
    assert main(["sample", str(tmp_path / "run"), "--seeds", "0-2", "--cfg-scale", "1.5", "--out", str(out)]) == 0
    assert "4 network calls per image" in capsys.readouterr().out
    with np.load(out) as file:
        assert file["arr_0"].shape == (3, 8, 8, 1)
    assert gen.load(tmp_path / "run").generator.model.shape == (4,)
    assert main(["sample", str(tmp_path / "run"), "--seeds", "0", "--steps", "3", "--out", str(out)]) == 2
    assert "writes token by token" in capsys.readouterr().err
