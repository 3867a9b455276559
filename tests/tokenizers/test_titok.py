import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.config import from_json, to_json
from gen.errors import GenError
from gen.nn.network import Network, count, param_shapes
from gen.tokenizers.base import Gaussian
from gen.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from gen.tokenizers.quantizers.vq import VQ
from gen.tokenizers.titok import BASE, LARGE, SMALL, TiTokConfig, Tower

TINY = TiTokConfig((8, 12, 3), 4, 5, 6, Tower(16, 2, 2), Tower(24, 1, 4), scan=False)


@pytest.fixture(scope="module")
def params() -> dict:
    return jax.jit(Network(TINY).init)(jax.random.key(0))


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jax.random.uniform(jax.random.key(1), (3, 8, 12, 3), minval=-1.0, maxval=1.0)


def test_shapes_follow_the_spec(params: dict, images: jax.Array) -> None:
    assert TINY.spec.shape == (5, 6)
    assert TINY.grid(TINY.patch) == (2, 3)
    posterior = jax.jit(TINY.encode)(params, images)
    assert posterior.mean.shape == posterior.logvar.shape == (3, 5, 6)
    decoded = jax.jit(TINY.decode)(params, posterior.mode())
    assert decoded.shape == images.shape
    assert decoded.dtype == jnp.float32


def test_encode_and_decode_are_deterministic_and_per_sample(params: dict, images: jax.Array) -> None:
    encode, decode = jax.jit(TINY.encode), jax.jit(TINY.decode)
    whole, one = encode(params, images), encode(params, images[1:2])
    np.testing.assert_allclose(whole.mean[1:2], one.mean, rtol=1e-5, atol=1e-6)
    again = decode(params, whole.mode())
    np.testing.assert_array_equal(again, decode(params, encode(params, images).mode()))
    np.testing.assert_allclose(again[1:2], decode(params, one.mode()), rtol=1e-5, atol=1e-5)


def test_latent_k_is_a_function_of_latent_token_k_alone(params: dict, images: jax.Array) -> None:
    """The non-legacy layout: the output projection mixes channels, never latent tokens."""
    out = params["encoder_out"]
    x = jax.random.normal(jax.random.key(2), (1, 5, 16))
    moved = x.at[0, 3].add(1.0)
    change = (moved - x) @ out["kernel"]
    assert out["kernel"].shape == (16, 12)
    assert np.flatnonzero(np.abs(change).sum((0, 2))).tolist() == [3]


def test_rows_and_columns_keep_their_places() -> None:
    """With blocks that do nothing, a mask token paints its own patch alone."""
    config = TiTokConfig((4, 6, 1), 2, 2, 4, Tower(8, 1, 2), Tower(8, 1, 2))
    params = jax.jit(Network(config).init)(jax.random.key(3))
    decode = jax.jit(config.decode)
    latents = jax.random.normal(jax.random.key(4), (1, 2, 4))
    zeros = jax.tree.map(jnp.zeros_like, params["decoder"]["blocks"])
    params["decoder"] |= {"blocks": zeros}
    decoded = decode(params, latents)[0, :, :, 0]
    moved = params | {
        "decoder": params["decoder"] | {"positions": params["decoder"]["positions"].at[3].add(jnp.arange(8.0))}
    }
    changed = np.abs(decode(moved, latents)[0, :, :, 0] - decoded) > 1e-6
    # token 3 (row 0 is the class token) is the third patch of the first row: rows 0-1, columns 4-5
    assert changed[:2, 4:].all()
    assert not changed[2:].any()
    assert not changed[:, :4].any()


def test_scanned_and_unrolled_towers_agree(params: dict, images: jax.Array) -> None:
    scanned = dataclasses.replace(TINY, scan=True, remat="dots")
    np.testing.assert_allclose(
        jax.jit(TINY.encode)(params, images).mean, jax.jit(scanned.encode)(params, images).mean, rtol=1e-5, atol=1e-5
    )


def test_gradients_reach_every_parameter(params: dict, images: jax.Array) -> None:
    def loss(params: dict) -> jax.Array:
        posterior = TINY.encode(params, images)
        keys = jax.random.split(jax.random.key(0), 3)
        return jnp.square(TINY.decode(params, posterior.sample(keys)) - images).mean() + posterior.kl().mean()

    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.abs(leaf).max() > 0, f"no gradient at {jax.tree_util.keystr(path)}"


MASKGIT = MaskGITVQGANConfig()
TWO_STAGE = {"channels": None, "quantizer": VQ(4096, 12, normalize=True), "pixels": MASKGIT, "init": "normal"}
ONE_STAGE = {"channels": None, "quantizer": VQ(8192, 64), "init": "normal"}
TEXT = {"text": (77, 768), "init": "normal"}


@pytest.mark.parametrize(
    ("config", "encoder", "decoder", "total"),
    [
        (TiTokConfig(tokens=32, encoder=LARGE, decoder=LARGE, **TWO_STAGE), 303.4, 306.8, 641.1),
        (TiTokConfig(tokens=64, encoder=BASE, decoder=BASE, **TWO_STAGE), 85.9, 88.1, 204.8),
        (TiTokConfig(tokens=128, encoder=SMALL, decoder=SMALL, **TWO_STAGE), 25.8, 27.0, 83.7),
        (TiTokConfig(tokens=64, encoder=BASE, **ONE_STAGE), None, None, 390.0),
        (TiTokConfig(tokens=128, encoder=BASE, **ONE_STAGE), None, None, 390.2),
        (TiTokConfig(tokens=256, encoder=SMALL, **ONE_STAGE), None, None, 330.3),
        (TiTokConfig(tokens=32, encoder=LARGE), None, None, 606.9),
        (TiTokConfig(tokens=64, encoder=BASE), None, None, 389.4),
        (TiTokConfig(tokens=32, encoder=BASE, **(ONE_STAGE | TEXT)), None, None, 390.8),
        (TiTokConfig(tokens=128, encoder=BASE, **(ONE_STAGE | TEXT)), None, None, 391.0),
        (TiTokConfig(tokens=32, encoder=BASE, **TEXT), None, None, 390.2),
        (TiTokConfig(tokens=128, encoder=SMALL, **TEXT), None, None, 330.3),
    ],
)
def test_published_sizes(config: TiTokConfig, encoder: float | None, decoder: float | None, total: float) -> None:
    """Millions of parameters, as counted from the official code."""
    shapes = param_shapes(config)

    def millions(*names: str) -> float:
        return round(sum(count(shapes[name]) for name in names) / 1e6, 1)

    assert millions(*shapes) == total
    if encoder is not None:
        assert millions("encoder", "patch_embed", "encoder_out") == encoder
        assert millions("decoder", "decoder_embed", "mask_token", "head") == decoder


def test_posterior_kl_and_sampling() -> None:
    mean, logvar = jnp.full((2, 3, 4), 0.5), jnp.full((2, 3, 4), -1.0)
    posterior = Gaussian(mean, logvar)
    expected = 12 * 0.5 * (0.25 + np.exp(-1.0) - 1.0 + 1.0)
    np.testing.assert_allclose(posterior.kl(), [expected] * 2, rtol=1e-6)
    assert np.all(Gaussian(jnp.zeros((1, 2)), jnp.zeros((1, 2))).kl() == 0)
    keys = jax.random.split(jax.random.key(0), 2)
    draw = posterior.sample(keys)
    np.testing.assert_array_equal(draw[1], Gaussian(mean[1:], logvar[1:]).sample(keys[1:])[0])
    many = Gaussian(jnp.full((1, 20000), 0.5), jnp.full((1, 20000), -1.0)).sample(keys[:1])
    assert abs(float(many.mean()) - 0.5) < 0.02
    assert abs(float(many.std()) - np.exp(-0.5)) < 0.02
    assert np.isfinite(Gaussian(mean, jnp.full_like(mean, 1e4)).sample(keys)).all()


def test_config_survives_json() -> None:
    for config in (TINY, TiTokConfig(**TWO_STAGE)):
        assert from_json(to_json(config)) == config


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(GenError, match="do not divide into patches"):
        TiTokConfig((8, 9, 1), 2, 4, 8, Tower(16, 1, 2), Tower(16, 1, 2))
    with pytest.raises(GenError, match="not a multiple of its 3 heads"):
        TiTokConfig((8, 8, 1), 2, 4, 8, Tower(16, 1, 3), Tower(16, 1, 2))
    with pytest.raises(GenError, match="or a quantizer and channels None"):
        TiTokConfig(quantizer=VQ(8, 4))
    with pytest.raises(GenError, match="make them equal"):
        TiTokConfig(**(TWO_STAGE | {"pixels": MaskGITVQGANConfig(mult=(1, 2))}))
    with pytest.raises(GenError, match="with a quantizer and without text"):
        TiTokConfig(pixels=MASKGIT)


def test_wrong_inputs_are_refused_before_any_compile() -> None:
    reads = dataclasses.replace(TINY, text=(3, 4))
    shapes = param_shapes(reads)
    codes = jax.ShapeDtypeStruct((2, 5, 6), jnp.float32)
    with pytest.raises(GenError, match=r"images are \(2, 8, 8, 3\); this tokenizer takes \(B, 8, 12, 3\)"):
        jax.eval_shape(reads.encode, shapes, jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32))
    with pytest.raises(GenError, match="reads a caption"):
        jax.eval_shape(reads.decode, shapes, codes)
    with pytest.raises(GenError, match="only the two-stage TiTok"):
        reads.logits(shapes, codes)
    with pytest.raises(GenError, match=r"codes are \(2, 4, 6\)"):
        jax.eval_shape(TINY.decode, param_shapes(TINY), jax.ShapeDtypeStruct((2, 4, 6), jnp.float32))
