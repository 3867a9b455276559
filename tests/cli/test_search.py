"""``gen search``: a grid that ``gen sample`` takes, with baselines on the same samples; what is refused."""

from pathlib import Path

import jax
import pytest

from gen import cli
from gen.arrays import save
from gen.config import to_json
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.denoiser import Denoiser
from gen.diffusion.process import Linear
from gen.files import read_json, write_json
from gen.nn.network import Network
from gen.sampling.generator import Sampler
from gen.sampling.solvers import Euler
from gen.training.run import RunConfig
from gen.training.task import Model


def run_folder(folder: Path, depth: int = 2) -> str:
    net = DiTConfig((8, 8), 1, 4, 8, depth, 2, num_classes=10, remat="none", scan=False)
    config = RunConfig("toy", models={"net": Model(Denoiser(net, Linear()))}, sampler=Sampler(Euler(), steps=5))
    write_json(folder / "config.json", to_json(config))
    save(folder / "artifacts" / "net.safetensors", Network(net).init(jax.random.key(0)))
    return str(folder)


def test_a_grid_is_found_and_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = run_folder(tmp_path / "run"), str(tmp_path / "grid.json")
    command = ["search", run, "--steps", "2", "--out", out, "--scale", "smoke", "--layers", "0.5"]
    assert cli.main(command) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("searched ")
    assert "uniform" in last
    assert "karras" in last
    held = read_json(out)
    assert len(held["grid"]["times"]) == 3
    assert held["grid"]["controls"][0][0] == "blocks"
    assert held["about"]["distances"]["searched"] <= held["about"]["distances"]["uniform"] + 5.0
    sample = ["sample", run, "--seeds", "0-1", "--out", str(tmp_path / "a.npz"), "--grid"]
    assert cli.main([*sample, out]) == 0
    assert "2 network calls per image" in capsys.readouterr().out
    other = run_folder(tmp_path / "other", depth=3)
    assert cli.main(["sample", other, "--out", str(tmp_path / "b.npz"), "--grid", out]) == 2
    assert "is for another model: 'blocks' has 2 entries a step, this network 3" in capsys.readouterr().err
    for more, message in (
        (["--what", "skips"], "has no skips to tune"),
        (["--scale", "lap"], "unknown search 'lap'"),
    ):
        assert cli.main(["search", run, "--out", out, *more]) == 2
        assert message in capsys.readouterr().err
