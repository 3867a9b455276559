"""The vision-foundation loss of VA-VAE against the official training code."""

import jax
import numpy as np
import pytest

from gen.tokenizers.alignment import vf_loss
from tests.parity.conftest import Fixture, fixtures


@pytest.mark.parametrize("fx", fixtures("vavae-vf-loss*"), ids=str)
def test_vf_loss(fx: Fixture) -> None:
    z, features = (fx.io[name].transpose(0, 2, 3, 1) for name in ("z", "aux_feature"))
    rows = []
    for i, case in enumerate(fx.config["cases"]):

        def loss(z: jax.Array, case: dict[str, float] = case) -> tuple[jax.Array, dict[str, jax.Array]]:
            margins = {"cosine_margin": case["cos_margin"], "distance_margin": case["distmat_margin"]}
            terms = vf_loss(z, features, **margins)
            return sum(term.mean() for term in terms.values()), terms

        (total, terms), gradient = jax.value_and_grad(loss, has_aux=True)(z)
        fx.close(gradient.transpose(0, 3, 1, 2), f"grad_z_case{i}")
        found = (terms["distance"].mean(), terms["cosine"].mean(), total)
        rows.append([case["distmat_margin"], case["cos_margin"], *map(float, found)])
    fx.close(np.asarray(rows, np.float32), "table")
