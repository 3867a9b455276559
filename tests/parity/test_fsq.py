"""Finite scalar quantisation against the official code: bounds, codes, ids, tables and gradients of every level set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.tokenizers.quantizers.fsq import FSQ
from tests.parity.conftest import Fixture, fixtures

CASES = [
    pytest.param(fx, i, id=f"{fx}-{'-'.join(map(str, levels))}")
    for fx in fixtures("fsq*")
    for i, levels in enumerate(fx.config["level_sets"])
]


@pytest.mark.parametrize(("fx", "i"), CASES)
def test_fsq(fx: Fixture, i: int) -> None:
    config = FSQ(tuple(fx.config["level_sets"][i]))
    quantizer, name, half = config.build(None), f"s{i}_", np.asarray(config.levels) // 2
    z = jnp.asarray(fx.io[f"{name}z"])
    found = quantizer(z)
    fx.close(quantizer.bound(z), f"{name}bounded")
    fx.close(found.codes, f"{name}quant")
    fx.close(found.ids, f"{name}index")
    fx.close(quantizer.embed(found.ids), f"{name}round_trip")
    fx.close(quantizer.embed(jnp.asarray(fx.io[f"{name}some_indices"])), f"{name}some_codes")
    gradient = jax.grad(lambda z: (quantizer(z).codes * fx.io[f"{name}upstream_grad"]).sum())(z)
    fx.close(gradient, f"{name}grad_z")
    assert list(fx.io[f"{name}levels"]) == list(config.levels)
    assert list(fx.io[f"{name}basis"]) == list(config.basis)
    assert list(fx.io[f"{name}codebook_size"]) == [config.vocabulary]
    # the samples that dropout leaves unrounded are fixed by the mask
    z, mask = jnp.asarray(fx.io[f"{name}dropq_z"]), fx.io[f"{name}dropq_mask"] > 0
    keys = jax.random.split(jax.random.key(0), len(z))
    whole, none = (FSQ(config.levels, share).build(None)(z, keys).sample(keys) for share in (1.0, 0.0))
    np.testing.assert_allclose(whole, quantizer.bound(z) / half, rtol=1e-6)
    fx.close(jnp.where(mask[:, None, None], whole, none), f"{name}dropq_out")
