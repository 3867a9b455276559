import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gen.errors import GenError
from gen.training.sharding import (
    MeshConfig,
    bytes_per_device,
    constrain,
    make_mesh,
    mesh_sizes,
    microbatch_count,
    shardings,
    spec,
)

SIZES = {"data": 2, "fsdp": 4, "tensor": 2}


def test_mesh_sizes() -> None:
    assert mesh_sizes(MeshConfig(), 8) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert mesh_sizes(MeshConfig(data=2, fsdp=-1, tensor=2), 8) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(fsdp=3), MeshConfig(0), MeshConfig(-1, -1)])
def test_a_mesh_that_does_not_fit_is_refused(config: MeshConfig) -> None:
    with pytest.raises(GenError, match="mesh data="):
        mesh_sizes(config, 8)


def test_rule() -> None:
    both = ("tensor", "fsdp")
    assert spec("w", (64, 256), SIZES, 1) == P(None, both)  # the widest axis
    assert spec("w", (256, 64), SIZES, 1) == P(both, None)
    assert spec("blocks/w", (512, 64, 256), SIZES, 1) == P(None, None, both)  # never the layer axis
    assert spec("w", (64, 256), SIZES, 2**16) == P()  # small
    assert spec("w", (63, 5), SIZES, 1) == P()  # nothing divides
    assert spec("w", (6, 9), SIZES, 1) == P("tensor", None)
    assert spec("w", (6, 9), {"data": 1, "fsdp": 3, "tensor": 1}, 1) == P(None, "fsdp")


def test_students_are_cut_along_their_axis() -> None:
    """Whatever their size; the rule holds for each, and a mesh without the axis keeps them side by side."""
    sizes = {"student": 2, **SIZES}
    assert spec("params/students/w", (4, 64, 256), sizes, 1) == P("student", None, ("tensor", "fsdp"))
    assert spec("params/students/blocks/w", (2, 512, 64, 256), sizes, 1) == P("student", None, None, ("tensor", "fsdp"))
    assert spec("params/students/bias", (4, 3), sizes, 2**16) == P("student", None)
    assert spec("params/students/updates", (4,), sizes) == P("student")
    assert spec("params/students/w", (4, 64, 256), SIZES, 1) == P(None, None, ("tensor", "fsdp"))
    tree = {"students": {"w": jax.ShapeDtypeStruct((4, 64, 256), jnp.float32)}}
    assert bytes_per_device(tree, sizes, 16) == 4 * 64 * 256 * 4 // 16
    assert microbatch_count(64, 2, sizes) == 2
    assert mesh_sizes(MeshConfig(student=4), 8) == {"student": 4, "data": 2, "fsdp": 1, "tensor": 1}
    with pytest.raises(GenError, match="3 students do not divide over a mesh of student=2"):
        spec("params/students/w", (3, 4), sizes)


def test_bytes_per_device_follows_the_rule() -> None:
    tree = {"w": jax.ShapeDtypeStruct((64, 256), jnp.float32), "b": jax.ShapeDtypeStruct((3,), jnp.float32)}
    assert bytes_per_device(tree, SIZES, 16) == 64 * 256 * 4 // 8 + 12


def test_microbatches() -> None:
    assert microbatch_count(64, None, SIZES) == 1
    assert microbatch_count(64, 2, SIZES) == 4
    with pytest.raises(GenError, match="multiple of 8"):
        microbatch_count(12, None, SIZES)
    with pytest.raises(GenError, match="batch-gpu 3"):
        microbatch_count(64, 3, SIZES)


def test_on_this_machine() -> None:
    mesh = make_mesh()
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    tree = {"w": jnp.ones((4, 4))}
    assert jax.device_put(tree, shardings(tree, mesh))["w"].sharding.mesh == mesh


def test_constrain_without_a_mesh_is_the_identity() -> None:
    x = jnp.ones((4, 2))
    assert constrain(x) is x
    np.testing.assert_array_equal(jax.jit(constrain)(x), x)
