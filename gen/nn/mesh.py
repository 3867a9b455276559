"""The axes of a device mesh over which a batch is split, and how many parts that makes where a mesh is set."""

import math

import jax

__all__ = ["BATCH_AXES", "ambient_parts"]

BATCH_AXES = ("data", "fsdp")


def ambient_parts() -> int:
    """Gives the number of parts into which the ambient mesh (`jax.set_mesh`) splits a batch; 1 where none is set."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return math.prod(sizes.get(name, 1) for name in BATCH_AXES)
