"""The distribution that VAR draws a token from, after its filters, against the official code."""

import re

import jax
import numpy as np
import pytest

from gen.autoregressive.decoding import filtered
from tests.parity.conftest import Fixture, fixtures

VARIANT = re.compile(r"probs_k(\d+)_p([\d.]+)")


@pytest.mark.parametrize("fx", fixtures("ar-sampling-var*"), ids=str)
def test_filters(fx: Fixture) -> None:
    found = [match for match in map(VARIANT.fullmatch, fx.io) if match]
    assert found
    for match in found:
        k, p = int(match[1]), float(match[2])
        probabilities = jax.nn.softmax(filtered(fx.io["logits"], k=k, p=p or 1.0))  # a nucleus of 0 is none there
        fx.close(np.asarray(probabilities), match[0])
