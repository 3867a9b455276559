"""LlamaGen's filters against the official code: temperature, top-k with ties, nucleus."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.autoregressive.decoding import filtered
from tests.parity.conftest import Fixture, fixtures


@pytest.mark.parametrize("fx", fixtures("ar-sampling-llamagen*"), ids=str)
def test_filters(fx: Fixture) -> None:
    logits = jnp.asarray(fx.io["logits"])
    named = {name: re.fullmatch(r"llamagen_probs_k(\d+)_p([\d.]+)_T([\d.]+)", name) for name in fx.io}
    found = {name: match for name, match in named.items() if match}
    assert found
    for name, match in found.items():
        k, p, temperature = int(match[1]), float(match[2]), float(match[3])
        kept = filtered(logits, temperature=temperature, k=k, p=p)
        fx.close(jax.nn.softmax(kept, axis=-1), name, rtol=0.0, atol=1e-6)
        fx.close(np.isfinite(kept).astype(np.int32), name.replace("probs", "filtered_finite"))
