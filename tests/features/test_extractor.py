import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from gen.features.extractor import in_parts
from tests.processes import devices


def wide(params, images):
    """A toy network whose maps are 64 times as large as its images."""
    maps = jnp.repeat(images.mean(-1, keepdims=True), 64, -1) * jnp.arange(1.0, 65.0)
    return {"features": jnp.cos(jnp.sort(maps, axis=1) / 64 * params).mean((1, 2)), "first": images[:, 0, 0]}


def test_parts_change_nothing():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(12, 4, 5, 3)), jnp.float32)
    whole = wide(2.0, images)
    for count, size in ((12, 4), (12, 5), (7, 4), (1, 4)):
        found = jax.jit(lambda p, x, size=size: in_parts(wide, p, x, size))(2.0, images[:count])
        for name, array in found.items():
            np.testing.assert_allclose(array, whole[name][:count], rtol=1e-5, atol=1e-5)


def test_memory_does_not_grow_with_the_batch():
    def needed(batch):
        images = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32)
        compiled = jax.jit(lambda p, x: in_parts(wide, p, x, 4)["features"]).lower(2.0, images).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert needed(64) - needed(8) < 2 * 64 * 32 * 32 * 3 * 4  # the batch itself, not its maps


_MESH = """
import jax, jax.numpy as jnp, numpy as np
from gen.features.extractor import in_parts
from gen.training.sharding import MeshConfig, batch_sharding, make_mesh
from tests.features.test_extractor import wide

images = np.random.default_rng(0).normal(size=(24, 4, 5, 3)).astype(np.float32)
mesh = make_mesh(MeshConfig(2, 2, 2))
with jax.set_mesh(mesh):
    split = jax.device_put(images, batch_sharding(mesh))
    run = jax.jit(lambda p, x: in_parts(wide, p, x, 4)).lower(2.0, split).compile()
    found = run(2.0, split)
text = run.as_text()
assert "while" in text and not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
np.testing.assert_allclose(found["features"], wide(2.0, images)["features"], rtol=1e-5, atol=1e-5)
np.testing.assert_array_equal(found["first"], images[:, 0, 0])
"""


def test_parts_stay_on_their_device():
    subprocess.run([sys.executable, "-c", _MESH], env=os.environ | devices(8), check=True, timeout=300)
