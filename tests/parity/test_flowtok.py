"""FlowTok's text side and joint training, of which the velocity network is a part, against official blocks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.objectives import Draws, noised
from gen.nn.network import Network, param_shapes
from gen.pretrained.flowtok import IMPORTER, velocity_rules
from gen.pretrained.rules import load
from gen.tokenizers.base import Gaussian
from gen.tokenizers.flowtok import SIGMA_MIN, FlowTokConfig, contrastive, flat_kl, flow_loss, paired, velocity_denoiser
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_sdvae import check_round_trip


def model(fx: Fixture) -> tuple[FlowTokConfig, dict[str, Any]]:
    given, text = fx.config, fx.config["textVAE"]
    config = IMPORTER.infer(fx.weights, heads=given["num_heads"], text_heads=text["heads"])
    network, projector = config.velocity, config.text
    assert (network.shape, network.width, network.depth, network.mlp_ratio) == (
        (given["num_latent_tokens"], given["channels"]),
        given["hidden_size"],
        given["depth"],
        given["mlp_ratio"],
    )
    assert projector.text == (given["num_latent_tokens"], given["clip_dim"])
    assert (projector.depth, projector.heads, projector.hidden, projector.aligned) == (
        text["num_blocks"],
        text["heads"],
        text["d_ff"],
        given["projector_hidden"],
    )
    _, params, _ = IMPORTER.load(fx.weights, config)
    check_round_trip(IMPORTER, fx.weights, config, params)
    return config, params


@pytest.mark.parametrize("fx", fixtures("flowtok-training*"), ids=str)
def test_training(fx: Fixture) -> None:
    config, params = model(fx)
    io, given, network = fx.io, fx.config, config.velocity
    assert given["sigma_min"] == SIGMA_MIN
    assert given["sigma_max"] == 1.0
    t = 1.0 - io["t"]

    def loss(text: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        projector = Network(config.text).module(params["text"])
        posterior, kept = projector(text, keep=(0,))
        x0 = posterior.mean + jnp.exp(0.5 * posterior.logvar) * io["noise"]
        images, null = paired(jnp.asarray(io["image_tokens"]), jnp.asarray(io["null_indicator"]))
        target = projector.target(text)
        found = {"text_block0_out": kept[0], "mu": posterior.mean, "log_var": posterior.logvar, "x0": x0}
        found |= {"projected_text": target, "target_image_tokens": images}
        found["contrastive_loss"] = contrastive(x0, target, projector.log_scale[...])
        found["kld_crossflow_sum"] = flat_kl(posterior).sum()
        found["kld_standard_sum"] = Gaussian(posterior.mean, posterior.logvar).kl().sum()
        found["flow_loss"] = flow_loss(network, params["velocity"], x0, images, t, null)
        denoiser = velocity_denoiser(network)
        found["x_t"] = noised(denoiser.process, images, Draws(t, x0))
        cond = {"label": null.astype(jnp.int32)}
        # the fixture's clock runs towards the image
        found["prediction"] = -denoiser(params["velocity"], found["x_t"], t, cond).velocity
        process, shape = denoiser.process, (-1, 1, 1)
        alpha, sigma = (jnp.broadcast_to(rate(t), t.shape).reshape(shape) for rate in (process.dalpha, process.dsigma))
        found["target_velocity"] = -(alpha * images + sigma * x0)
        weights = given["contrastive_weight"], given["kld_weight"]
        total = found["flow_loss"].mean() + weights[0] * found["contrastive_loss"]
        found["total_loss"] = total + weights[1] * found["kld_crossflow_sum"]
        return found["total_loss"], found

    (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(io["text_embedding"])
    for name, array in found.items():
        fx.close(array, name)
    fx.close(gradient, "grad_text_embedding")


@pytest.mark.parametrize("fx", fixtures("flowtok-transformer*"), ids=str)
def test_velocity_network(fx: Fixture) -> None:
    given, io = fx.config, fx.io
    network = DiTConfig(
        (given["num_latent_tokens"],),
        given["channels"],
        1,
        given["hidden_size"],
        given["depth"],
        given["num_heads"],
        mlp_ratio=given["mlp_ratio"],
        num_classes=1,
    )
    params, _ = load(velocity_rules(network), fx.weights, param_shapes(network))
    module, cond = Network(network).module(params), {"label": jnp.asarray(io["null_indicator"])}
    fx.close(module.embed((io["t"],), cond), "cond")
    out, taps = jax.jit(lambda x, t: module(x, (t,), cond, taps=("tokens", "block_0")))(io["x"], io["t"])
    fx.close(taps["tokens"], "tokens_in")
    fx.close(taps["block_0"], "block0_out")
    fx.close(out, "output")


def test_rings_of_null_samples() -> None:
    images = jnp.arange(5.0)[:, None]
    for null, expected, kept in (
        ([0, 1, 0, 1, 1], [0, 3, 2, 4, 1], [0, 1, 0, 1, 1]),
        ([0, 0, 1, 0, 0], [0, 1, 2, 3, 4], [0] * 5),
        ([0] * 5, [0, 1, 2, 3, 4], [0] * 5),
        ([1] * 5, [1, 2, 3, 4, 0], [1] * 5),
    ):
        found, marked = paired(images, jnp.asarray(null))
        np.testing.assert_array_equal(found[:, 0], expected)
        np.testing.assert_array_equal(marked, np.asarray(kept, bool))


def test_groups_are_compared_alone() -> None:
    latents, target = jax.random.normal(jax.random.key(0), (2, 4, 3, 2))
    parts = [contrastive(latents[i : i + 2], target[i : i + 2], jnp.float32(1.0)) for i in (0, 2)]
    np.testing.assert_allclose(contrastive(latents, target, jnp.float32(1.0), group=2), np.mean(parts), rtol=1e-6)
    assert float(contrastive(latents, target, jnp.float32(1.0))) > float(np.mean(parts))
