import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.data.augment import RandomAffine
from gen.data.sources import Digits, digits
from gen.errors import GenError
from gen.tokenizers.base import Gaussian
from gen.tokenizers.titok import TiTokConfig, Tower
from gen.tokenizers.train import Rows, TokenizerTask
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from tests.training.conformance import check_devices, check_task

TOKENIZER = TiTokConfig((8, 8, 1), 4, 4, 4, Tower(16, 1, 4), Tower(16, 1, 4), scan=False)
TASK = TokenizerTask(
    tokenizer=TOKENIZER,
    optim=OptimConfig(lr=5e-3, clip=1.0),
    emas=(Constant(0.9),),
    kl=1e-4,
    l1=0.01,
    augment=RandomAffine(),
    augmented=0.5,
)


def build() -> tuple[Any, Any, Any]:
    # A large eps: Adam would blow up the rounding of gradients that are zero in exact arithmetic (the keys' bias).
    return dataclasses.replace(TASK, optim=dataclasses.replace(TASK.optim, eps=1e-2)), Digits(), {}


def start(task: TokenizerTask) -> Any:
    return jax.jit(lambda: task.init(jax.random.key(0), {}, None))()


@pytest.mark.slow
def test_conformance(tmp_path: Path) -> None:
    check_task(TASK, Digits(), {}, tmp_path)


@pytest.mark.slow
def test_devices(tmp_path: Path) -> None:
    check_devices(f"{__name__}:build", tmp_path)


def test_loss_is_its_formula() -> None:
    params = start(TASK).params["tokenizer"]
    images = jax.random.uniform(jax.random.key(1), (4, 8, 8, 1), minval=-1.0, maxval=1.0)
    keys = jax.random.split(jax.random.key(2), 4)
    loss, aux = jax.jit(lambda params, rows: TASK.loss(params, rows, {}))(params, Rows(images, keys))
    posterior = jax.jit(TOKENIZER.encode)(params, images)
    decoded = np.asarray(jax.jit(TOKENIZER.decode)(params, posterior.sample(keys)))
    error = (decoded + 1) / 2 - (np.asarray(images) + 1) / 2
    kl = float(posterior.kl().mean())
    np.testing.assert_allclose(loss, (error**2).mean() + 0.01 * np.abs(error).mean() + 1e-4 * kl, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["psnr"], -10 * np.log10((error**2).mean()), rtol=1e-5)


def test_a_few_steps_help_and_previews_show_the_batch() -> None:
    batch = {"image": digits("train").gather(np.arange(32))["image"]}
    task = dataclasses.replace(TASK, augment=None)
    state = start(task)
    program = jax.jit(task.programs["tokenizer"])
    mse = []
    for step in range(60):
        state, metrics = program(state, {}, batch, task.inputs(step, 60), jax.random.key(step))
        mse.append(float(metrics["mse"]))
    assert np.mean(mse[-5:]) < 0.6 * mse[0]
    preview = jax.jit(lambda state: task.preview(state, {}, jax.random.key(0), None))(state)
    np.testing.assert_allclose(preview["images"], batch["image"][:8] / 127.5 - 1, atol=1e-6)
    assert preview["reconstructions"].shape == (8, 8, 8, 1)
    np.testing.assert_array_equal(task.export(state)["tokenizer"]["mask_token"], state.ema["tokenizer"]["mask_token"])


def test_only_the_chosen_share_is_augmented() -> None:
    """White digits, a blackening augmentation, a tokenizer that paints white: the error tells the share."""
    task = dataclasses.replace(TASK, tokenizer=WHITE, kl=0.0, l1=0.0, augment=Black(), emas=())
    state = task.init(jax.random.key(0), {}, start(TASK))
    batch = {"image": np.full((512, 8, 8, 1), 255, np.uint8)}
    for share in (0.0, 0.25, 1.0):
        program = dataclasses.replace(task, augmented=share).update
        mse = float(jax.jit(program)(state, {}, batch, task.inputs(0, 1), jax.random.key(0))[1]["mse"])
        assert abs(mse - share) < (0.08 if 0 < share < 1 else 1e-6)


@dataclasses.dataclass(frozen=True)
class White(TiTokConfig):
    """A posterior at 0 and white pictures, whatever the network says."""

    def encode(self, params: Any, images: jax.Array, *, cond: Any = None, keys: Any = None) -> Gaussian:
        return Gaussian(jnp.zeros((images.shape[0], 4, 4)), jnp.zeros((images.shape[0], 4, 4)))

    def decode(
        self, params: Any, latents: jax.Array, *, cond: Any = None, keys: Any = None, options: Any = None
    ) -> jax.Array:
        return jnp.ones((latents.shape[0], 8, 8, 1))


WHITE = White(**{field.name: getattr(TOKENIZER, field.name) for field in dataclasses.fields(TOKENIZER)})


@dataclasses.dataclass(frozen=True)
class Black:
    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        return jnp.full_like(images, -1.0)


def test_second_stage_goes_on_from_the_first() -> None:
    first = start(TASK)
    second = TASK.init(jax.random.key(1), {}, first)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert first.params["tokenizer"]["mask_token"] is not second.params["tokenizer"]["mask_token"]


def test_bad_weights_are_refused() -> None:
    with pytest.raises(GenError, match="fraction in"):
        dataclasses.replace(TASK, augmented=1.5)
