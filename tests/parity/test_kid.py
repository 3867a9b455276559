"""`gen.metrics.kernels` against clean-fid, torch-fidelity and cmmd-pytorch."""

import numpy as np
import pytest

from gen.metrics.kernels import cmmd, cubic, kid_subsets, mmd2, rbf, sliced_wasserstein
from tests.parity.conftest import fixtures

FIXTURES = fixtures("kid*")


@pytest.mark.parametrize("fx", FIXTURES, ids=str)
def test_kid(fx):
    real, fake = np.asarray(fx.io["feats_ref"]), np.asarray(fx.io["feats_gen"])
    clean = kid_subsets(real, fake, fx.io["idx_ref"], fx.io["idx_gen"])
    fx.close(clean.mean, "kid_cleanfid_f64")
    fx.close(clean.mean, "kid_cleanfid")
    fidelity = kid_subsets(real, fake, fx.io["tf_idx_1"], fx.io["tf_idx_2"])
    fx.close(fidelity.mean, "kid_torch_fidelity_f64_mean")
    fx.close(fidelity.std, "kid_torch_fidelity_f64_std")
    fx.close(fidelity.mean, "kid_torch_fidelity_mean")
    fx.close(fidelity.std, "kid_torch_fidelity_std")
    gaussian = kid_subsets(real, fake, fx.io["tf_idx_1"], fx.io["tf_idx_2"], rbf(fx.config["rbf_sigma"]))
    fx.close(gaussian.mean, f"kid_rbf_sigma{fx.config['rbf_sigma']:g}_mean")


@pytest.mark.parametrize("fx", FIXTURES, ids=str)
def test_mmd(fx):
    real, fake = np.asarray(fx.io["feats_ref"]), np.asarray(fx.io["feats_gen"])
    size = min(len(real), len(fake))
    fx.close(mmd2(real[:size], fake[:size], cubic), "mmd2_unbiased_first_m")
    found = cmmd(fx.io["unit_ref"], fx.io["unit_gen"], sigma=fx.config["cmmd_sigma"], scale=fx.config["cmmd_scale"])
    fx.close(found, "cmmd")


@pytest.mark.parametrize("fx", FIXTURES, ids=str)
def test_mind(fx):
    real, fake = fx.io["feats_ref"][fx.io["mind_idx_ref"]], fx.io["feats_gen"][fx.io["mind_idx_gen"]]
    directions = fx.io["mind_directions"]
    found = 3 * directions.shape[1] * sliced_wasserstein(real, fake, directions).mean()
    fx.close(found, "mind")
