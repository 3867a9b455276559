"""Networks as structure and arrays: which arrays are buffers, and which parameters are brought back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gen.diffusion.backbones.aligned import AlignedConfig
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.backbones.edm2_unet import EDM2Config
from gen.diffusion.backbones.edm_unet import SongUNetConfig
from gen.nn.layers import stack
from gen.nn.network import Buffer, Network, param_shapes

SONG = SongUNetConfig(8, width=8, mult=(1,), blocks=1, attention=(), embedding="fourier")
EDM2 = EDM2Config(8, 1, 3, (8,), 1, (), times=2)
FOURIER = {
    f"{layer}/{table}" for layer in ("emb_fourier", "emb_fourier2", "logvar_fourier") for table in ("freqs", "phases")
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SONG, {"map/freqs"}),
        (dataclasses.replace(SONG, embedding="positional"), set()),
        (EDM2, FOURIER),
        (AlignedConfig(DiTConfig((4,), 2, 1, 8, 2, 2), "block_0", (3,), 4), set()),
    ],
    ids=["song", "positional", "edm2", "aligned"],
)
def test_fixed_frequencies_are_buffers(config, expected) -> None:
    buffers = Network(config).buffers
    assert buffers == expected
    paths = {"/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(param_shapes(config))}
    assert buffers < paths


@dataclasses.dataclass(frozen=True)
class Shift:
    """Stacked layers, each x * gain + mean, where the mean is a buffer."""

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return stack(lambda rngs: _Shift(rngs), 2, rngs)


class _Shift(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.gain = nnx.Param(jax.random.normal(rngs.params(), (3,)))
        self.mean = Buffer(jnp.ones((3,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.gain[...] + self.mean[...]


def test_buffers_are_arguments_like_parameters() -> None:
    net = Network(Shift())
    params = net.init(jax.random.key(0))
    assert net.buffers == {"mean"}
    assert jax.tree.map(jnp.shape, params) == {"gain": (2, 3), "mean": (2, 3)}
    x = jnp.arange(3.0)
    run = jax.jit(net.apply)
    np.testing.assert_allclose(run(params, x), x * params["gain"] + 1.0, rtol=1e-6)
    np.testing.assert_allclose(run({**params, "mean": params["mean"] + 2.0}, x), x * params["gain"] + 3.0, rtol=1e-6)


def test_projection_is_edm2_s_forced_weight_normalisation() -> None:
    net = Network(EDM2)
    params = jax.tree.map(lambda s: 2.0 + jnp.arange(s.size, dtype=jnp.float32).reshape(s.shape), param_shapes(EDM2))
    projected = net.project(params)
    for weight in (projected["emb_noise"]["kernel"], projected["enc"]["8x8_block0"]["conv_res0"]["kernel"]):
        np.testing.assert_allclose(jnp.square(weight).mean(tuple(range(weight.ndim - 1))), 1.0, rtol=1e-3)
    for name in ("emb_fourier", "emb_gain2", "out_gain"):
        jax.tree.map(np.testing.assert_array_equal, projected[name], params[name])
    assert Network(SONG).project({"a": 1}) == {"a": 1}
