"""The selective scan and the layers made of it: methods agree, memory stays small, orders are inverted exactly."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gen.errors import GenError
from gen.nn.forward_mode import forward_mode
from gen.nn.mamba import (
    Mamba,
    MambaConfig,
    Order,
    Scan2D,
    depthwise,
    merge_orders,
    scan_orders,
    step_bias,
)
from gen.nn.network import Network
from gen.nn.selective_scan import Method, selective_scan

METHODS = ["sequential", "associative", "pallas"]


def inputs(length: int = 21, channels: int = 6, states: int = 3, groups: int = 2, seed: int = 0) -> dict[str, Any]:
    keys = iter(jax.random.split(jax.random.key(seed), 6))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape)

    return {
        "u": normal(2, length, channels),
        "delta": normal(2, length, channels),
        "A": -jnp.exp(normal(channels, states)),
        "B": normal(2, length, groups, states),
        "C": normal(2, length, groups, states),
        "D": normal(channels),
    }


def by_hand(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any) -> tuple[np.ndarray, np.ndarray]:
    """The recurrence as the docstring has it, in float64."""
    u, A, B, C, D = (np.asarray(x, np.float64) for x in (u, A, B, C, D))
    step = np.log1p(np.exp(np.asarray(delta, np.float64)))
    b, length, channels = u.shape
    B, C = (np.repeat(m, channels // m.shape[2], axis=2) for m in (B, C))
    h, out = np.zeros((b, channels, A.shape[1])), np.zeros_like(u)
    for t in range(length):
        h = np.exp(step[:, t, :, None] * A) * h + (step[:, t] * u[:, t])[..., None] * B[:, t]
        out[:, t] = (h * C[:, t]).sum(-1) + D * u[:, t]
    return out, h


@pytest.mark.parametrize("method", ["scan", *METHODS])
def test_recurrence(method: Method) -> None:
    """Whatever the method, and whether or not the chunk divides the length."""
    case = inputs()
    for chunk in (8, 64) if method == "sequential" else (8,):
        out, last = jax.jit(lambda c, n=chunk: selective_scan(**c, softplus=True, method=method, chunk=n))(case)
        expected, state = by_hand(**case)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(last, state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_plain_scan(method: Method) -> None:
    case = inputs(seed=1)

    def loss(case: dict[str, Any], method: Method) -> jax.Array:
        out, last = selective_scan(**case, softplus=True, method=method, chunk=8)
        return jnp.square(out).sum() + jnp.square(last).sum()

    grads, expected = (jax.jit(jax.grad(functools.partial(loss, method=m)))(case) for m in (method, "scan"))
    for name, wanted in expected.items():
        scale = float(jnp.abs(wanted).max())
        np.testing.assert_allclose(grads[name], wanted, atol=1e-5 * scale, rtol=0, err_msg=name)


def test_forward_mode_passes_under_its_switch() -> None:
    case = inputs(length=9, seed=2)
    tangent = jax.tree.map(jnp.ones_like, case)

    def run(case: dict[str, Any]) -> jax.Array:
        return selective_scan(**case, softplus=True)[0]

    @jax.jit
    def derivative(case: dict[str, Any], tangent: dict[str, Any]) -> jax.Array:
        with forward_mode():
            return jax.jvp(run, (case,), (tangent,))[1]

    with pytest.raises(TypeError, match=r"(?i)forward-mode"):
        jax.jvp(run, (case,), (tangent,))
    slope = derivative(case, tangent)
    ahead, behind = (
        by_hand(**jax.tree.map(lambda v, s=sign: np.asarray(v, np.float64) + s * 1e-5, case))[0] for sign in (1, -1)
    )
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-3, atol=1e-3)


def largest(jaxpr: Any) -> int:
    """Elements of the largest array that a program makes, loops and calls included."""
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars if hasattr(v.aval, "size")]
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                sizes.append(largest(inner))
    return max(sizes, default=0)


def test_training_never_holds_every_state() -> None:
    """No array of the gradient has as many elements as length x channels x states; the plain scan's has."""
    length, channels, states, chunk = 4096, 8, 16, 16
    case = jax.eval_shape(lambda: inputs(length, channels, states, 1))

    def program(method: Method) -> Any:
        def loss(case: dict[str, Any]) -> jax.Array:
            return selective_scan(**case, method=method, chunk=chunk)[0].sum()

        return jax.make_jaxpr(jax.grad(loss))(case).jaxpr

    batch, every = 2, 2 * length * channels * states
    bound = batch * max(length * max(channels, states), (length // chunk + chunk) * channels * states)
    assert largest(program("sequential")) <= bound < every / 4
    assert largest(program("associative")) <= bound
    assert largest(program("scan")) >= every


def test_low_precision_inputs_are_computed_in_float32() -> None:
    case = inputs(length=33)
    low = {name: value if name == "A" else value.astype(jnp.bfloat16) for name, value in case.items()}
    out, last = selective_scan(**low, softplus=True)
    expected, state = by_hand(**jax.tree.map(lambda v: v.astype(jnp.float32), low))
    assert out.dtype == jnp.bfloat16
    assert last.dtype == jnp.float32
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(last, state, rtol=1e-5, atol=1e-5)


def test_steps_and_decays_of_any_size_stay_finite() -> None:
    case = inputs(length=64)
    case |= {"delta": case["delta"] * 100.0, "A": case["A"] * 100.0}
    for method in ("sequential", "associative"):
        grads = jax.jit(jax.grad(lambda c, m=method: selective_scan(**c, softplus=True, method=m)[0].sum()))(case)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads)), method


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta": jnp.zeros((2, 20, 6))}, r"step sizes are \(2, 20, 6\)"),
        ({"A": jnp.zeros((5, 3))}, "decay rates"),
        ({"B": jnp.zeros((2, 21, 4, 3))}, "groups that divide 6"),
        ({"C": jnp.zeros((2, 21, 2, 4))}, r"C is \(2, 21, 2, 4\)"),
    ],
)
def test_shapes_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GenError, match=message):
        selective_scan(**(inputs() | changes))


@pytest.mark.parametrize("size", [(4, 4), (5, 5), (3, 6), (1, 7)])
@pytest.mark.parametrize("order", ["snake", "raster", "bidirectional"])
def test_orders_visit_each_pixel_once_and_are_undone(order: Order, size: tuple[int, int]) -> None:
    pixels = jnp.arange(size[0] * size[1]).reshape(1, *size, 1)
    scanned = scan_orders(pixels, order)
    for k in range(scanned.shape[2]):
        assert sorted(scanned[0, :, k, 0].tolist()) == list(range(pixels.size))
    np.testing.assert_array_equal(merge_orders(scanned, size, order), pixels * scanned.shape[2])


def test_snakes_move_to_neighbours() -> None:
    pixels = jnp.stack(jnp.meshgrid(jnp.arange(5), jnp.arange(4), indexing="ij"), axis=-1)[None]
    moves = jnp.abs(jnp.diff(scan_orders(pixels, "snake")[0], axis=0)).sum(-1)
    assert (moves == 1).all()


def test_bidirectional_is_forwards_and_backwards() -> None:
    x = jnp.arange(5.0).reshape(1, 1, 5, 1)
    np.testing.assert_array_equal(scan_orders(x, "bidirectional")[0, :, :, 0].T, [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])


def test_depthwise_is_a_grouped_convolution() -> None:
    x, kernel = jax.random.normal(jax.random.key(0), (2, 5, 4, 3)), jax.random.normal(jax.random.key(1), (3, 3, 3))
    expected = jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
    )
    np.testing.assert_allclose(depthwise(x, kernel, ((1, 1), (1, 1))), expected, atol=1e-5)


def test_initial_steps_are_log_uniform() -> None:
    steps = jax.nn.softplus(step_bias(jax.random.key(0), (4000,)))
    assert 0.00099 < float(steps.min()) < 0.0011
    assert 0.09 < float(steps.max()) < 0.1001
    np.testing.assert_allclose(jnp.log(steps).mean(), np.log(0.01), atol=0.1)


def test_the_causal_layer_sees_no_future() -> None:
    config = MambaConfig(8, state=2, conv_bias=False, bias=True)
    params = Network(config).init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (1, 9, 8))
    run = jax.jit(Network(config))
    out, changed = run(params, x), run(params, x.at[:, 5:].add(1.0))
    np.testing.assert_allclose(out[:, :5], changed[:, :5], atol=1e-6)
    assert float(jnp.abs(out[:, 5:] - changed[:, 5:]).min(-1).max()) > 1e-4
    module = Network(config).module(params)
    cache, step = module.cache(1), jax.jit(Mamba.step)
    for i in range(3):
        token, cache = step(module, x[:, i], cache)
        np.testing.assert_allclose(token, out[:, i], atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_pixel_sees_every_other(dtype: Any) -> None:
    layer = Scan2D(4, "bidirectional", conv=1, dtype=dtype, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 3, 3, 4))
    layer.dt_bias[...] = jnp.ones_like(layer.dt_bias[...])
    assert layer(x).dtype == dtype
    moved = jax.jit(lambda x: jax.jacrev(lambda x: layer(x).astype(jnp.float32).sum(-1))(x))(x)
    assert (np.abs(np.asarray(moved)).sum(-1).reshape(9, 9) > 0).all()
    with pytest.raises(GenError, match="side 2; use an odd one"):
        Scan2D(4, "snake", conv=2, rngs=nnx.Rngs(0))
