import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.config import from_json, to_json
from gen.errors import GenError
from gen.nn.network import Network, param_shapes
from gen.tokenizers.base import Gaussian
from gen.tokenizers.kl1d import KL1DConfig, Tower

SMALL = KL1DConfig((8, 12, 3), 4, 5, 6, Tower(16, 2, 2), Tower(24, 1, 4), scan=False)


@pytest.fixture(scope="module")
def params() -> dict:
    return jax.jit(Network(SMALL).init)(jax.random.key(0))


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jax.random.uniform(jax.random.key(1), (3, 8, 12, 3), minval=-1.0, maxval=1.0)


def test_shapes_follow_the_spec(params: dict, images: jax.Array) -> None:
    assert SMALL.spec.shape == (5, 6)
    assert SMALL.grid == (2, 3)
    posterior = jax.jit(SMALL.encode)(params, images)
    assert posterior.mean.shape == posterior.logvar.shape == (3, 5, 6)
    decoded = jax.jit(SMALL.decode)(params, posterior.mode())
    assert decoded.shape == images.shape
    assert decoded.dtype == jnp.float32


def test_encode_and_decode_are_deterministic_and_per_sample(params: dict, images: jax.Array) -> None:
    encode, decode = jax.jit(SMALL.encode), jax.jit(SMALL.decode)
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
    config = KL1DConfig((4, 6, 1), 2, 2, 4, Tower(8, 1, 2), Tower(8, 1, 2))
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
    scanned = dataclasses.replace(SMALL, scan=True, remat="dots")
    np.testing.assert_allclose(
        jax.jit(SMALL.encode)(params, images).mean, jax.jit(scanned.encode)(params, images).mean, rtol=1e-5, atol=1e-5
    )


def test_gradients_reach_every_parameter(params: dict, images: jax.Array) -> None:
    def loss(params: dict) -> jax.Array:
        posterior = SMALL.encode(params, images)
        keys = jax.random.split(jax.random.key(0), 3)
        return jnp.square(SMALL.decode(params, posterior.sample(keys)) - images).mean() + posterior.kl().mean()

    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.abs(leaf).max() > 0, f"no gradient at {jax.tree_util.keystr(path)}"


def test_published_size() -> None:
    """TA-TiTok's S tower over 16x16 patches of 256 px: 8 blocks of width 512, 4 matrices and 2 norms each."""
    shapes = param_shapes(KL1DConfig(encoder=Tower(512, 8, 8), decoder=Tower(512, 8, 8)))
    w = 512
    block = 12 * w * w + 13 * w
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["encoder"]["blocks"])) == 8 * block
    assert shapes["encoder"]["positions"].shape == (257, w)
    assert shapes["encoder"]["latent_positions"].shape == (32, w)
    assert shapes["encoder_out"]["kernel"].shape == (w, 32)
    assert shapes["head"]["kernel"].shape == (w, 768)
    assert shapes["conv_out"]["kernel"].shape == (3, 3, 3, 3)


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
    assert from_json(to_json(SMALL)) == SMALL


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(GenError, match="do not divide into patches"):
        KL1DConfig((8, 9, 1), 2, 4, 8, Tower(16, 1, 2), Tower(16, 1, 2))
    with pytest.raises(GenError, match="not a multiple of its 3 heads"):
        KL1DConfig((8, 8, 1), 2, 4, 8, Tower(16, 1, 3), Tower(16, 1, 2))
