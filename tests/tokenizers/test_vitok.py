import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.errors import GenError
from gen.nn.network import Network, count, param_shapes
from gen.tokenizers.trunk import Tower
from gen.tokenizers.vitok import SIZES, ViTokConfig, position_table, vitok

VIDEO = ViTokConfig((4, 8, 8, 3), 4, 2, 5, Tower(24, 1, 2), Tower(24, 1, 2), positions="3d", scan=False)
STACKS = {"S": 42.55, "B": 85.10, "L": 382.77}  # millions in the blocks and the last norm, counted from the release


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name: str) -> None:
    config = vitok(f"{name}-{name}/16")
    shapes = param_shapes(config)
    assert count(shapes["encoder"]) == count(shapes["decoder"])
    assert round(count(shapes["encoder"]) / 1e6, 2) == STACKS[name]
    assert config.spec.shape == (16, 16, 16)


def test_the_paper_s_encoder_is_narrower_than_its_decoder() -> None:
    """S-B/16 has 129.0 M parameters, S-L/16 426.8 M (paper, table 2)."""
    assert round(count(param_shapes(vitok("S-B/16"))) / 1e6) == 129
    assert abs(count(param_shapes(vitok("S-L/16"))) / 1e6 - 426.8) < 0.5


def test_videos() -> None:
    """Latents along time as well; the raster's angles and the table run over frames, rows and columns."""
    config = VIDEO
    assert config.spec.shape == (2, 2, 2, 5)
    assert config.spec.image == (4, 8, 8, 3)
    with pytest.raises(GenError, match=r"takes videos \(4, 8, 8, 3\), and the data are images"):
        _ = config.spec.picture
    params = jax.jit(Network(config).init)(jax.random.key(0))
    videos = jax.random.uniform(jax.random.key(1), (2, *config.image), minval=-1.0)
    encode = jax.jit(config.encode)
    posterior = encode(params, videos)
    assert posterior.mean.shape == (2, 2, 2, 2, 5)
    decoded = jax.jit(config.decode)(params, posterior.mode())
    assert (decoded.shape, decoded.dtype) == (videos.shape, jnp.float32)
    # a token sees its own frames through the embedding, and all others through attention
    moved = encode(params, videos.at[:, 2:].set(0.0)).mean
    assert (np.abs(moved - posterior.mean).max(axis=(2, 3, 4)) > 1e-4).all()
    assert position_table((2, 3, 4), 24, "3d").shape == (24, 24)
    released = vitok("S-B/4x16", image=(24, 256, 256, 3))
    assert (released.frames, released.spec.shape) == (4, (6, 16, 16, 16))


def test_refusals() -> None:
    with pytest.raises(GenError, match="unknown ViTok 'S-XL/16'; did you mean 'S-L/16'"):
        vitok("S-XL/16")
    with pytest.raises(GenError, match="250x256 pixels do not divide into patches of 16x16"):
        vitok("S-B/16", image=(250, 256, 3))
    with pytest.raises(GenError, match=r"with patches of 4 frames; give \(H, W, C\) and 1"):
        vitok("S-B/4x16")
    with pytest.raises(GenError, match='rotary "2d" is that of images'):
        dataclasses.replace(VIDEO, rotary="2d")
    with pytest.raises(GenError, match='"2d" is of images, "3d" of videos'):
        dataclasses.replace(VIDEO, positions="2d")
    with pytest.raises(GenError, match="width 24 is not a multiple of its 5 heads"):
        Tower(24, 1, 5)
    shapes = param_shapes(VIDEO)
    with pytest.raises(GenError, match=r"this ViTok takes \(B, 4, 8, 8, 3\)"):
        jax.eval_shape(VIDEO.encode, shapes, jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(GenError, match="this ViTok decodes"):
        jax.eval_shape(VIDEO.decode, shapes, jnp.zeros((1, 2, 2, 5)))
