"""The adversarial method: its loss term by term, its schedule, what it leaves alone."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.arrays import flatten
from gen.data.sources import Digits, digits
from gen.errors import GenError
from gen.nn.adversarial import AdaptiveWeight
from gen.nn.discriminators import PatchGAN
from gen.nn.network import Network
from gen.nn.token_discriminator import TokenDiscriminator
from gen.tokenizers.adversarial import AdversarialTask, LeCAM
from gen.tokenizers.train import Rows, TokenizerTask
from gen.training.optim import OptimConfig
from tests.conformance import examples
from tests.conformance.tokenizers import Codebook
from tests.tokenizers.test_train import TOKENIZER
from tests.training.conformance import check_devices, check_task

OPTIM = OptimConfig(lr=1e-3, eps=1e-2, clip=1.0)
TASK = AdversarialTask(
    tokenizer=TOKENIZER,
    discriminator=PatchGAN(channels=1, width=4, layers=1),
    optim=OPTIM,
    discriminator_optim=OPTIM,
    kl=1e-4,
    adaptive=AdaptiveWeight(),
    gan_weight=0.5,
    gan_start=2,
    gan_delay=1,
    gan_ramp=4,
    ratio=2,
    # heavy: the hinge's gradients of the last bias cancel, and a light one would leave it a sum of mostly rounding
    lecam=LeCAM(weight=1.0),
    r1=0.1,
)
FULL = dataclasses.replace(TASK, signed=True, summed=True, l1=1.0, l2=0.0)


def build() -> tuple[Any, Any, Any]:
    return TASK, Digits(), {}


@pytest.fixture
def _kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(examples.KINDS, "conformance", examples.KINDS_HERE)


@pytest.mark.slow
def test_conformance(tmp_path: Path) -> None:
    check_task(TASK, Digits(), {}, tmp_path, steps=14)


@pytest.mark.slow
@pytest.mark.usefixtures("_kinds")
def test_conformance_of_ids(tmp_path: Path) -> None:
    check_task(dataclasses.replace(TASK, tokenizer=Codebook(), gan_start=0, ratio=1), Digits(), {}, tmp_path)


@pytest.mark.slow
def test_devices(tmp_path: Path) -> None:
    check_devices(f"{__name__}:build", tmp_path, steps=6)


def _rows(count: int = 4) -> Rows:
    images = jax.random.uniform(jax.random.key(1), (count, 8, 8, 1), minval=-1.0, maxval=1.0)
    return Rows(images, jax.random.split(jax.random.key(2), count))


def test_loss_is_its_formula_and_its_weight_the_ratio_at_the_last_layer() -> None:
    init = jax.jit(lambda: [Network(net).init(jax.random.key(1)) for net in (TOKENIZER, FULL.discriminator)])
    params, judge = init()
    rows, share = _rows(), 0.25

    def terms(params: Any) -> tuple[Any, Any, Any]:
        encoded, _, y = FULL.reconstruct(params, rows)
        nll = jnp.abs(y - rows.images).sum() / len(y)
        return nll, -Network(FULL.discriminator)(judge, y)[0].mean(), encoded.kl().mean()

    def found(params: Any) -> Any:
        (nll, gan, kl), pull = jax.vjp(terms, params)
        gradients = [pull(tuple(jnp.float32(i == j) for j in range(3)))[0] for i in range(3)]
        norms = [jnp.linalg.norm(flatten(g)[TOKENIZER.last_layer]) for g in gradients]
        weight = 0.5 * norms[0] / (norms[1] + 1e-4)
        expected = jax.tree.map(lambda a, b, c: a + share * weight * b + 1e-4 * c, *gradients)
        return weight, nll + share * weight * gan + 1e-4 * kl, expected

    weight, value, expected = jax.jit(found)(params)
    (total, aux), gradient = jax.jit(
        jax.value_and_grad(lambda p: FULL.adversarial_loss(p, judge, rows, {}, share), has_aux=True)
    )(params)
    np.testing.assert_allclose(aux.metrics["gan_weight"], share * weight, rtol=1e-3)
    np.testing.assert_allclose(total, value, rtol=1e-4)
    for path, value in flatten(expected).items():
        np.testing.assert_allclose(flatten(gradient)[path], value, rtol=2e-3, atol=1e-3 * float(jnp.abs(value).max()))


def test_steps_and_updates_follow_start_ratio_and_ramp() -> None:
    order = [TASK.select(step) for step in range(8)]
    assert order == ["tokenizer"] * 2 + ["adversarial", "discriminator"] * 3
    for n in range(9):
        assert TASK.updates("tokenizer", n) == sum(name != "discriminator" for name in order[:n])
        assert TASK.updates("discriminator", n) == sum(name != "tokenizer" for name in order[:n])
    shares = [float(TASK.schedules(step, 9)["gan"]) for step in range(9)]
    assert shares == [0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert set(dataclasses.replace(TASK, gan_start=0, ratio=1).programs) == {"adversarial"}


@pytest.mark.usefixtures("_kinds")
def test_a_decoder_is_tuned_on_a_fixed_encoder_and_its_statistics() -> None:
    """Two stages: the second trains one parameter on ids whose averages stay."""
    first = TokenizerTask(Codebook(), optim=OPTIM)
    batch = {"image": digits("train").gather(np.arange(8))["image"]}
    state = jax.jit(first.init)(jax.random.key(0), {}, None)
    moved, metrics = jax.jit(first.update)(state, {}, batch, first.inputs(0, 1), jax.random.key(1))
    assert (moved.params["tokenizer"]["used"] != state.params["tokenizer"]["used"]).any()
    assert 0 < float(metrics["codebook_usage"]) <= 1
    assert "commitment" in metrics
    second = dataclasses.replace(first, train=("scale",))
    start = jax.jit(second.init)(jax.random.key(1), {}, moved)
    tuned, _ = jax.jit(second.update)(start, {}, batch, second.inputs(0, 1), jax.random.key(1))
    np.testing.assert_array_equal(tuned.params["tokenizer"]["used"], moved.params["tokenizer"]["used"])
    assert float(tuned.params["tokenizer"]["scale"]) != float(moved.params["tokenizer"]["scale"])


def test_a_second_stage_takes_over_both_parts() -> None:
    plain = TokenizerTask(TOKENIZER, optim=OPTIM)
    first = jax.jit(plain.init)(jax.random.key(0), {}, None)
    second = jax.jit(TASK.init)(jax.random.key(1), {}, first)
    third = jax.jit(TASK.init)(jax.random.key(2), {}, second)
    jax.tree.map(np.testing.assert_array_equal, second.params["tokenizer"], first.params["tokenizer"])
    jax.tree.map(np.testing.assert_array_equal, third.params, second.params)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A frozen network's tokens of an image."""

    name = "eyes"

    def __call__(self, params: Any, images: jax.Array) -> list[jax.Array]:
        return [images.reshape(len(images), 8, 8) * params]


def test_a_discriminator_may_look_through_a_frozen_network() -> None:
    judge = TokenDiscriminator(width=8, heads=1, kernel=3)
    task = AdversarialTask(tokenizer=Codebook(), discriminator=judge, seen=Tokens(), optim=OPTIM)
    with pytest.raises(GenError, match="frozen role 'eyes'"):
        task.init(jax.random.key(0), {}, None)
    frozen = {"eyes": jnp.float32(2.0)}
    state = jax.jit(task.init)(jax.random.key(0), frozen, None)
    batch = {"image": digits("train").gather(np.arange(4))["image"]}
    new, metrics = jax.jit(task.update_both)(state, frozen, batch, task.inputs(0, 1), jax.random.key(1))
    assert np.isfinite(list(map(float, metrics.values()))).all()
    before, after = (flatten(s.params["discriminator"]) for s in (state, new))
    assert all((np.asarray(before[path]) != np.asarray(after[path])).any() for path in before if "kernel" in path)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(GenError, match="known: hinge"):
        dataclasses.replace(TASK, gan="wasserstein")
    with pytest.raises(GenError, match="ratio at least 1"):
        dataclasses.replace(TASK, ratio=0)
