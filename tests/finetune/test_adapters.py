"""DiffFit and LoRA: what they train, that they begin as no change, merge into plain weights and stay small on disk."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gen
from gen.arrays import flatten
from gen.data.sources import Digits
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.backbones.lightningdit import LightningDiTConfig
from gen.diffusion.denoiser import Denoiser
from gen.diffusion.process import Linear
from gen.errors import GenError
from gen.finetune.adapt import AdaptTask
from gen.finetune.adapters import Adapted
from gen.finetune.difffit import EVERY_LAYER, DiffFit
from gen.finetune.lora import LoRA
from gen.nn.network import Network, count, param_shapes
from gen.sampling.generator import Sampler
from gen.sampling.solvers import Euler
from gen.training.ema import Constant
from gen.training.engine import train
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

NET = DiTConfig((8, 8), 1, 4, 16, 2, 2, num_classes=4, remat="none", scan=False)
LIGHTNING = LightningDiTConfig((4, 4), 2, 2, 16, 2, 2, num_classes=3, qk_norm=True)
PARAMS = jax.jit(Network(NET).init)(jax.random.key(0))


def test_paper_counts() -> None:
    """DiT-XL/2 for 101 classes: 0.61M for BitFit, 32,256 for a factor on one branch of all blocks."""
    from gen.diffusion.backbones.dit import dit

    network = dit("XL/2", num_classes=101)
    bitfit = count(param_shapes(Adapted(network, DiffFit(scales=()))))
    assert bitfit == 489_632 + 117_504
    assert count(param_shapes(Adapted(network, DiffFit()))) == bitfit + 2 * 32_256
    assert count(param_shapes(Adapted(network, DiffFit(scales=EVERY_LAYER, blocks=14)))) == bitfit + 32_256 // 2 * 9


def test_norms_are_trained_where_there_are() -> None:
    paths = set(flatten(param_shapes(Adapted(LIGHTNING, DiffFit()))))
    assert "value/blocks/attn/q_norm/scale" in paths
    assert "value/norm_final/scale" in paths
    assert {p for p in paths if p.startswith("extra/")} == {
        "extra/blocks/attn/proj/gamma",
        "extra/blocks/mlp/w3/gamma",
    }


@pytest.mark.parametrize("adapter", [DiffFit(), DiffFit(blocks=1), LoRA(rank=2)], ids=["difffit", "first", "lora"])
def test_begins_as_no_change_and_merges_by_hand(adapter) -> None:
    own = Adapted(NET, adapter).start(jax.random.key(1), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, adapter.merge(PARAMS, own), dict(PARAMS))
    own = jax.tree.map(lambda a: a + 0.5, own)
    merged, flat = flatten(adapter.merge(PARAMS, own)), flatten(own)
    layer = "blocks/attn/proj"
    before = np.asarray(PARAMS["blocks"]["attn"]["proj"]["kernel"])
    if isinstance(adapter, LoRA):
        expected = before + 4.0 * np.einsum("lir,lro->lio", flat[f"extra/{layer}/down"], flat[f"extra/{layer}/up"])
    else:
        factor = np.ones((2, 16), np.float32)
        factor[: adapter.blocks] = flat[f"extra/{layer}/gamma"]
        expected = before * factor[:, None]
    np.testing.assert_allclose(merged[f"{layer}/kernel"], expected, rtol=1e-5, atol=1e-6)


def test_new_classes_keep_the_null_label() -> None:
    wanted = dataclasses.replace(NET, num_classes=6)
    own = Adapted(wanted, DiffFit()).start(jax.random.key(1), PARAMS)
    table = own["value"]["label"]["embedding"]
    assert table.shape == (7, 16)
    np.testing.assert_array_equal(table[-1], PARAMS["label"]["embedding"][-1])


def test_bad_input_is_refused() -> None:
    with pytest.raises(GenError, match=r"no layer of the network fits '\*attn/out'; there are .*attn/proj"):
        param_shapes(Adapted(NET, DiffFit(scales=("*attn/out",))))
    with pytest.raises(GenError, match="no parameter of the network fits 'gamma'"):
        param_shapes(Adapted(NET, DiffFit(train=("gamma",))))
    with pytest.raises(GenError, match="the network has 2; give fewer"):
        param_shapes(Adapted(NET, DiffFit(blocks=3)))
    with pytest.raises(GenError, match="give a lower rank"):
        param_shapes(Adapted(NET, LoRA(rank=20)))
    with pytest.raises(GenError, match="first 0 blocks"):
        DiffFit(blocks=0)
    with pytest.raises(GenError, match="rank 0 on 2 layers"):
        LoRA(rank=0)
    with pytest.raises(GenError, match="is not trained; add it to the adapter's 'train'"):
        Adapted(dataclasses.replace(NET, num_classes=6), DiffFit(train=("*/bias",))).start(jax.random.key(1), PARAMS)
    task = AdaptTask(Denoiser(NET, Linear()))
    with pytest.raises(GenError, match="needs the frozen role 'teacher'"):
        task.init(jax.random.key(0), {}, None)
    with pytest.raises(GenError, match="leave out --from"):
        task.init(jax.random.key(0), {"teacher": PARAMS, "start": PARAMS}, None)


def test_a_run_is_small_and_opens_as_a_plain_network(tmp_path: Path) -> None:
    denoiser = Denoiser(dataclasses.replace(NET, num_classes=10), Linear())
    task = AdaptTask(denoiser, adapter=DiffFit(), optim=OptimConfig(1e-2), emas=(Constant(0.9),))
    config = RunConfig(
        "adapted",
        (Stage("adapt", task, 4, 8, Digits("train")),),
        {"teacher": "t"},
        Sampler(Euler(), steps=2),
        engine=EngineConfig(checkpoint_every=100, quiet=True),
    )
    state = train(config, tmp_path / "run", frozen={"teacher": PARAMS}, artifacts={"teacher": PARAMS})
    assert count(state.params) < 0.35 * count(PARAMS)  # of so narrow a network; matrices are in none of it
    found = gen.load(tmp_path / "run")
    assert set(found.params) == {"net"}
    own = state.ema["net"]
    merged = task.adapter.merge(PARAMS, own)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), dict(found.params["net"]), merged)
    matrix = found.params["net"]["blocks"]["mlp"]["fc1"]["kernel"]
    np.testing.assert_array_equal(matrix, PARAMS["blocks"]["mlp"]["fc1"]["kernel"])
    assert float(jnp.abs(found.params["net"]["final"]["bias"]).max()) > 0.0
    assert found.sample(range(2)).shape == (2, 8, 8, 1)
