"""`gen info PRESET` for every preset of the diffusion experiments, planned on an 8 x 8 mesh."""

from pathlib import Path

import numpy as np
import pytest

from gen.cli import main
from gen.experiments import presets
from tests.test_edm2_presets import COUNTS as EDM2
from tests.test_edm_presets import COUNTS as EDM
from tests.test_edm_presets import image_zip
from tests.test_teacher_presets import BIG, COUNTS, cached, shards

# tracing a step of a U-Net takes half a minute
QUICK = ("dit-xl2", "sit-b2", "repa-xl2", "lightningdit-xl1-long")
NAMES = [*BIG, *EDM, *EDM2]


def data_for(name: str, folder: Path) -> str:
    """The smallest data that the preset takes."""
    if name in EDM or name == "edm2-s-64":
        return image_zip(folder / "images.zip", 64 if "64" in name else 32, 1)
    if "lightningdit" in name:
        return str(shards(folder / "shards", shape=(32, 16, 16)))
    rows = {"latent": np.random.default_rng(0).normal(size=(4, 64, 64, 4)).astype(np.float32)} if name in EDM2 else {}
    return cached(folder / "cache", encoder_0=np.zeros((4, 256, 768), np.float16), **rows)


def test_every_preset_is_here() -> None:
    experiments = ("dit", "sit", "lightningdit", "edm", "edm2", "lamamba", "ascan")
    big = [p.name for p in presets().values() if p.module.rpartition(".")[2] in experiments and "smoke" not in p.name]
    assert sorted(NAMES) == sorted(big)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_parameters_and_memory_are_printed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jax._src.compiler.compile_or_get_cached", lambda *_, **__: pytest.fail("compiled"))
    args = ["info", name, "--data", data_for(name, tmp_path), "--devices", "64", "--engine.mesh.fsdp", "8"]
    assert main(args) == 0
    said = capsys.readouterr().out
    count = (COUNTS | EDM | EDM2).get(name)
    shown = "" if count is None else f"{count:,} "
    assert f"{shown}parameters; per device: parameters " in said
    assert "optimisers " in said
    assert "mesh data=8 x fsdp=8 x tensor=1" in said
