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
from gen.sampling.grids import Searched
from gen.sampling.search import write_grid
from gen.sampling.solvers import Euler
from gen.training.run import RunConfig
from gen.training.task import Model


def run_folder(folder: Path, depth: int = 2) -> str:
    net = DiTConfig((8, 8), 1, 4, 8, depth, 2, num_classes=10, remat="none", scan=False)
    config = RunConfig("toy", models={"net": Model(Denoiser(net, Linear()))}, sampler=Sampler(Euler(), steps=5))
    write_json(folder / "config.json", to_json(config))
    save(folder / "artifacts" / "net.safetensors", Network(net).init(jax.random.key(0)))
    return str(folder)


@pytest.mark.slow
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


def test_what_does_not_suit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = run_folder(tmp_path / "run", depth=3), tmp_path / "grid.json"
    out = ["--out", str(tmp_path / "x.json")]
    write_grid(file, Searched((1.0, 0.5, 0.0), Linear(), (("blocks", ((1.0, 1.0), (1.0, 0.0))),)), {})
    images = ["--data", "digits:train", "--heldout", "digits:test"]
    for args, message in (
        (
            ["sample", run, "--grid", str(file)],
            "is for another model: 'blocks' has 2 entries a step, this network 3; search on this model",
        ),
        (["sample", run, "--grid", f"{run}/config.json"], "holds no grid; give a file that gen search wrote"),
        (["search", run, *out, "--what", "skips"], "has no skips to tune; give a run of a U-Net"),
        (["search", run, *out, "--scale", "lap"], "unknown search 'lap'"),
        (["features", run, *images, "--taps", "block_9"], "no feature 'block_9'; did you mean 'block_2'"),
        (["features", run, *images, "--times", "early"], "--times 'early' is not like 0.1,0.25"),
    ):
        assert cli.main(args) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    write_grid(file, Searched((1.0, 0.0), Linear(), (("skips", ((1.0,),)),)), {})
    assert cli.main(["sample", run, "--grid", str(file)]) == 2
    assert "its network knows no layers called 'skips'; known: " in capsys.readouterr().err
