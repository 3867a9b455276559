"""Direct discriminative optimisation against its published formula, through the functions that train."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.denoiser import Denoiser, EDMPrecondition
from gen.diffusion.objectives import Draws, EDMLoss
from gen.diffusion.process import EDM
from gen.finetune.ddo import DDOTask, ddo_losses
from gen.nn.network import param_shapes
from gen.pretrained import edm
from gen.pretrained.rules import load
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_edm_unet import label_of, network
from tests.parity.toys import nhwc


@pytest.mark.parametrize("fx", fixtures("ddo-loss*"), ids=str)
def test_diffusion(fx: Fixture) -> None:
    c = fx.config
    names = {"img_channels": "in_channels", "model_type": "cls"}
    options = {names.get(name, name): value for name, value in c["net"].items()}
    config = network(options | {"out_channels": options["in_channels"]})
    params, reference = (
        load(edm.rules(config, f"{role}.model."), own(fx, role), param_shapes(config))[0] for role in ("theta", "ref")
    )
    objective = EDMLoss(c["P_mean"], c["P_std"])
    denoiser = Denoiser(config, EDM(sigma_data=c["sigma_data"]), EDMPrecondition(), objective)
    task = DDOTask(teacher=denoiser, alpha=c["alpha"], beta=c["beta"])
    sigma = jnp.exp(c["P_mean"] + c["P_std"] * fx.io["normal_draw"].ravel())
    fx.close(sigma, "sigma")
    draws = Draws(sigma, jnp.asarray(nhwc(fx.io["noise_draw"])))
    data = {
        name: (jnp.asarray(nhwc(fx.io[name])), {"label": label_of(fx.io[label])})
        for name, label in (("real", "labels"), ("fake", "fake_labels"))
    }
    likelihood = jax.jit(task.log_likelihood)
    ratios = {}
    for name, rows in data.items():
        found, its = likelihood(params, *rows, draws), likelihood(reference, *rows, draws)
        fx.close(found, f"logp_{name}")
        fx.close(its, f"ref_logp_{name}")
        ratios[name] = found - its
        fx.close(ratios[name], f"delta_{name}")
    for name, loss in zip(data, ddo_losses(ratios["real"], ratios["fake"], task.alpha, task.beta), strict=True):
        fx.close(loss, f"loss_{name}")
    run = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    (loss, _), grads = run(params, reference, data["real"], data["fake"], draws)
    fx.close(loss, "loss")
    size = config.size
    fx.close(np.asarray(grads["enc"][f"{size}x{size}_conv"]["kernel"]).transpose(3, 2, 0, 1), "grad_conv_in")
    fx.close(grads["dec"][f"{size}x{size}_aux_conv"]["bias"], "grad_aux_conv_bias")
    (same, _), _ = run(reference, reference, data["real"], data["fake"], draws)
    fx.close(same, "loss_at_reference")


def own(fx: Fixture, role: str) -> dict[str, np.ndarray]:
    return {name: value for name, value in fx.weights.items() if name.startswith(f"{role}.")}


@pytest.mark.parametrize("fx", fixtures("ddo-loss*"), ids=str)
def test_autoregressive(fx: Fixture) -> None:
    """The log ratio of tokens is exact; the loss is divided by the larger of alpha and 1."""
    c, ratios = fx.config, {}
    for name in ("real", "fake"):
        tokens = jnp.asarray(fx.io[f"ar.tokens_{name}"])[..., None]
        found, its = (
            jnp.take_along_axis(jax.nn.log_softmax(fx.io[f"ar.{which}logits_{name}"]), tokens, -1).sum((1, 2))
            for which in ("", "ref_")
        )
        ratios[name] = found - its
        fx.close(ratios[name], f"ar.delta_{name}")
    real, fake = ddo_losses(ratios["real"], ratios["fake"], c["alpha"], c["beta"])
    fx.close(real + fake, "ar.loss_per_sample")
    fx.close((real + fake).mean(), "ar.loss")
    fx.close((real + fake).mean() / max(c["alpha"], 1.0), "ar.loss_normalised")
