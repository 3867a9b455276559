"""Heads on diffusion features: pooling, fitting, the zero-shot classifier, the table and its command."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen import cli
from gen.arrays import save
from gen.config import to_json
from gen.data.sources import digits
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.denoiser import Denoiser
from gen.diffusion.process import Linear
from gen.errors import GenError
from gen.experiments import features as experiment
from gen.files import write_json
from gen.finetune.probe_task import ProbeTask, attention_head, feature_shapes
from gen.finetune.probes import Fit, LinearHead, accuracy, fit_head, flattened, pooled
from gen.nn.network import Network
from gen.runs import Loaded, load
from gen.sampling.generator import Sampler
from gen.training.run import RunConfig
from gen.training.task import Model

NET = DiTConfig((8, 8), 1, 4, 16, 2, 2, num_classes=10, remat="none", scan=False)
DENOISER = Denoiser(NET, Linear())
PARAMS = jax.jit(Network(NET).init)(jax.random.key(0))


def test_pooling_averages_cells_that_may_overlap() -> None:
    x = jnp.arange(5.0)[None, :, None]
    np.testing.assert_allclose(pooled(x, 2)[0, :, 0], [1.0, 3.0])  # places 0 to 2 and 2 to 4
    np.testing.assert_array_equal(pooled(x, 7), x)
    x = jnp.arange(24.0).reshape(1, 2, 3, 4)
    np.testing.assert_array_equal(flattened(x)[0, :6], x[0, :, :, 0].reshape(-1))


def test_a_head_finds_what_is_linear() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    x = rng.normal(size=(300, 4, 4, 2)).astype(np.float32) * 0.3
    x[..., 0] += labels[:, None, None]
    head = LinearHead((4, 4, 2), 3)
    params = fit_head(head, {"x": jnp.asarray(x)}, labels, Fit(steps=300, batch=64, rate=1e-1, decay=0.0))
    assert accuracy(head, params, {"x": jnp.asarray(x)}, labels) > 0.95


def run_folder(folder: Path) -> Path:
    """A run of random weights, as converted ones are stored."""
    config = RunConfig("toy", models={"net": Model(DENOISER)}, sampler=Sampler(steps=2))
    write_json(folder / "config.json", to_json(config))
    save(folder / "artifacts" / "net.safetensors", PARAMS)
    return folder


def test_the_table_and_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(experiment, "table", lambda *a, **k: experiment_table(*a, **k | {"fit": Fit(steps=60)}))
    run = str(run_folder(tmp_path / "run"))
    command = ["features", run, "--data", "digits:train", "--heldout", "digits:test", "--times", "0.1"]
    assert cli.main([*command, "--taps", "block_0"]) == 0
    lines = {line.split()[0]: float(line.split()[1]) for line in capsys.readouterr().out.splitlines()[1:]}
    assert set(lines) == {"0.1/block_0", "pixels", "zero-shot"}
    assert lines["pixels"] > 0.5
    assert len(list((tmp_path / "run" / "features").glob("features-*.npz"))) == 2
    assert cli.main([*command, "--taps", "block_7"]) == 2
    assert "no feature 'block_7'" in capsys.readouterr().err
    assert cli.main([*command, "--times", "soon"]) == 2
    assert "is not like 0.1,0.25" in capsys.readouterr().err


experiment_table = experiment.table


def test_zero_shot_classifier_knows_a_class_that_is_told_apart() -> None:
    """A network whose output is its label's: the class of the least loss is the right one."""
    from gen.finetune.probes import class_losses

    tiny = dataclasses.replace(DENOISER, network=dataclasses.replace(NET, depth=1))
    params = Network(tiny.network).init(jax.random.key(0))
    x = jnp.asarray(digits("test").arrays["image"][:4], jnp.float32) / 127.5 - 1.0
    draws = tiny.objective.draw(jax.random.key(1), tiny.process, x)
    losses = class_losses(tiny, params, x, draws, 10)
    assert losses.shape == (4, 10)
    # at initialisation the output is 0 whatever the label: equal losses, each that of the plain objective
    expected = jnp.square(draws.eps - x).mean((1, 2, 3))
    np.testing.assert_allclose(losses, np.repeat(np.asarray(expected)[:, None], 10, 1), rtol=1e-5)


def test_presets_and_refusals(tmp_path: Path) -> None:
    loaded = load(run_folder(tmp_path / "run"))
    assert isinstance(loaded, Loaded)
    recipe = experiment.features(loaded, "random")
    task = recipe.config.stages[0].task
    assert task.taps == ("block_0",)
    assert task.head.levels == 2
    assert feature_shapes(DENOISER, ("block_1",)) == {"block_1": (4, 16)}
    with pytest.raises(GenError, match="no feature 'middle'"):
        feature_shapes(DENOISER, ("middle",))
    with pytest.raises(GenError, match="takes one feature at one time"):
        ProbeTask(teacher=DENOISER, head=LinearHead((4, 16), 10), taps=("block_0", "block_1"), times=(0.1,))
    head = attention_head(DENOISER, ("block_0",), 1, 10, width=8, heads=2)
    with pytest.raises(GenError, match="of other features or levels"):
        ProbeTask(teacher=DENOISER, head=head, taps=("block_1",), times=(0.1,))
    with pytest.raises(GenError, match="no feature or at no time"):
        ProbeTask(teacher=DENOISER, head=LinearHead((4, 16), 10), taps=(), times=(0.1,))
    with pytest.raises(GenError, match="trains nothing"):
        Fit(steps=0)
    with pytest.raises(GenError, match="expected one for each"):
        fit_head(LinearHead((4,), 2), {"x": jnp.zeros((3, 4))}, np.asarray([0, 1, 2]))
    with pytest.raises(GenError, match="takes \\(8, 8, 1\\); resize"):
        experiment.inputs(loaded, np.zeros((2, 4, 4, 1), np.uint8))
