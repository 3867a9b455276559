import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.objectives import Draws
from gen.diffusion.process import Linear
from gen.diffusion.train import DenoiserTask
from gen.errors import GenError
from gen.kinds import KINDS
from gen.sampling.generator import DiffusionGenerator, Sampler
from gen.training.ema import Constant, PowerFunction
from gen.training.optim import OptimConfig
from tests.training.conformance import check_devices, check_task
from tests.training.keys import Uses

DENOISER = Denoiser(
    DiTConfig((4,), 3, 1, 16, 1, 2, num_classes=4, remat="none", scan=False), Linear(), Predict(scale=10.0)
)
TASK = DenoiserTask(
    denoiser=DENOISER,
    optim=OptimConfig(lr=3e-3, clip=1.0),
    emas=(Constant(0.9), PowerFunction(0.1)),
    dropout=0.2,
)


@dataclasses.dataclass(frozen=True)
class Latents:
    """Latents that a label shifts."""

    def batches(
        self, *, batch: int, seed: int, start: int, process: int = 0, processes: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        while True:
            yield {k: v[process::processes] for k, v in rows(batch, seed + start).items()}
            start += 1

    def identity(self) -> str:
        return "latents"


def rows(count: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, count).astype(np.int32)
    latent = (label - 1.5)[:, None, None] + 0.1 * rng.normal(size=(count, 4, 3))
    return {"latent": latent.astype(np.float32), "label": label}


def build() -> tuple[Any, Any, Any]:
    KINDS["test-data"] = {"test-latents": f"{__name__}:Latents"}
    # A large eps: Adam would blow up the rounding of gradients that are zero in exact arithmetic (the keys' bias).
    task = dataclasses.replace(TASK, optim=dataclasses.replace(TASK.optim, eps=1e-2))
    return task, Latents(), {}


def start(task: DenoiserTask) -> Any:
    return jax.jit(lambda: task.init(jax.random.key(0), {}, None))()


@pytest.fixture
def _kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "test-data", {"test-latents": f"{__name__}:Latents"})


@pytest.mark.slow
@pytest.mark.usefixtures("_kinds")
def test_conformance(tmp_path: Path) -> None:
    check_task(TASK, Latents(), {}, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("_kinds")
def test_devices(tmp_path: Path) -> None:
    check_devices(f"{__name__}:build", tmp_path)


def test_loss_drops_labels_and_averages_the_objective() -> None:
    state = start(TASK)
    params = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(p.size), p.shape), state.params["net"])
    batch = rows(6, 0)
    x, cond = jnp.asarray(batch["latent"]), {"label": jnp.asarray(batch["label"])}
    draws = Draws(jnp.linspace(0.1, 0.9, 6), jax.random.normal(jax.random.key(1), x.shape))
    dropped = jnp.asarray([True, False] * 3)
    loss, aux = jax.jit(TASK.loss)(params, x, cond, draws, dropped)
    labels = jnp.where(dropped, 4, cond["label"])
    t = draws.t[:, None, None]
    velocity = jax.jit(lambda *a: DENOISER(*a).velocity)(
        params, (1 - t) * x + t * draws.eps, draws.t, {"label": labels}
    )
    np.testing.assert_allclose(loss, np.square(velocity - (draws.eps - x)).mean(), rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["velocity_mse"], loss, rtol=1e-6)
    unconditional = dataclasses.replace(TASK, dropout=0.0)
    assert not np.isclose(
        float(jax.jit(unconditional.loss)(params, x, cond, draws, dropped)[0]), float(loss), rtol=1e-5
    )


def test_training_reaches_every_parameter_and_lowers_the_loss() -> None:
    state = start(TASK)
    program = jax.jit(TASK.programs[TASK.select(0)])
    first, losses = state.params["net"], []
    for step in range(80):
        state, metrics = program(state, {}, rows(32, step), TASK.inputs(step, 80), jax.random.key(step))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])
    for (path, new), old in zip(
        jax.tree_util.tree_leaves_with_path(state.params["net"]), jax.tree.leaves(first), strict=True
    ):
        assert np.abs(new - old).max() > 0, f"{jax.tree_util.keystr(path)} never moved"
    assert set(state.ema) == {"net", "net@1"}
    np.testing.assert_array_equal(TASK.export(state)["net"]["final"]["kernel"], state.ema["net"]["final"]["kernel"])


def test_pixel_models_train_on_uint8_images() -> None:
    denoiser = dataclasses.replace(
        DENOISER, network=dataclasses.replace(DENOISER.network, size=(8, 8), channels=1, patch=4)
    )
    task = DenoiserTask(denoiser=denoiser, optim=OptimConfig(lr=0.0))
    state = start(task)
    label = np.zeros(64, np.int32)
    loss = {}
    program = jax.jit(task.update)
    for value in (0, 255):
        batch = {"image": np.full((64, 8, 8, 1), value, np.uint8), "label": label}
        loss[value] = float(program(state, {}, batch, task.inputs(0, 1), jax.random.key(0))[1]["loss"])
    # the network's output is 0 at first: the loss is mean (eps - x)^2 = 1 + 1 + 2 mean(eps x) with x = -1 or 1
    np.testing.assert_allclose(loss[0] + loss[255], 4.0, rtol=0.05)


def test_preview_samples_the_averaged_network() -> None:
    state = start(TASK)
    generator = DiffusionGenerator(DENOISER, Sampler(steps=2))
    preview = jax.jit(lambda state, key: TASK.preview(state, {}, key, generator))
    images = preview(state, jax.random.key(0))["samples"]
    assert images.shape == (8, 4, 3)
    assert np.abs(images).max() <= 1
    np.testing.assert_array_equal(images, preview(state, jax.random.key(0))["samples"])
    raw = preview(dataclasses.replace(state, params=jax.tree.map(jnp.zeros_like, state.params)), jax.random.key(0))
    np.testing.assert_array_equal(raw["samples"], images)
    assert TASK.preview(state, {}, jax.random.key(0), None) == {}


def row(**arrays: Any) -> dict[str, np.ndarray]:
    return rows(3, 0) | {name: np.asarray(value) for name, value in arrays.items()}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"label": np.arange(3)}, r"the data hold label; expected latents or images \(4, 3\)"),
        (row(latent=np.zeros((3, 4, 5))), r"are latents \(4, 5\), and the model takes \(4, 3\); give data of that"),
        (
            {"image": np.zeros((3, 8, 8, 3), np.uint8), "label": np.arange(3)},
            r"are images \(8, 8, 3\), and the model takes \(4, 3\); .*\(gen encode TOKENIZER --data IMAGES",
        ),
        ({"latent": rows(3, 0)["latent"]}, r"have no labels, and the model has 4 classes; .*network\.num_classes 0"),
        (row(label=[0, 4, 1]), r"hold the label 4, and the model has the classes 0 to 3; give the network more"),
        (row(label=[0, 1, -1]), "hold the label -1, and the model"),
        (row(label=np.zeros((3, 4))), r"the data's 'label' is \(4,\); the model takes \(\)"),
    ],
)
def test_data_that_cannot_train_the_model_are_refused(data: Any, text: str) -> None:
    TASK.check(rows(3, 0))
    with pytest.raises(GenError, match=text):
        TASK.check(data)


def test_labels_of_a_model_without_classes_are_left_alone() -> None:
    network = dataclasses.replace(DENOISER.network, num_classes=0)
    task = DenoiserTask(denoiser=dataclasses.replace(DENOISER, network=network))
    task.check(rows(3, 0))
    task.check({"latent": rows(3, 0)["latent"]})
    _, metrics = jax.jit(task.update)(start(task), {}, rows(8, 0), task.inputs(0, 1), jax.random.key(0))
    assert np.isfinite(metrics["loss"])


def test_bad_dropout_is_refused() -> None:
    with pytest.raises(GenError, match="label dropout"):
        dataclasses.replace(TASK, dropout=1.0)


def test_augmentation_and_label_dropout_draw_from_different_keys() -> None:
    def augment(key: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x, jax.random.uniform(key, x.shape[:1])

    task, uses = dataclasses.replace(TASK, augment=augment), Uses()
    jax.block_until_ready(jax.jit(task.update)(start(task), {}, rows(8, 0), task.inputs(0, 1), uses.key(0)))
    assert uses.repeated() == 0
