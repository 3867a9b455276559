"""The estimate of what a step needs, against what can be counted by hand and against XLA."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from gen.training.liveness import PACKING, temporaries

N = 256
MATRIX = jax.ShapeDtypeStruct((N, N), jnp.float32)
ONE = N * N * 4


def needed(function: Callable[..., Any], *shapes: Any, donated: int = 0, **options: Any) -> float:
    """In matrices of N x N float32."""
    found = temporaries(jax.make_jaxpr(function)(*shapes), donated, platform="gpu", **options)
    return round(found / PACKING / ONE, 3)


def test_elementwise_results_are_not_kept() -> None:
    assert needed(lambda x: jnp.sum(2 * x + 1), MATRIX) < 0.01
    assert needed(lambda x: jnp.tanh(x @ x + 1), MATRIX) == 1  # the product; the result takes its place


def test_a_chain_of_products_needs_two() -> None:
    assert needed(lambda x: x @ x @ x @ x @ x, MATRIX) == 2


def test_results_written_over_arguments_need_nothing() -> None:
    def step(x: Any, g: Any) -> Any:
        return x - 0.1 * g, jnp.sum(g)

    assert needed(step, MATRIX, MATRIX, donated=1) < 0.01
    assert needed(step, MATRIX, MATRIX) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("remat", "kept"), [(False, 8), (True, 5)])
def test_a_backward_pass_waits_for_activations(remat: bool, kept: int) -> None:
    def block(x: Any) -> Any:
        return jnp.tanh(jnp.tanh(x @ x) @ x)

    def loss(x: Any) -> Any:
        for _ in range(4):
            x = (jax.checkpoint(block) if remat else block)(x)
        return jnp.sum(x)

    found = needed(jax.grad(loss), MATRIX)
    assert kept <= found <= kept + 4, found


def test_loops_stack_what_the_backward_pass_reads() -> None:
    def loss(turns: int) -> Callable[[Any], Any]:
        return lambda x: jnp.sum(jax.lax.scan(lambda c, _: (jnp.tanh(c @ x), None), x, length=turns)[0])

    few, many = (needed(jax.grad(loss(turns)), MATRIX) for turns in (10, 20))
    assert (many - few) / 10 in (1, 2, 3)  # stacks: one of the carries at least
    assert few <= 3 * 10 + 5
    assert needed(loss(10), MATRIX) == needed(loss(20), MATRIX) <= 3


def test_branches_need_what_the_larger_one_needs() -> None:
    def choose(flag: Any, x: Any) -> Any:
        return jax.lax.cond(flag, lambda x: jnp.sum(x @ x @ x), lambda x: jnp.sum(x), x)

    assert needed(choose, jax.ShapeDtypeStruct((), bool), MATRIX) == pytest.approx(2, abs=0.01)


def test_half_precision_is_wide_on_cpu() -> None:
    half = jax.ShapeDtypeStruct((N, N), jnp.bfloat16)
    closed = jax.make_jaxpr(lambda x: x @ x @ x)(half)
    wide, narrow = (temporaries(closed, 0, platform=platform) for platform in ("cpu", "gpu"))
    assert wide == pytest.approx(2 * narrow, rel=1e-3)


def test_unrolled_recalculation_is_undone_on_cpu() -> None:
    def loss(x: Any) -> Any:
        for _ in range(6):
            x = jax.checkpoint(lambda y: jnp.tanh(jnp.tanh(y @ y) @ y))(x)
        return jnp.sum(x)

    closed = jax.make_jaxpr(jax.grad(loss))(MATRIX)
    assert temporaries(closed, 0, platform="cpu") > 1.3 * temporaries(closed, 0, platform="gpu")


def test_cut_arrays_need_their_part_and_are_put_together_to_be_read() -> None:
    x, w = jax.ShapeDtypeStruct((N // 4, N), jnp.float32), MATRIX
    whole = needed(lambda x, w: jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(w), x, w)
    cut = needed(lambda x, w: jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(w), x, w, cut={(N, N): 4})
    assert whole < cut <= whole + 1  # the whole gradient beside its part, for a moment
