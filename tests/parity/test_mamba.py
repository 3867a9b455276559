"""The selective scan and the Mamba layer against the official reference, with every gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.nn.mamba import MambaConfig
from gen.nn.network import Network, param_shapes
from gen.nn.selective_scan import Method, selective_scan
from gen.pretrained.mamba import mamba_rules
from gen.pretrained.rules import load, save
from tests.parity.conftest import Fixture, fixtures


def time_first(m: np.ndarray) -> np.ndarray:
    """(b, ..., time) -> (b, time, ...)."""
    return np.moveaxis(np.asarray(m), -1, 1)


def time_last(m: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(m), 1, -1)


TOKENS = ("u", "delta", "B", "C", "z")


@pytest.mark.parametrize("method", ["scan", "sequential", "associative", "pallas"])
@pytest.mark.parametrize("fx", fixtures("mamba-selective-scan*"), ids=str)
def test_selective_scan(fx: Fixture, method: Method) -> None:
    for case, options in fx.config.items():
        if not isinstance(options, dict):
            continue
        names = [n for n in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias") if f"{case}_{n}" in fx.io]
        constant = {n for n in ("B", "C") if fx.io[f"{case}_{n}"].ndim == 2}
        moved = {n for n in TOKENS if n in names} - constant
        inputs = {n: time_first(fx.io[f"{case}_{n}"]) if n in moved else fx.io[f"{case}_{n}"] for n in names}

        def run(inputs: dict[str, Any], softplus: bool = options["delta_softplus"]) -> tuple[Any, Any]:
            return selective_scan(**inputs, softplus=softplus, method=method, chunk=8)

        @jax.jit
        def both(inputs: dict[str, Any], cotangents: Any) -> Any:
            outputs, pull = jax.vjp(run, inputs)
            return outputs, pull(cotangents)[0]

        cotangents = (time_first(fx.io[f"{case}_cot_out"]), fx.io[f"{case}_cot_last_state"])
        (out, last), grads = both(inputs, cotangents)
        fx.close(time_last(out), f"{case}_out")
        fx.close(last, f"{case}_last_state")
        for name in names:
            fx.close(time_last(grads[name]) if name in moved else grads[name], f"{case}_grad_{name}")


def layer(fx: Fixture) -> tuple[MambaConfig, Any]:
    args = fx.config
    rank = args.get("dt_rank", "auto")
    config = MambaConfig(
        args["d_model"],
        args.get("d_state", 16),
        args.get("d_conv", 4),
        args.get("expand", 2),
        None if rank == "auto" else rank,
        args.get("conv_bias", True),
        args.get("bias", False),
    )
    params, report = load(mamba_rules(config), fx.weights, param_shapes(config))
    assert len(report.matched) == len(fx.weights)
    return config, params


@pytest.mark.parametrize("fx", fixtures("mamba-block*"), ids=str)
def test_layer(fx: Fixture) -> None:
    config, params = layer(fx)

    @jax.jit
    def both(params: Any, x: Any, cotangent: Any) -> Any:
        out, pull = jax.vjp(Network(config), params, x)
        return out, *pull(cotangent)

    out, dparams, dx = both(params, fx.io["x"], fx.io["cot_out"])
    fx.close(out, "out")
    fx.close(dx, "grad_x")
    for name, gradient in save(mamba_rules(config), dparams).items():
        fx.close(gradient, f"grad_{name}")
    for name, array in save(mamba_rules(config), params).items():
        np.testing.assert_array_equal(array, fx.weights[name], err_msg=name)


@pytest.mark.parametrize("fx", fixtures("mamba-block*"), ids=str)
def test_layer_token_by_token(fx: Fixture) -> None:
    config, params = layer(fx)
    x = jnp.asarray(fx.io["x"])

    @jax.jit
    def run(x: jax.Array) -> Any:
        module = Network(config).module(params)
        cache, outs = module.cache(x.shape[0]), []
        for i in range(x.shape[1]):
            out, cache = module.step(x[:, i], cache)
            outs.append(out)
        return jnp.stack(outs, 1), cache

    out, cache = run(x)
    fx.close(out, "step_out")
    fx.close(time_last(cache["conv"]), "final_conv_state")
    fx.close(cache["state"], "final_ssm_state")
