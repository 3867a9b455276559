import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gen.arrays import flatten
from gen.errors import GenError
from gen.nn.network import Buffer, Network, Projected
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.part import Aux, Part, begin, keep_if, microbatches, warm_start
from gen.training.task import State

X = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
DATA = {"x": jnp.asarray(X), "y": jnp.asarray(X.sum(axis=1))}
HALF = (Constant(0.5),)
RATE = {"lr/a": np.float32(0.1)}


@dataclasses.dataclass(frozen=True)
class Regression:
    """x w + b; with `centred`, x loses the running mean of all x, a buffer; `unit` forces w to length 1."""

    size: int = 3
    centred: bool = False
    unit: bool = False

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return _Regression(self, rngs)


class _Unit(Projected):
    @staticmethod
    def project(value: jax.Array) -> jax.Array:
        return value / jnp.linalg.norm(value)


class _Regression(nnx.Module):
    def __init__(self, config: Regression, rngs: nnx.Rngs) -> None:
        self.w = (_Unit if config.unit else nnx.Param)(jax.random.normal(rngs.params(), (config.size,)))
        self.b = nnx.Param(jnp.ones(()))
        if config.centred:
            self.mean = Buffer(jnp.full((config.size,), 0.25))


def _loss(params: Any, data: Any) -> tuple[jax.Array, Aux]:
    error = data["x"] @ params["w"] + params["b"] - data["y"]
    return jnp.mean(error**2), Aux({"error": jnp.mean(jnp.abs(error))}, out={"error": error})


def _centred(params: Any, data: Any) -> tuple[jax.Array, Aux]:
    value, aux = _loss(params, data | {"x": data["x"] - params["mean"]})
    moved = 0.5 * params["mean"] + 0.5 * data["x"].mean(0)
    return value, dataclasses.replace(aux, buffers={"mean": moved})


def _part(optim: OptimConfig = OptimConfig(), **settings: Any) -> Part:
    return Part("a", Regression(), optim, HALF, **settings)


def _state(part: Part) -> State:
    other = Part("b", Regression(2), OptimConfig(), HALF)
    return begin(
        (part, other), {"a": {"w": jnp.zeros(3), "b": jnp.ones(())}, "b": {"w": jnp.ones(2), "b": jnp.ones(())}}
    )


def test_update_is_the_optax_step_and_touches_one_network() -> None:
    part = _part(OptimConfig(weight_decay=0.01, clip=0.5))
    state = _state(part)
    grads = jax.grad(lambda p: _loss(p, DATA)[0])(state.params["a"])
    chain = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1, weight_decay=0.01))
    steps, _ = chain.update(grads, chain.init(state.params["a"]), state.params["a"])
    wanted = optax.apply_updates(state.params["a"], steps)["w"]
    new, metrics, out = part.update(state, _loss, DATA, RATE)
    np.testing.assert_allclose(new.params["a"]["w"], wanted, rtol=1e-6)
    np.testing.assert_allclose(new.ema["a"]["w"], wanted / 2, rtol=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-6)
    assert {"loss", "grad_norm", "skipped", "error", "lr"} == set(metrics)
    assert float(metrics["lr"]) == np.float32(0.1)
    np.testing.assert_allclose(out["error"], 1.0 - DATA["y"], rtol=1e-6)
    for entry in ("params", "opt", "ema"):
        assert getattr(new, entry)["b"] is getattr(state, entry)["b"]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_accumulation_is_the_large_batch(count: int) -> None:
    """Gradients, metrics and buffers are means over the microbatches; outputs are joined in the order of the batch."""
    part = Part("a", Regression(centred=True), OptimConfig(), HALF)
    state = begin((part,), {"a": Network(part.network).init(jax.random.key(0))})
    whole, metrics, out = part.update(state, _centred, DATA, RATE)
    with microbatches(count):
        parts, part_metrics, part_out = jax.jit(lambda s: part.update(s, _centred, DATA, RATE))(state)
    for name in metrics:
        np.testing.assert_allclose(part_metrics[name], metrics[name], rtol=1e-5)
    np.testing.assert_allclose(part_out["error"], out["error"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(parts.params["a"]["mean"], whole.params["a"]["mean"], rtol=1e-5)
    moments = lambda s: s.opt["a"]["state"][0].mu["w"]  # noqa: E731 - Adam normalises: compare what it was given
    np.testing.assert_allclose(moments(parts), moments(whole), rtol=1e-5, atol=1e-7)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    part = Part("a", Regression(centred=True), OptimConfig(), HALF)
    state = begin((part,), {"a": Network(part.network).init(jax.random.key(0))})
    bad = DATA | {"x": DATA["x"].at[0, 0].set(jnp.nan)}
    new, metrics, _ = part.update(state, _centred, bad, RATE)
    assert float(metrics["skipped"]) == 1.0
    same = jax.tree.map(np.array_equal, (state.params, state.opt, state.ema), (new.params, new.opt, new.ema))
    assert jax.tree.all(same)
    good, metrics, _ = part.update(state, _centred, DATA, RATE)
    assert float(metrics["skipped"]) == 0.0
    assert not np.array_equal(good.params["a"]["w"], state.params["a"]["w"])


def test_buffers_are_given_by_the_loss_alone() -> None:
    """No optimiser state, no decay, no gradient; averages hold their newest values."""
    part = Part("a", Regression(centred=True), OptimConfig(weight_decay=0.5), HALF)
    state = begin((part,), {"a": Network(part.network).init(jax.random.key(0))})
    assert not any("mean" in path for path in flatten(state.opt))
    kept, _, _ = part.update(state, _loss, DATA, RATE)  # a loss that says nothing of it
    np.testing.assert_array_equal(kept.params["a"]["mean"], np.full(3, 0.25))
    moved, metrics, _ = part.update(kept, _centred, DATA, RATE)
    wanted = 0.125 + 0.5 * X.mean(0)
    np.testing.assert_allclose(moved.params["a"]["mean"], wanted, rtol=1e-6)
    np.testing.assert_array_equal(moved.ema["a"]["mean"], moved.params["a"]["mean"])
    assert np.abs(moved.ema["a"]["w"] - moved.params["a"]["w"]).min() > 1e-3, "the average of a parameter lags behind"
    norm = optax.tree.norm(
        jax.grad(lambda w: _centred(kept.params["a"] | w, DATA)[0])(
            {name: kept.params["a"][name] for name in ("w", "b")}
        )
    )
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)


def test_only_what_the_patterns_name_learns() -> None:
    part = _part(OptimConfig(weight_decay=0.5), train=("w*",))
    state = _state(part)
    assert part.learns(state.params["a"]) == {"w"}
    new, metrics, _ = part.update(state, _loss, DATA, RATE)
    np.testing.assert_array_equal(new.params["a"]["b"], 1.0)
    assert np.abs(new.params["a"]["w"]).min() > 0
    wanted = np.linalg.norm(jax.grad(lambda w: _loss({"w": w, "b": 1.0}, DATA)[0])(jnp.zeros(3)))
    np.testing.assert_allclose(metrics["grad_norm"], wanted, rtol=1e-6)
    assert not any(path.endswith("/b") for path in flatten(state.opt["a"]))
    with pytest.raises(GenError, match="no parameter of 'a' fits the pattern 'block"):
        _state(_part(train=("w", "blocks/*")))
    centred = Part("a", Regression(centred=True), OptimConfig(), train=("mean",))  # a buffer is no parameter
    with pytest.raises(GenError, match="fits the pattern 'mean'; paths are like b, w"):
        begin((centred,), {"a": Network(centred.network).init(jax.random.key(0))})


def test_networks_under_one_optimiser_keep_their_own_rules() -> None:
    """A fake score with its head: buffers and forced weight rules are found below the role of each."""
    networks = {"net": Regression(centred=True, unit=True), "head": Regression()}
    part = Part("a", networks, OptimConfig(weight_decay=0.5))
    given = {role: Network(config).init(jax.random.key(3)) for role, config in networks.items()}
    state = begin((part,), {"a": given})
    assert part.learns(given) == {"net/w", "net/b", "head/w", "head/b"}

    def loss(params: Any, data: Any) -> tuple[jax.Array, Aux]:
        value = _loss(params["net"], data)[0] + _loss(params["head"], data)[0]
        return value, Aux({"length": jnp.linalg.norm(params["net"]["w"])}, {"net/mean": jnp.zeros(3)})

    new, metrics, _ = part.update(state, loss, DATA, {"lr/a": np.float32(0.0)})
    np.testing.assert_allclose(metrics["length"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(new.params["a"]["net"]["w"]), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(new.params["a"]["head"]["w"], given["head"]["w"])
    np.testing.assert_array_equal(new.params["a"]["net"]["mean"], np.zeros(3))


def test_keep_if() -> None:
    assert float(keep_if(jnp.asarray(False), {"m": jnp.nan}, {"m": 1.0})["m"]) == 1.0


def test_begin_copies() -> None:
    source = {"w": jnp.ones(3), "b": jnp.ones(())}
    part = Part("a", Regression(), OptimConfig(), (Constant(), Constant(0.99)))
    state = begin((part,), {"a": source}, {"extra": source})
    assert set(state.ema) == {"a", "a@1"}
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((source, state.params, state.ema, state.aux))]
    assert len(set(pointers)) == len(pointers)


def test_a_warm_start_takes_what_fits_by_path_and_shape() -> None:
    source = Network(Regression()).init(jax.random.key(0))
    whole = warm_start(Regression(), jax.random.key(1), source)
    jax.tree.map(np.testing.assert_array_equal, whole, source)
    source = source | {"b": jnp.full((), 7.0, jnp.float16), "unknown": jnp.ones(3)}
    other = warm_start(Regression(5), jax.random.key(1), source)
    assert set(other) == {"w", "b"}
    assert other["b"].dtype == jnp.float32
    assert float(other["b"]) == 7.0
    np.testing.assert_array_equal(other["w"], Network(Regression(5)).init(jax.random.key(1))["w"])
    with pytest.raises(GenError, match="no array of the given network fits Regression by path and shape"):
        warm_start(Regression(5), jax.random.key(1), {"v": jnp.ones(5)})
