"""Device meshes and the one rule by which array shapes decide sharding."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gen.arrays import flatten, map_paths
from gen.errors import GenError
from gen.nn import mesh as axes

__all__ = [
    "AXES",
    "MeshConfig",
    "batch_parts",
    "batch_sharding",
    "bytes_per_device",
    "constrain",
    "cut_parts",
    "make_mesh",
    "mesh_sizes",
    "microbatch_count",
    "place",
    "replicated",
    "shardings",
    "spec",
]

AXES = ("student", "data", "fsdp", "tensor")
STUDENTS = "students"  # arrays whose path has this name hold several students on axis 0


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out. One axis may be -1: the rest of the devices.

    Attributes:
      data: copies of the model, each on its part of the batch.
      fsdp: parts into which parameters, optimiser state and averages are cut; also splits the batch.
      tensor: parts into which weights and the work on them are cut; does not split the batch.
      shard_from: arrays with fewer elements are kept whole on every device.
      student: groups of devices for the students of one run (`gen.distill.multi_student`), each with its own rows of
        the batch; a mesh has this axis only where there are several.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    shard_from: int = 2**16
    student: int = 1


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Axis sizes for a number of devices. Raises GenError unless their product is that number."""
    sizes = {axis: getattr(config, axis) for axis in AXES if axis != "student" or config.student != 1}
    text = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise GenError(f"mesh {text} is not valid; axes are positive, at most one is -1 (the rest of the devices)")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1 and devices % fixed == 0:
            sizes[axis] = devices // fixed
    if math.prod(sizes.values()) != devices:
        raise GenError(f"mesh {text} does not fit {devices} devices; make the product {devices}, or one axis -1")
    return sizes


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[Any] | None = None) -> Mesh:
    """Gives the mesh over `devices`, by default all devices of all processes, with Auto axes named as in `AXES`.

    Raises GenError when the axes do not multiply to the number of devices.
    """
    sizes = mesh_sizes(config, jax.device_count() if devices is None else len(devices))
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def spec(path: str, shape: tuple[int, ...], sizes: Mapping[str, int], shard_from: int = 2**16) -> P:
    """Applies the one rule: the largest axis that divides is cut by "tensor" and "fsdp" together, else by the one that
    fits.

    Never one axis by "tensor" and another by "fsdp": from such weights XLA computes wrong sums when the batch is cut
    by "fsdp" as well (jax 0.10, a mesh of all three axes; the devices test of a transformer shows it).
    The layer axis of stacked blocks (axis 0 of arrays whose path names "blocks") is never cut: a scan slices it.
    Small arrays stay whole. Optimiser moments and averages have the shapes of their parameters, hence their layout.
    Arrays of several students are cut by "student" along their first axis, whatever their size; the rule holds for the
    others.

    Args:
      path: the array's path in the tree (`gen.arrays.flatten`).
      shape: its shape.
      sizes: mesh axis sizes by name.
      shard_from: number of elements below which an array is kept whole.
    """
    cuts = _cuts(path, shape, sizes, shard_from)
    return P(*(_one(cuts.get(i, ())) for i in range(len(shape)))) if cuts else P()


def _one(names: tuple[str, ...]) -> Any:
    """Mesh axes as a partition of one array axis."""
    return names[0] if len(names) == 1 else names or None


def _cuts(path: str, shape: tuple[int, ...], sizes: Mapping[str, int], shard_from: int) -> dict[int, tuple[str, ...]]:
    """The mesh axes by the array axis that they cut."""
    if STUDENTS not in path.split("/"):
        names, best = _cut(path, shape, sizes, shard_from)
        return {best: names} if names else {}
    students = sizes.get("student", 1)
    if students > 1 and shape[0] % students:
        raise GenError(f"{shape[0]} students do not divide over a mesh of student={students}; choose a divisor")
    names, best = _cut(path, shape[1:], sizes, shard_from)
    return ({0: ("student",)} if students > 1 else {}) | ({best + 1: names} if names else {})


def _cut(path: str, shape: tuple[int, ...], sizes: Mapping[str, int], shard_from: int) -> tuple[tuple[str, ...], int]:
    """The mesh axes that cut an array, and which of its axes they cut; ((), 0) for an array kept whole."""
    used = tuple(axis for axis in ("tensor", "fsdp") if sizes[axis] > 1)
    if not used or math.prod(shape) < shard_from:
        return (), 0
    free = range(1 if "blocks" in path else 0, len(shape))
    for names in (used, *((axis,) for axis in used)):
        axis = axes.largest_axis(shape, math.prod(sizes[name] for name in names), free)
        if axis is not None:
            return names, axis
    return (), 0


def shardings(tree: Any, mesh: Mesh, shard_from: int = 2**16) -> Any:
    """Gives the tree of NamedShardings that `spec` gives for a tree of arrays or shapes."""

    def rule(path: str, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec(path, leaf.shape, mesh.shape, shard_from))

    return map_paths(rule, tree)


def bytes_per_device(tree: Any, sizes: Mapping[str, int], shard_from: int = 2**16) -> int:
    """Gives the bytes that one device holds of a tree of arrays or shapes, under the rule, on a mesh of these axis
    sizes.
    """
    total = 0
    for path, leaf in flatten(tree).items():
        parts = _parts(path, leaf.shape, sizes, shard_from)
        total += leaf.size * leaf.dtype.itemsize // parts
    return total


def cut_parts(tree: Any, sizes: Mapping[str, int], shard_from: int = 2**16) -> dict[tuple[int, ...], int]:
    """Gives into how many parts the rule cuts the arrays of each shape in a tree of arrays or shapes; only those it
    cuts.
    """
    parts: dict[tuple[int, ...], int] = {}
    for path, leaf in flatten(tree).items():
        count = _parts(path, leaf.shape, sizes, shard_from)
        if count > 1:
            parts[tuple(leaf.shape)] = count
    return parts


def _parts(path: str, shape: tuple[int, ...], sizes: Mapping[str, int], shard_from: int) -> int:
    """The number of parts into which the rule cuts an array."""
    cuts = _cuts(path, shape, sizes, shard_from)
    return math.prod(sizes[name] for names in cuts.values() for name in names)


def batch_parts(sizes: Mapping[str, int]) -> int:
    """Gives the number of parts into which a global batch is cut over devices."""
    return math.prod(sizes[axis] for axis in ("student", *axes.BATCH_AXES) if axis in sizes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 over the data and fsdp axes, and outside of them that of students; the rest whole."""
    return NamedSharding(mesh, P(tuple(axis for axis in ("student", *axes.BATCH_AXES) if axis in mesh.shape)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Gives the same array on every device."""
    return NamedSharding(mesh, P())


def place(tree: Any, where: Any) -> Any:
    """Puts a tree of arrays onto the devices of a mesh; every array enters a mesh here.

    With several processes each of them holds the same whole arrays (weights loaded from a file, say) and keeps the
    parts that its own devices need. `jax.device_put` refuses that of arrays that already lie on a local device.

    Args:
      tree: NumPy arrays, or jax arrays of this process or of the whole mesh.
      where: a sharding for all, or a tree of shardings.
    """

    def put(leaf: Any, sharding: Any) -> jax.Array:
        if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            return jax.device_put(leaf, sharding)
        whole = np.asarray(leaf)
        whole = whole.astype(jax.dtypes.canonicalize_dtype(whole.dtype))
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    if isinstance(where, jax.sharding.Sharding):
        return jax.tree.map(lambda leaf: put(leaf, where), tree)
    return jax.tree.map(put, tree, where)


def microbatch_count(batch: int, batch_gpu: int | None, sizes: Mapping[str, int]) -> int:
    """Gives the number of microbatches into which a global batch is cut so that one device handles `batch_gpu` at a
    time.

    Raises GenError when the batch does not divide over the devices, or a device's part over microbatches.
    """
    parts = batch_parts(sizes)
    if batch < 1 or batch % parts:
        raise GenError(f"batch {batch} does not divide over {parts} devices (data x fsdp); use a multiple of {parts}")
    local = batch // parts
    if batch_gpu is None:
        return 1
    if batch_gpu < 1 or local % batch_gpu:
        raise GenError(f"batch-gpu {batch_gpu} does not divide the {local} images each device has of batch {batch}")
    return local // batch_gpu


def constrain(x: jax.Array, *, axis: int = 0) -> jax.Array:
    """Keeps activations split over the batch: to be called on the residual stream at each block.

    The identity when no mesh is set (`jax.set_mesh`), on one device, or when `axis` does not divide.
    """
    parts = axes.ambient_parts()
    if parts == 1 or x.ndim <= axis or x.shape[axis] % parts:
        return x
    return jax.lax.with_sharding_constraint(x, P(*[None] * axis, axes.BATCH_AXES))
