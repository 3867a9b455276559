"""FlexTok's decoder: cached writing, and the samplers of token maps and bits on eight devices."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.autoregressive.decoding import drawn, filtered, mix
from gen.autoregressive.flextok_ar import FlexTokARConfig
from gen.autoregressive.generator import TokenGenerator
from gen.autoregressive.sampler import both
from gen.errors import GenError
from tests.autoregressive.test_writers import SAMPLER, noisy

MODEL = FlexTokARConfig((6,), 11, 16, 2, 2, 16, num_classes=3, positions="sincos")


@pytest.mark.slow
def test_cached_writing_is_full_recomputation() -> None:
    params, keys = noisy(MODEL), jax.random.split(jax.random.key(3), 4)
    cond = {"label": jnp.arange(4, dtype=jnp.int32) % 3}
    tokens = jax.jit(TokenGenerator(MODEL, SAMPLER).tokens)({"net": params}, keys, cond)

    @jax.jit
    def again(tokens: jax.Array) -> jax.Array:
        own, null = jnp.split(MODEL.logits(params, jnp.concatenate([tokens] * 2), both(MODEL, params, cond)), 2)
        scales = jnp.asarray(SAMPLER.guidance.scales(MODEL.length), jnp.float32)[:, None]
        kept = filtered(mix(own, null, scales), temperature=0.9, k=8, p=0.95)
        return jnp.stack([drawn(keys, kept[:, i], i) for i in range(MODEL.length)], axis=1)

    np.testing.assert_array_equal(tokens, again(tokens))


def test_refusals() -> None:
    with pytest.raises(GenError, match="are no row"):
        FlexTokARConfig((4, 4))
    with pytest.raises(GenError, match="heads and 4 parts"):
        FlexTokARConfig(heads=7)


DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from gen.training.sharding import MeshConfig, make_mesh, place, shardings
from gen.autoregressive.binary_diffusion import BinaryDiffusion
from gen.autoregressive.binary_sampler import BinarySampler
from gen.autoregressive.binary_transformer import BinaryTransformerConfig
from gen.autoregressive.bits import BitSampler
from gen.autoregressive.decoding import ConstantScale
from gen.autoregressive.generator import TokenGenerator
from tests.autoregressive.test_bits import AR, captions
from tests.autoregressive.test_flextok_ar import MODEL as ROW
from tests.autoregressive.test_var import MODEL, SAMPLER, TOKENIZER
from tests.autoregressive.test_writers import SAMPLER as WRITER, noisy
label = {"label": jnp.arange(8, dtype=jnp.int32) % 3}
flips = BinaryDiffusion(BinaryTransformerConfig((2, 2, 3), 16, 1, 2, 3), levels=4)
cases = {
    "var": (TokenGenerator(MODEL, SAMPLER, TOKENIZER), label),
    "row": (TokenGenerator(ROW, WRITER), label),
    "bits": (TokenGenerator(AR, BitSampler(ConstantScale(2.0))), captions(8)),
    "flips": (TokenGenerator(flips, BinarySampler(steps=4, guidance=2.0)), label),
}
keys = jax.random.split(jax.random.key(3), 8)
for name, (generator, cond) in cases.items():
    tree = {role: noisy(network) for role, network in generator.networks.items()}
    one = jax.jit(generator.tokens)(tree, keys, cond)
    for config in (MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2, shard_from=1)):
        mesh = make_mesh(config)
        params = place(tree, shardings(tree, mesh, config.shard_from))
        with jax.set_mesh(mesh):
            found = jax.jit(generator.tokens)(params, keys, cond)
        np.testing.assert_array_equal(found, one, err_msg=f"{name} {config}")
print("same", jax.device_count())
"""


@pytest.mark.slow
def test_eight_devices_draw_what_one_does() -> None:
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(
        [sys.executable, "-c", DEVICES], env=os.environ | devices, capture_output=True, text=True, timeout=900
    )
    assert ran.stdout.strip() == "same 8", ran.stderr[-3000:]
