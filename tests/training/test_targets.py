"""Targets by name, and the count of a program's products."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from gen.errors import GenError
from gen.training import targets
from gen.training.flops import Flops, count_flops
from gen.training.targets import CHIPS, find_target


@pytest.mark.parametrize(
    ("text", "count"), [("v5e:8x8", 64), ("v5p:2x2x4", 16), ("v6e:1x1", 1), ("h200", 1), ("h200:8", 8)]
)
def test_targets_by_name(text: str, count: int) -> None:
    found = find_target(text)
    assert (found.name, found.count) == (text, count)
    assert found.chip is CHIPS[text.partition(":")[0]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5x:8x8", "unknown target 'v5x:8x8'; did you mean 'v5"),
        ("a100", "unknown target 'a100'"),
        ("v5e", "no slice of TPU v5e; expected 2 axes, such as v5e:8x8"),
        ("v5p:4x4", "no slice of TPU v5p; expected 3 axes"),
        ("v5e:0x8", "no slice of TPU v5e"),
        ("h200:16", "not one machine; expected h200 or h200:2 to h200:8"),
    ],
)
def test_targets_that_there_are_not(text: str, said: str) -> None:
    with pytest.raises(GenError, match=said):
        find_target(text)


@pytest.mark.parametrize(("text", "wheels"), [("v5e:8x8", r"jax\[tpu\]"), ("h200", r"jax\[cuda12\]")])
def test_wheels_that_are_missing(text: str, wheels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GenError, match=f"is not installed .* pip install '{wheels}' .docs/accelerators.md"):
        find_target(text).devices()


def test_every_figure_has_its_source() -> None:
    for chip in CHIPS.values():
        assert chip.source
        assert min(chip.memory, chip.peak, chip.bandwidth, chip.links) > 0
        assert (chip.clock > 0) == (chip.platform == "tpu")


def test_the_compilers_settings_leave_those_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"XLA_FLAGS": "--xla_dump_to=here", "JAX_PLATFORMS": "tpu"}
    monkeypatch.setattr(targets.os, "environ", environment)
    targets.prepare()
    assert environment["JAX_PLATFORMS"] == "tpu"
    assert environment["XLA_FLAGS"].split()[0] == "--xla_dump_to=here"


def test_products_of_loops_and_of_what_is_recomputed() -> None:
    """Three layers of 2 x 4 x 5 x 5 operations forward, twice that backward, and the layer's own once again."""

    def loss(weights: jax.Array, x: jax.Array) -> jax.Array:
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jax.lax.scan(layer, x, weights)[0].sum()

    traced = jax.jit(jax.grad(loss)).trace(jnp.zeros((3, 5, 5)), jnp.zeros((4, 5)))
    layer = 2 * 4 * 5 * 5
    assert count_flops(traced.jaxpr.jaxpr) == Flops(model=3 * 3 * layer, recomputed=3 * layer)


def test_products_of_convolutions_and_branches() -> None:
    def run(flag: jax.Array, x: jax.Array, kernel: jax.Array) -> jax.Array:
        def convolve(x: jax.Array) -> jax.Array:
            return jax.lax.conv_general_dilated(
                x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
            )

        return jax.lax.cond(flag, convolve, lambda x: x[:, ::2, ::2] @ jnp.ones((4, 6)), x)

    traced = jax.jit(run).trace(True, jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 2, 6)))
    assert count_flops(traced.jaxpr.jaxpr) == Flops(2 * 16 * 6 * 9 * 2)
