"""Min-SNR weights, and the time densities and loss weights of rectified flows."""

import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.ddpm import DDPM
from gen.diffusion.objectives import Draws, MinSNRLoss, VelocityMatching, min_snr
from gen.diffusion.prediction import Prediction
from gen.diffusion.process import Linear
from gen.diffusion.times import TimeSampler
from tests.parity.conftest import Fixture, fixtures

KINDS = {"x": "x", "epsilon": "eps", "v": "v"}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "cosine"}


@pytest.mark.parametrize("fx", fixtures("min-snr-weights*"), ids=str)
class TestFixture:
    def test_weights(self, fx: Fixture) -> None:
        for schedule in fx.config["schedules"]:
            bar = fx.io[f"{schedule}.alpha_bar"].astype(np.float64)
            snr = jnp.asarray(bar / (1.0 - bar), jnp.float32)
            # where 1 - abar is tiny its float32 rounding shows: compare entry by entry
            np.testing.assert_allclose(snr, fx.io[f"{schedule}.snr"], rtol=1e-5)
            for gamma in fx.config["gammas"]:
                for name, kind in KINDS.items():
                    expected = fx.io[f"{schedule}.gamma{gamma:g}.{name}"]
                    np.testing.assert_allclose(min_snr(snr, gamma, kind), expected, rtol=1e-5)

    def test_loss_on_the_chain(self, fx: Fixture) -> None:
        """The objective's weight at the chain's own tables: the loss where the error is one everywhere."""
        steps = fx.io["timesteps"]
        x = jnp.zeros((len(steps), 2, 2, 1))
        for schedule, options in fx.config["schedules"].items():
            kind, ends = SCHEDULES[options["beta_schedule"]], None
            if kind != "cosine":  # the library's defaults
                ends = (options.get("beta_start", 1e-4), options.get("beta_end", 0.02))
            process = DDPM(kind, fx.config["num_train_timesteps"], ends=ends)
            t = jnp.asarray(process.time(steps), jnp.float32)
            draws = Draws(t, jnp.zeros_like(x))
            for gamma in fx.config["gammas"]:
                for name, kind in KINDS.items():

                    def evaluate(x_t, t, cond, process=process, kind=kind):
                        return Prediction(jnp.ones_like(x_t), x_t, t, {}, process, kind)

                    losses, _ = MinSNRLoss(gamma).loss(evaluate, process, x, {}, draws)
                    np.testing.assert_allclose(losses, fx.io[f"{schedule}.gamma{gamma:g}.{name}"], rtol=1e-3)

    def test_time_densities(self, fx: Fixture) -> None:
        """The library's u is near 0 for noise; on our clock the location changes sign. The mode law is symmetric."""
        for name, options in fx.config["logit_normal"].items():
            sampler = TimeSampler("logit-normal", -options["mean"], options["std"])
            fx.close(1.0 - sampler.times(Linear(), -jnp.asarray(fx.io[f"{name}.normal"])), f"{name}.u")
        for name, options in fx.config["mode"].items():
            sampler, z = TimeSampler("mode", scale=options["scale"]), jnp.asarray(fx.io[f"{name}.uniform"])
            fx.close(sampler.times(Linear(), z), f"{name}.u")
            fx.close(1.0 - sampler.times(Linear(), 1.0 - z), f"{name}.u")

    def test_shift_and_weights(self, fx: Fixture) -> None:
        u = fx.io["logit_normal0.u"].astype(np.float64)
        steps = fx.config["num_train_timesteps"]
        fx.close(np.floor(steps * u).astype(np.int32), "map.index")
        sigma = TimeSampler(shift=fx.config["shift"]).times(Linear(), jnp.asarray(1.0 - fx.io["map.index"] / steps))
        fx.close(sigma, "map.sigma")
        fx.close(steps * sigma, "map.timestep")
        for name, weight in (("sigma_sqrt", "sigma-sqrt"), ("cosmap", "cosmap"), ("none", "none")):
            weights = VelocityMatching(weight=weight).weights(Linear(), jnp.asarray(fx.io["map.sigma"]))
            fx.close(weights, f"weight.{name}")
