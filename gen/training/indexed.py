"""Work over sample indices: sharded over the mesh and the processes, resumable, one compilation.

Sampling, latent caching, teacher records and reconstructions are this one job with another function and writer.
"""

import contextlib
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from gen.errors import GenError
from gen.files import atomic, read_json, write_json, writing
from gen.progress import Bar
from gen.training.sharding import batch_sharding, microbatch_count, place, replicated

__all__ = [
    "ArrayWriter",
    "Elsewhere",
    "Writer",
    "agreed",
    "padded_block",
    "placed",
    "run_indexed",
    "sample_keys",
]

Rows = Mapping[str, np.ndarray]
Function = Callable[[Any, jax.Array, jax.Array], Mapping[str, jax.Array]]


def sample_keys(seed: int | jax.Array, indices: jax.Array) -> jax.Array:
    """Keys (B,) of samples `indices` (B,) integer: fold_in(key(seed), index). Sample i depends on (seed, i) alone."""
    base = jax.random.key(seed)
    return jax.vmap(lambda index: jax.random.fold_in(base, index))(indices)


class Writer(Protocol):
    """Takes the rows of a job in order. With several processes only process 0's writer is used."""

    @property
    def next(self) -> int:
        """Gives the first row that is not yet safe: where a job, new or interrupted, goes on."""
        ...

    def write(self, first: int, arrays: dict[str, np.ndarray]) -> None:
        """Writes the rows first, first + 1 ... and returns when the call may be repeated from there."""
        ...

    def close(self) -> None:
        """Is called once all rows are written, and may be called twice."""
        ...


class Elsewhere:
    """The writer of processes other than the first: it is never given a row."""

    next = 0

    def write(self, first: int, arrays: dict[str, np.ndarray]) -> None:
        """Is never called: this process has no rows to write."""

    def close(self) -> None:
        """Is never called: there is nothing to close."""


def run_indexed(
    function: Function,
    samples: Sequence[int],
    *,
    batch: int,
    writer: Writer,
    arguments: Any = (),
    mesh: Mesh | None = None,
    label: str = "",
    on_batch: Callable[[int, int], None] | None = None,
    read: Callable[[np.ndarray], Mapping[str, np.ndarray]] | None = None,
    title: Callable[[int], str] = "sample {}".format,
) -> None:
    """Computes the samples with these indices in order and hands them to `writer` as rows 0, 1, 2 ...

    Goes on at ``writer.next`` and closes the writer after the last row. The next batch is computed while the
    last one is written.

    Args:
      function: ``(arguments, indices (B,) int32, weight (B,) float32) -> {name: (B, ...)}``; pure, jitted here once.
        Sample i must depend on indices[i] (and `arguments`) alone. The last batch is padded: there weight is 0 and
        the index repeats a valid one; those rows never reach the writer.
      samples: their indices, 0 to 2^31 - 1: a range, or any others.
      batch: global batch size; smaller when there are fewer samples.
      writer: takes the rows.
      arguments: tree of arrays (parameters ...); what does not already lie on the mesh is copied to every device.
      mesh: batches are split over its data and fsdp axes; None is the default device.
      label: what the progress line on stderr says; "" for none.
      on_batch: called as (rows done, number of samples) after each batch is written.
      read: what the host reads for samples `indices` (B,), (B, ...) by name, a batch at a time while the last one is
        computed; `function` then gets ``(arguments, rows)`` in place of the arguments.
      title: how messages call a sample, by its index.

    Raises:
      GenError: a batch that the mesh does not divide, indices beyond int32, a NaN or infinite result (naming the
        sample), or what the writer raises.
    """
    count = len(samples)
    if not count or min(samples) < 0 or max(samples) >= 2**31:
        given = f"indices {min(samples)} to {max(samples)}" if count else "no samples"
        raise GenError(f"{given}; expected at least one sample, with indices in 0 to 2147483647")
    numbers = np.asarray(samples, np.int32)
    parts = _parts(batch, mesh)
    batch = max(parts, min(batch, -(-count // parts) * parts))
    row = int(agreed(np.asarray(writer.next if jax.process_index() == 0 else 0, np.int32)))
    progress = Bar(label if jax.process_index() == 0 else "")
    progress(row, count)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        arguments = placed(arguments, mesh)
        program = jax.jit(function, out_shardings=None if mesh is None else batch_sharding(mesh))

        def block(first: int) -> tuple[Any, jax.Array, jax.Array]:
            chosen = numbers[np.minimum(first + np.arange(batch), count - 1)]
            indices, weight = _on_mesh((chosen, _weights(first, count, batch)), mesh)
            given = arguments if read is None else (arguments, _on_mesh(dict(read(chosen)), mesh))
            return given, indices, weight

        if row < count:
            _check_rows(jax.eval_shape(program, *block(0)), batch)
        pending: tuple[int, int, Mapping[str, jax.Array]] | None = None
        while row < count or pending:
            running = None
            if row < count:
                rows = min(batch, count - row)
                running = row, rows, program(*block(row))
                row += rows
            if pending:
                _deliver(pending, numbers, writer, title)
                progress(pending[0] + pending[1], count)
                if on_batch is not None:
                    on_batch(pending[0] + pending[1], count)
            pending = running
    if jax.process_index() == 0:
        writer.close()
    agreed(np.zeros((), np.int32))  # nobody goes on before the rows are there to be read


def _parts(batch: int, mesh: Mesh | None) -> int:
    """Number of devices that share a batch. Raises GenError when they do not divide it."""
    sizes = {"data": 1, "fsdp": 1} if mesh is None else mesh.shape
    microbatch_count(batch, None, sizes)
    return int(sizes["data"] * sizes["fsdp"])


def agreed(values: np.ndarray) -> np.ndarray:
    """Process 0's values, an int32 array of one shape for all, on all processes."""
    return values if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(values))


def placed(tree: Any, mesh: Mesh | None) -> Any:
    """Puts a tree of arrays on the devices once, whole on each; what already lies on the mesh stays as it is."""

    def put(leaf: Any) -> jax.Array:
        there = isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh
        return jnp.asarray(leaf) if mesh is None or there else place(leaf, replicated(mesh))

    return jax.tree.map(put, tree)


def padded_block(first: int, stop: int, batch: int, mesh: Mesh | None) -> tuple[jax.Array, jax.Array]:
    """Gives indices (B,) int32 and weights (B,) float32 of the batch at `first`; past `stop` the last repeats, weight
    0.
    """
    indices = np.minimum(first + np.arange(batch), stop - 1).astype(np.int32)
    return _on_mesh((indices, _weights(first, stop, batch)), mesh)


def _weights(first: int, stop: int, batch: int) -> np.ndarray:
    """(B,) float32: 1 for rows first .. first + B - 1 before `stop`, 0 for those that only fill the batch."""
    return (first + np.arange(batch) < stop).astype(np.float32)


def _on_mesh(rows: Any, mesh: Mesh | None) -> Any:
    """A tree of rows (B, ...) on the devices, each of which gets its share of the batch."""
    return jax.tree.map(jnp.asarray, rows) if mesh is None else place(rows, batch_sharding(mesh))


def _check_rows(shapes: Mapping[str, Any], batch: int) -> None:
    for name, shape in shapes.items():
        if shape.shape[:1] != (batch,):
            raise GenError(f"an indexed job's '{name}' has shape {shape.shape}; expected {batch} rows, one per sample")


def _deliver(
    made: tuple[int, int, Mapping[str, jax.Array]], numbers: np.ndarray, writer: Writer, title: Callable[[int], str]
) -> None:
    first, rows, arrays = made
    fetched = {}
    for name, array in arrays.items():
        whole = array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True)
        fetched[name] = np.asarray(whole)[:rows]
    for name, values in fetched.items():
        if jnp.issubdtype(values.dtype, jnp.floating):
            bad = np.flatnonzero(~np.isfinite(values.reshape(rows, -1)).all(axis=1))
            if len(bad):
                raise GenError(
                    f"{title(int(numbers[first + bad[0]]))} has a NaN or infinite '{name}'; expected finite numbers; "
                    "look at the weights and the data it came from"
                )
    if jax.process_index() == 0:
        writer.write(first, fetched)


class ArrayWriter:
    """Takes arrays row by row into an .npz or a folder of .npy files that is whole or absent.

    Rows gather in ``<path>.partial``; `close` turns it into `path` in one move. A killed job goes on where it was,
    and at most the last second of work is done again.

    Args:
      path: ``something.npz``, or a folder to be made with one ``<name>.npy`` per array.
      count: number of rows.
      identity: what makes the rows (weights, options ...), as text. Rows begun or finished under another
        identity or count are refused, so that nothing stale passes for this job's.
      about: what else is known of the rows, as JSON; an .npz keeps it in its comment.

    Raises:
      GenError: `path` or its partial folder belongs to another job; the disk or folder does not take the rows.
    """

    def __init__(
        self, path: str | Path, count: int, identity: str = "", about: Mapping[str, Any] | None = None
    ) -> None:
        self.path, self.count, self.identity, self.about = Path(path), count, identity, dict(about or {})
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._fields: dict[str, tuple[int, np.dtype[Any], tuple[int, ...]]] = {}  # header bytes, dtype, row shape
        self._finished = self.path.exists() and not _is_empty_folder(self.path)
        self._durable = 0
        if self._finished:
            self._recognise(self.path, _read_tag(self.path))
            self._durable = count
        elif (self.partial / "next.json").exists():
            self._recognise(self.partial, read_json(self.partial / "rows.json"))
            self._durable = int(read_json(self.partial / "next.json"))
        self._written, self._synced = self._durable, time.monotonic()

    @property
    def next(self) -> int:
        """Gives the first row that is not yet safe on disk."""
        return self._durable

    def write(self, first: int, arrays: Rows) -> None:
        """Rows first, first + 1 ... of every array; they follow on those written before."""
        rows = {len(array) for array in arrays.values()}
        if first != self._written or len(rows) != 1 or first + max(rows) > self.count:
            raise ValueError(f"rows {first} + {rows} do not follow on {self._written} of {self.count}")
        with writing(self.path):
            if not self._fields:
                self._open(arrays)
            for name, array in arrays.items():
                offset, dtype, shape = self._fields[name]
                if array.dtype != dtype or array.shape[1:] != shape:
                    raise ValueError(f"'{name}' is {array.dtype} {array.shape[1:]}, its first rows {dtype} {shape}")
                data = np.ascontiguousarray(array).tobytes()
                with open(self._file(name), "r+b") as file:
                    file.seek(offset + first * (len(data) // len(array)))
                    file.write(data)
        self._written = first + max(rows)
        # Syncing costs milliseconds on a disk; once a second is often enough.
        if time.monotonic() - self._synced > 1:
            self._sync()

    def close(self) -> None:
        """Makes the rows safe and, when all are there, moves them to `path`. May be called twice."""
        if self._finished:
            return
        if not self._fields and self._written:  # a job killed between its last row and the move
            self._open({})
        self._sync()
        if self._written == self.count:
            with writing(self.path):
                self._finish()
            self._finished = True

    def _file(self, name: str) -> Path:
        return self.partial / f"{name}.npy"

    def _recognise(self, where: Path, tag: Any) -> None:
        expected = {"count": self.count, "identity": self.identity}
        if not isinstance(tag, dict) or {key: tag.get(key) for key in expected} != expected:
            raise GenError(
                f"{where} exists and was not made by this job ({self.count} rows, same weights and options); "
                "delete it or choose another output"
            )

    def _open(self, arrays: Rows) -> None:
        """Takes up the partial files of an interrupted job, or makes new ones for `arrays`."""
        tag = self.partial / "rows.json"
        if not self._durable:
            shutil.rmtree(self.partial, ignore_errors=True)  # what was left before anything was safe
            self.partial.mkdir(parents=True)
            fields = {name: [array.dtype.str, list(array.shape[1:])] for name, array in arrays.items()}
            for name, (dtype, shape) in fields.items():
                header = {"descr": dtype, "fortran_order": False, "shape": (self.count, *shape)}
                with open(self._file(name), "wb") as file:
                    np.lib.format.write_array_header_1_0(file, header)
            write_json(tag, {"count": self.count, "identity": self.identity, "fields": fields})
        for name, (dtype, shape) in read_json(tag)["fields"].items():
            with open(self._file(name), "rb") as file:
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
                self._fields[name] = file.tell(), np.dtype(dtype), tuple(shape)

    def _sync(self) -> None:
        if self._written > self._durable:
            with writing(self.path):
                for name in self._fields:
                    with open(self._file(name), "rb") as file:
                        os.fsync(file.fileno())
                write_json(self.partial / "next.json", self._written)
            self._durable, self._synced = self._written, time.monotonic()

    def _finish(self) -> None:
        if self.path.suffix != ".npz":
            os.replace(self.partial, self.path)
            (self.path / "next.json").unlink()
            return

        def pack(out: IO[bytes]) -> None:
            with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
                tag = {"count": self.count, "identity": self.identity} | self.about
                archive.comment = json.dumps(tag).encode()
                for name in self._fields:
                    member = zipfile.ZipInfo(f"{name}.npy")  # dated 1980: equal rows are equal bytes
                    with open(self._file(name), "rb") as rows, archive.open(member, "w", force_zip64=True) as target:
                        shutil.copyfileobj(rows, target, 1 << 20)

        atomic(self.path, pack)
        shutil.rmtree(self.partial, ignore_errors=True)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _read_tag(path: Path) -> Any:
    """Count and identity of finished rows; None when they are not an `ArrayWriter`'s."""
    try:
        if path.is_dir():
            return json.loads((path / "rows.json").read_text())
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.comment)
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
