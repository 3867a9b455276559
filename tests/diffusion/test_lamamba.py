"""LaMamba-Diff: sizes, refusals, two times, forward-mode derivatives and low precision."""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.backbones.lamamba import LaMambaConfig, lamamba
from gen.errors import GenError
from gen.nn.forward_mode import forward_mode
from gen.nn.network import Network, count, param_shapes
from gen.pretrained.lamamba import IMPORTER, generator

TINY = LaMambaConfig(
    (8, 8), 2, 1, 8, (1, 1, 1, 1), 1, False, (2, 2, 2, 2), window=4, num_classes=3, remat="none", scan=False
)


@pytest.mark.parametrize(
    ("width", "size", "millions"), [(64, 32, 26.8), (128, 32, 105.4), (320, 32, 652.5), (320, 64, 653.5)]
)
def test_parameter_counts_are_the_official_class_s(width: int, size: int, millions: float) -> None:
    config = dataclasses.replace(lamamba("XL", size=(size, size)), width=width)
    assert round(count(param_shapes(config)) / 1e6, 1) == millions


@pytest.mark.parametrize(("name", "millions"), [("S", 33.7), ("B", 133.1), ("L", 471.9)])
def test_sizes_are_near_those_of_dit(name: str, millions: float) -> None:
    assert round(count(param_shapes(lamamba(name))) / 1e6, 1) == millions


def test_forward_mode_passes_under_its_switch() -> None:
    """Methods that differentiate in time need it; the hand-written gradient of the scan forbids it."""
    x, t, cond = jnp.zeros((2, 8, 8, 2)), jnp.array([0.3, 0.6]), {"label": jnp.array([0, 2])}

    def slope(switch: bool) -> Any:
        def run(params: Any, s: jax.Array) -> Any:
            with forward_mode() if switch else contextlib.nullcontext():
                return jax.jvp(lambda s: Network(config)(params, x, (t, s), cond)[0], (s,), (jnp.ones(2),))

        return jax.jit(run).lower(param_shapes(config), t).out_info

    config = dataclasses.replace(TINY, times=2, dtype="bfloat16")
    out, tangent = slope(True)
    assert out.shape == tangent.shape == x.shape
    assert out.dtype == jnp.float32
    with pytest.raises(TypeError, match=r"(?i)forward-mode"):
        slope(False)


def test_merging_kinds_and_unconditional_networks_have_their_place_in_files() -> None:
    for changes in ({"merging": "conv3"}, {"merging": "conv2", "rank": 3}, {"num_classes": 0}, {"window": 8}):
        config = dataclasses.replace(TINY, scan=True, remat="dots", **changes)
        params = jax.tree.map(lambda s: np.arange(s.size, dtype=np.float32).reshape(s.shape), param_shapes(config))
        weights = IMPORTER.save(config, params)
        found, again, _ = IMPORTER.load(weights)
        assert found == config
        jax.tree.map(np.testing.assert_array_equal, again, params)
    assert generator(dataclasses.replace(TINY, learned_variance=True)).nfe == 250


def test_refusals() -> None:
    for changes, message in (
        ({"size": (10, 8)}, "multiple of 4"),
        ({"width": 6}, "multiple of 4"),
        ({"heads": (3, 2, 2, 2)}, "not divisible by heads 3"),
        ({"window": 3}, r"\(8, 8\) is not cut evenly by window 3"),
    ):
        with pytest.raises(GenError, match=message):
            dataclasses.replace(TINY, **changes)
    with pytest.raises(GenError, match="unknown LaMamba size 'xL'"):
        lamamba("xL")
    net, x, t = Network(TINY), jnp.zeros((1, 8, 8, 2)), (jnp.zeros(1),)
    params, cond = param_shapes(TINY), {"label": jnp.zeros(1, int)}
    for arguments, options, message in (
        ((x[:, :4], t, cond), {}, r"input is \(4, 8, 2\)"),
        ((x, (*t, *t), cond), {}, "given 2 times"),
        ((x, t, cond), {"controls": {"skips": x}}, "no control 'skips'"),
        ((x, t, cond), {"taps": ("dwn_0",)}, "did you mean 'down_0'"),
    ):
        with pytest.raises(GenError, match=message):
            jax.eval_shape(lambda p, a=arguments, o=options: net(p, *a, **o), params)
    free = Network(dataclasses.replace(TINY, num_classes=0))
    with pytest.raises(GenError, match="unconditional"):
        jax.eval_shape(lambda p: free.apply(p, cond, method="null"), param_shapes(free.config))
    with pytest.raises(GenError, match="not a LaMamba"):
        IMPORTER.config({"pos_embed": np.zeros(3)})
