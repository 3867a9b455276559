"""Weights that are whole while a layer uses them, on a mesh that need not be there."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from gen.nn.mesh import gathered, largest_axis


def cuts(function: Any, *arrays: jax.Array, **sizes: int) -> set[str]:
    """The layouts that a program asks for on a mesh of these sizes."""
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    with jax.sharding.use_abstract_mesh(mesh):
        return set(re.findall(r"spec=P\(([^)]*)\)", str(jax.make_jaxpr(function)(*arrays))))


def slope(kernels: jax.Array, x: jax.Array) -> jax.Array:
    """A number made of derivatives in forward mode through a scanned, rematerialised stack."""

    def run(x: jax.Array) -> jax.Array:
        def body(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
            return jnp.sin(x @ gathered(kernel)), None

        return jax.lax.scan(jax.checkpoint(body), x, kernels)[0]

    return jnp.square(jax.jvp(run, (x,), (x,))[1]).sum()


def test_gradients_of_gathered_matrices_are_cut_as_they_are_stored_where_there_are_copies() -> None:
    kernels, x = jnp.zeros((3, 128, 128)), jnp.zeros((8, 128))
    assert cuts(jax.grad(slope), kernels, x, data=2, fsdp=4) == {"", "None, 'fsdp'"}
    assert cuts(jax.grad(slope), kernels, x, data=2, fsdp=4, tensor=2) == set()
    assert cuts(jax.grad(slope), kernels, x, data=8, fsdp=1) == set()
    assert cuts(jax.grad(slope), kernels, x, data=1, fsdp=4) == {""}
    small, vector = jnp.zeros((3, 8, 8)), jnp.zeros((8,))
    assert cuts(jax.grad(slope), small, jnp.zeros((8, 8)), data=2, fsdp=4) == {""}
    assert cuts(jax.grad(lambda bias: jnp.square(gathered(bias)).sum()), vector, data=2, fsdp=4) == {""}
    assert cuts(jax.grad(lambda table: gathered(table, table=True)[0].sum()), kernels[0], data=2, fsdp=4) == {""}


def test_the_largest_axis_that_the_parts_divide_is_cut() -> None:
    assert largest_axis((3, 3, 64, 128), 8) == 3
    assert largest_axis((128, 128), 8) == 1
    assert largest_axis((256, 100), 8) == 0
    assert largest_axis((256, 64), 8, range(1, 2)) == 1
    assert largest_axis((3, 5), 8) is None
