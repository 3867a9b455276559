import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.data.sources import Digits
from gen.errors import GenError
from gen.nn.network import Network, count, param_shapes
from gen.tokenizers.kl_vae import KLVAEConfig, kl_vae
from gen.tokenizers.train import TokenizerTask
from gen.training.optim import OptimConfig
from tests.training.conformance import check_task

TINY = KLVAEConfig((8, 8, 1), 8, (1, 2), 1, 3, 2, attention=(1,), groups=4)
COUNTS = {  # encoder, decoder and the 1x1 convolutions, of the published networks
    "kl-f4": 55_312_063,
    "sd-vae": 83_653_863,
    "kl-f16": 69_610_963,
    "vavae-f16d32": 69_836_067,
    "vavae-f16d64": 70_293_955,
    "kl-f32": 103_880_131,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name: str) -> None:
    config = kl_vae(name)
    assert count(param_shapes(config)) == COUNTS[name]
    h, w, c = config.spec.shape
    assert (h * config.factor, w * config.factor) == (256, 256)
    assert c == config.channels


def test_one_network_under_several_names() -> None:
    assert kl_vae("kl-f8") == kl_vae("sd-vae")
    assert kl_vae("kl-f16") == kl_vae("vavae-f16d16")


def test_mar_differs_in_the_decoder_only() -> None:
    ours, theirs = (param_shapes(kl_vae(name)) for name in ("vavae-f16d16", "mar-kl16"))
    assert count(ours["encoder"]) == count(theirs["encoder"])
    assert count(ours["decoder"]) > count(theirs["decoder"])


def test_any_size_that_the_factor_divides() -> None:
    params = jax.jit(Network(TINY).init)(jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (2, 6, 10, 1), minval=-1.0)
    posterior = jax.jit(TINY.encode)(params, images)
    assert posterior.mean.shape == posterior.logvar.shape == (2, 3, 5, 3)
    decoded = jax.jit(TINY.decode)(params, posterior.mode())
    assert decoded.shape == images.shape
    assert decoded.dtype == jnp.float32
    rough = jax.jit(dataclasses.replace(TINY, dtype="bfloat16").encode)(params, images)
    assert rough.mean.dtype == jnp.float32
    np.testing.assert_allclose(rough.mean, posterior.mean, atol=0.05)


@pytest.mark.slow
def test_conformance(tmp_path: Path) -> None:
    small = dataclasses.replace(TINY, mult=(1,), attention=())
    check_task(TokenizerTask(tokenizer=small, optim=OptimConfig(1e-3)), Digits("train"), {}, tmp_path, steps=4)


def test_refusals() -> None:
    with pytest.raises(GenError, match="unknown KL autoencoder 'kl-f9'; did you mean 'kl-f8'"):
        kl_vae("kl-f9")
    with pytest.raises(GenError, match="250x256 cannot be halved 3 times; use multiples of 8"):
        kl_vae("sd-vae", image=(250, 256, 3))
    with pytest.raises(GenError, match="level width 12 does not divide into 32 groups"):
        KLVAEConfig(width=12)
    with pytest.raises(GenError, match="attention at level 4; this autoencoder has levels 0 to 3"):
        KLVAEConfig(attention=(4,))
    with pytest.raises(GenError, match="without quant_conv inner"):
        KLVAEConfig(inner=8, quant_conv=False)
    params = param_shapes(TINY)
    with pytest.raises(GenError, match=r"images are \(1, 7, 8, 1\); this autoencoder takes"):
        jax.eval_shape(TINY.encode, params, jnp.zeros((1, 7, 8, 1)))
    with pytest.raises(GenError, match=r"latents are \(1, 4, 4, 2\); this autoencoder decodes"):
        jax.eval_shape(TINY.decode, params, jnp.zeros((1, 4, 4, 2)))
