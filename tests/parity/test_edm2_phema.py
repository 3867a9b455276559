"""EDM2's post-hoc EMA and learning-rate schedule against the official formulas' numbers."""

from typing import Any

import numpy as np
import pytest

from gen.training.ema import (
    exponent_to_std,
    posthoc_coefficients,
    power_function_beta,
    power_function_response,
    std_to_exponent,
)
from gen.training.optim import OptimConfig
from tests.parity.conftest import fixtures

cases = pytest.mark.parametrize("fx", fixtures("edm2-phema*"), ids=str)


@cases
def test_width_and_exponent(fx: Any) -> None:
    fx.close(std_to_exponent(fx.io["std"]), "exp")
    fx.close(exponent_to_std(fx.io["exp"]), "std_back")


@cases
def test_decay_of_each_step(fx: Any) -> None:
    betas = [power_function_beta(std, fx.io["beta_nimg"], fx.config["batch"]) for std in fx.config["stds"]]
    fx.close(np.stack(betas), "beta")


@cases
def test_reconstruction(fx: Any) -> None:
    io = fx.io
    found = posthoc_coefficients(io["in_ofs"], io["in_std"], io["out_ofs"], io["out_std"])
    fx.close(found, "coefficients")


@cases
def test_response(fx: Any) -> None:
    """The end time and width of each column stand in the fixture's description only: read off the array."""
    response = fx.io["response"]
    times = np.arange(len(response), dtype=np.float64)
    ends = [float(np.flatnonzero(column)[-1]) for column in response.T]
    # within a profile, p(end) / p(t) = (end / t)^gamma
    gammas = []
    for column, end in zip(response.T, ends, strict=True):
        t = end / 2
        gammas.append(np.log(column[int(end)] / column[int(t)]) / np.log(end / np.floor(t)))
    found = power_function_response(times, ends, exponent_to_std(gammas))
    fx.close(found, "response")


@cases
def test_learning_rate(fx: Any) -> None:
    """lr_nimg counts images; our schedule counts updates of `batch` images."""
    batch = fx.config["batch"]
    rate, knee = fx.config.get("ref_lr", 0.01), fx.config.get("ref_batches", 35000)
    rise = fx.config.get("rampup_Mimg", 10) * 1e6 / batch
    optim = OptimConfig(lr=rate, schedule="inverse-sqrt", knee=knee, warmup=rise)
    found = [optim.rate(n / batch, 0) for n in fx.io["lr_nimg"]]
    fx.close(np.asarray(found), "lr")
