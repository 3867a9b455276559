import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gen.errors import GenError
from gen.training.ema import Constant
from gen.training.optim import OptimConfig, begin, keep_if, microbatches, update

X = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
DATA = {"x": jnp.asarray(X), "y": jnp.asarray(X.sum(axis=1))}


def _loss(params, data):  # type: ignore[no-untyped-def]
    error = data["x"] @ params["w"] - data["y"]
    return jnp.mean(error**2), {"error": jnp.mean(jnp.abs(error))}


def _state(optim: OptimConfig):  # type: ignore[no-untyped-def]
    params = {"a": {"w": jnp.zeros(3)}, "b": {"w": jnp.ones(2)}}
    return begin(params, {"a": optim, "b": optim}, {"a": Constant(0.5), "b": Constant(0.5)})


def test_update_is_the_optax_step_and_touches_one_network() -> None:
    optim = OptimConfig(lr=0.1, weight_decay=0.01, clip=0.5)
    state = _state(optim)
    grads = jax.grad(lambda p: _loss(p, DATA)[0])(state.params["a"])
    chain = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1, weight_decay=0.01))
    steps, _ = chain.update(grads, chain.init(state.params["a"]), state.params["a"])
    wanted = optax.apply_updates(state.params["a"], steps)["w"]
    new, out = update(state, "a", _loss, DATA, optim, {"a": Constant(0.5), "b": Constant(0.5)})
    np.testing.assert_allclose(new.params["a"]["w"], wanted, rtol=1e-6)
    np.testing.assert_allclose(new.ema["a"]["w"], wanted / 2, rtol=1e-6)
    assert float(out["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-6)
    assert {"loss", "grad_norm", "skipped", "error"} == set(out)
    for part in ("params", "opt", "ema"):
        assert getattr(new, part)["b"] is getattr(state, part)["b"]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_accumulated_gradient_is_the_large_batch_one(count: int) -> None:
    optim = OptimConfig(lr=0.1)
    state = _state(optim)
    whole, out = update(state, "a", _loss, DATA, optim)
    with microbatches(count):
        parts, out_parts = jax.jit(lambda s: update(s, "a", _loss, DATA, optim))(state)
    for name in out:
        np.testing.assert_allclose(out_parts[name], out[name], rtol=1e-5)
    moments = lambda s: s.opt["a"]["state"][0].mu["w"]  # noqa: E731 - Adam normalises: compare what it was given
    np.testing.assert_allclose(moments(parts), moments(whole), rtol=1e-5, atol=1e-7)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    optim, averages = OptimConfig(lr=0.1), {"a": Constant(0.5)}
    state = begin({"a": {"w": jnp.full(3, 0.5)}}, {"a": optim}, averages)
    bad = DATA | {"x": DATA["x"].at[0, 0].set(jnp.nan)}
    new, out = update(state, "a", _loss, bad, optim, averages)
    assert float(out["skipped"]) == 1.0
    same = jax.tree.map(np.array_equal, (state.params, state.opt, state.ema), (new.params, new.opt, new.ema))
    assert jax.tree.all(same)
    good, out = update(state, "a", _loss, DATA, optim, averages)
    assert float(out["skipped"]) == 0.0
    assert not np.array_equal(good.params["a"]["w"], state.params["a"]["w"])


def test_keep_if() -> None:
    assert float(keep_if(jnp.asarray(False), {"m": jnp.nan}, {"m": 1.0})["m"]) == 1.0


def test_begin_copies() -> None:
    source = {"w": jnp.ones(3)}
    state = begin({"a": source}, {"a": OptimConfig()}, {"a": Constant(), "a@long": Constant(0.99)}, {"extra": source})
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((source, state.params, state.ema, state.aux))]
    assert len(set(pointers)) == len(pointers)


def test_schedules() -> None:
    cosine = OptimConfig(lr=1.0, schedule="cosine", warmup=10, decay_steps=110, final=0.1)
    rates = [float(cosine.learning_rate(n)) for n in (0, 5, 10, 60, 110, 200)]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 0.55, 0.1, 0.1], atol=1e-6)
    linear = OptimConfig(lr=1.0, schedule="linear", decay_steps=10)
    np.testing.assert_allclose([float(linear.learning_rate(n)) for n in (0, 5, 10)], [1, 0.5, 0], atol=1e-6)
    root = OptimConfig(lr=1.0, schedule="inverse-sqrt", warmup=2, decay_steps=4)
    np.testing.assert_allclose([float(root.learning_rate(n)) for n in (1, 4, 16)], [0.5, 1, 0.5], atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"lr": -1.0}, "lr"),
        ({"schedule": "cosine"}, "decay_steps"),
        ({"schedule": "linear", "warmup": 10, "decay_steps": 10}, "exceed warmup"),
    ],
)
def test_bad_settings_are_refused(settings: dict, text: str) -> None:
    with pytest.raises(GenError, match=text):
        OptimConfig(**settings)
