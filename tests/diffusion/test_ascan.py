"""The AsCAN-style backbone: letters decide the blocks, it starts from zero, and tells what it cannot do."""

import dataclasses
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


def test_the_last_layer_starts_at_zero() -> None:
    final = jax.jit(lambda: Network(TINY).init(jax.random.key(0))["final"])()
    assert not any(leaf.any() for leaf in jax.tree.leaves(final))


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
