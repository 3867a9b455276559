"""The AsCAN-style backbone: letters decide the blocks, it starts from zero, and tells what it cannot do."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.config import from_json, to_json
from gen.diffusion.backbones.ascan import AsCANConfig, ascan
from gen.errors import GenError
from gen.nn.network import Network, count, param_shapes

TINY = AsCANConfig(
    (8, 8), 2, width=8, stages=("CT", "MT"), middle="T", head_width=4, groups=4, num_classes=3, remat="none", scan=False
)


def noisy(config: AsCANConfig) -> Any:
    return jax.tree.map(lambda s: 0.2 * jax.random.normal(jax.random.key(s.size), s.shape), param_shapes(config))


def test_every_block_and_input_matters() -> None:
    net, x = Network(TINY), jax.random.normal(jax.random.key(0), (2, 8, 8, 2))
    names = ("down_0", "down_1", "middle", "up_1", "up_0")

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # runs once or twice
    def run(params: Any, x: jax.Array, t: jax.Array, label: jax.Array) -> Any:
        def loss(p: Any) -> Any:
            out, features = net(p, x, (t,), {"label": label}, taps=names)
            return jnp.square(out).mean(), (out, features)

        (_, (out, features)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        stopped, only = net(params, x, (t,), {"label": label}, taps=("down_1",), stop=True)
        return out, features, grads, stopped, only

    t, label = jnp.array([0.1, 0.9]), jnp.array([0, 2])
    params = noisy(TINY)
    out, features, grads, stopped, only = run(params, x, t, label)
    assert out.shape == (2, 8, 8, 2)
    assert {name: value.shape[1:] for name, value in features.items()} == {
        name: (16, 16) if name in ("down_1", "middle", "up_1") else (64, 8) for name in names
    }
    assert set(only) == {"down_1"}
    np.testing.assert_allclose(stopped, features["down_1"], atol=1e-5)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    for changed in ((x + 0.1, t, label), (x, t + 0.5, label), (x, t, label - 2)):
        assert float(jnp.abs(run(params, *changed)[0] - out).max()) > 1e-4

    gates = {"final": jax.tree.map(jnp.zeros_like, params["final"])}
    assert not run(params | gates, x, t, label)[0].any()


def test_letters_decide_the_blocks() -> None:
    def size(**changes: Any) -> int:
        return count(param_shapes(dataclasses.replace(TINY, **changes)))

    base = size(stages=("T", "T"))
    assert size(stages=("C", "T")) != base != size(stages=("M", "T"))
    assert size(stages=("TT", "T")) > base
    params = param_shapes(dataclasses.replace(TINY, stages=("CCT", "T")))
    assert {name for name in params if name.startswith(("down_0", "up_0"))} == {
        *(f"{name}_{what}" for name in ("down_0", "up_0") for what in ("0", "1", "cond"))
    }
    assert params["down_0_0"]["project"]["kernel"].shape[0] == 2
    assert params["up_0_1"]["project"]["kernel"].shape[0] == 2
    assert size(times=2) > size()
    assert size(num_classes=0) < size()


@pytest.mark.parametrize(("name", "millions"), [("S", 45.1), ("B", 124.7), ("L", 318.4)])
def test_sizes(name: str, millions: float) -> None:
    assert round(count(param_shapes(ascan(name))) / 1e6, 1) == millions


def test_configuration_and_refusals() -> None:
    assert from_json(to_json(TINY), AsCANConfig) == TINY
    for changes, message in (
        ({"size": (9, 8)}, "multiple of 2"),
        ({"stages": ("CX",)}, "letters C, T and M"),
        ({"middle": ""}, "at least one"),
        ({"groups": 5}, "groups 5"),
    ):
        with pytest.raises(GenError, match=message):
            dataclasses.replace(TINY, **changes)
    with pytest.raises(GenError, match="unknown AsCAN size 'XL'"):
        ascan("XL")
    net, x, t, cond = Network(TINY), jnp.zeros((1, 8, 8, 2)), (jnp.zeros(1),), {"label": jnp.zeros(1, int)}
    for arguments, options, message in (
        ((x[:, :4], t, cond), {}, r"input is \(4, 8, 2\)"),
        ((x, (*t, *t), cond), {}, "given 2 times"),
        ((x, t, cond), {"controls": {"skips": x}}, "no control 'skips'"),
        ((x, t, cond), {"taps": ("down_7",)}, "no feature 'down_7'"),
    ):
        with pytest.raises(GenError, match=message):
            jax.eval_shape(lambda p, a=arguments, o=options: net(p, *a, **o), param_shapes(TINY))
    free = Network(dataclasses.replace(TINY, num_classes=0))
    with pytest.raises(GenError, match="unconditional"):
        jax.eval_shape(lambda p: free.apply(p, cond, method="null"), param_shapes(free.config))
    null = net.apply(noisy(TINY), cond, method="null")
    np.testing.assert_array_equal(null["label"], [3])
