"""One pass over samples: make, quantise, extract features, accumulate; all in one jitted step over the mesh."""

import contextlib
import dataclasses
import functools
import io
import json
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from gen.errors import GenError
from gen.features.extractor import Extractor, accepts
from gen.files import atomic
from gen.metrics.sources import QUANTISERS, ImageSet
from gen.metrics.statistics import Accumulator, Statistic
from gen.training.indexed import padded_block, placed
from gen.training.sharding import batch_sharding, microbatch_count, replicated

__all__ = ["Progress", "Tally", "collect", "merge_tallies", "traced_step"]

Progress = Callable[[int, int], None]  # (samples done, samples asked for)
_FLUSH = 2048  # samples after which the device's float32 sums are merged into the host's float64 ones
_SAVE_SECONDS = 20.0  # between partial results on the disk
_NONE_BAD = np.iinfo(np.int32).max


@dataclasses.dataclass
class Tally:
    """Accumulated statistics of a set of sample indices, on the host.

    Attributes:
      identity: what was accumulated: source, feature network, statistics; equal tallies of one job may be merged.
      spans: disjoint, sorted index ranges (start, stop) that are in.
      accumulators: by statistic's name.
    """

    identity: str
    spans: tuple[tuple[int, int], ...]
    accumulators: dict[str, Accumulator]

    @property
    def count(self) -> int:
        """Gives the number of samples that are in."""
        return sum(stop - start for start, stop in self.spans)

    def save(self, path: str | Path) -> None:
        """Writes an .npz, whole or not at all."""
        arrays = {f"{name}/{key}": a for name, acc in self.accumulators.items() for key, a in acc.items()}
        head = json.dumps({"identity": self.identity, "spans": self.spans})
        buffer = io.BytesIO()
        np.savez(buffer, head=np.array(head), **arrays)
        atomic(path, lambda file: file.write(buffer.getbuffer()))

    @classmethod
    def load(cls, path: str | Path) -> "Tally":
        """Reads what `save` wrote. Raises GenError when it is something else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                head = json.loads(str(file["head"]))
                accumulators: dict[str, Accumulator] = {}
                for name in file.files:
                    statistic, _, key = name.partition("/")
                    if key:
                        accumulators.setdefault(statistic, {})[key] = file[name]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise GenError(f"{path} holds no partial evaluation ({error}); delete it and evaluate again") from None
        return cls(head["identity"], tuple((int(a), int(b)) for a, b in head["spans"]), accumulators)


def merge_tallies(tallies: Sequence[Tally], statistics: Mapping[str, Statistic]) -> Tally:
    """Gives one tally of several disjoint parts of the same job (from several machines, say).

    Raises GenError when they belong to different jobs or share samples.
    """
    if not tallies:
        raise GenError("no partial evaluations to merge; expected at least one; check the paths")
    total = tallies[0]
    for other in tallies[1:]:
        if other.identity != total.identity:
            raise GenError(
                f"partial evaluations of different jobs cannot be merged: '{total.identity}' and '{other.identity}'; "
                "evaluate the same samples in the same way"
            )
        merged = {name: s.merge(total.accumulators[name], other.accumulators[name]) for name, s in statistics.items()}
        total = Tally(total.identity, _union(total.spans, other.spans), merged)
    return total


def collect(
    source: ImageSet,
    extractor: Extractor,
    statistics: Mapping[str, Statistic],
    *,
    indices: range | None = None,
    batch: int = 256,
    mesh: Mesh | None = None,
    path: str | Path | None = None,
    progress: Progress | None = None,
) -> Tally:
    """Runs over samples and accumulates statistics of their features; one compilation.

    The result does not depend on batch size or number of devices but for float rounding, and is bit-equal for equal
    ones, killed and resumed or not.

    Args:
      source: what is evaluated.
      extractor: the feature network.
      statistics: what is gathered, by name.
      indices: contiguous samples to take; all of the source by default.
      batch: global batch size; the tail is padded and masked.
      mesh: devices to use; the default device without.
      path: partial results (.npz) are kept here, every few thousand samples, and gone on from if the file is there;
        where all processes see it.
      progress: called on the first process, at the start and after every batch.

    Raises:
      GenError: a batch that does not divide over the mesh, samples the source does not have, images the extractor does
        not take, NaN or infinite images or features (naming the sample), a partial file of another job.
    """
    indices = range(source.count) if indices is None else indices
    _check(source, indices, batch, mesh)
    network = f"{extractor.name} {extractor.resize} {extractor.precision} {extractor.fingerprint()}"
    identity = " | ".join([source.identity, source.seeds, source.quantiser, network, repr(statistics)])
    tally = _resume(path, identity, indices) if path is not None and Path(path).exists() else None
    start = indices.start if tally is None else tally.spans[0][1]
    _agree(start, path)

    def report(reached: int) -> None:
        if progress is not None and jax.process_index() == 0:
            progress(min(reached, indices.stop) - indices.start, len(indices))

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        run = _runner(source, extractor, statistics, batch, mesh)
        size = _span(batch)
        saved = time.monotonic()
        report(start)
        for first in range(start, indices.stop, size):
            stop = min(first + size, indices.stop)
            fresh = Tally(identity, ((first, stop),), jax.device_get(run(first, stop, report)))
            tally = fresh if tally is None else merge_tallies([tally, fresh], statistics)
            due = stop == indices.stop or time.monotonic() - saved > _SAVE_SECONDS
            if path is not None and due and jax.process_index() == 0:
                tally.save(path)
                saved = time.monotonic()
    assert tally is not None
    return tally


def _span(batch: int) -> int:
    """Samples between two fetches of the accumulators: whole batches, at least `_FLUSH`."""
    return batch * max(1, -(-_FLUSH // batch))


def _runner(
    source: ImageSet, extractor: Extractor, statistics: Mapping[str, Statistic], batch: int, mesh: Mesh | None
) -> Callable[[int, int, Callable[[int], None]], dict[str, Accumulator]]:
    """Loads what is needed and gives ``run(first, stop, report)``: the accumulators of those samples, on device."""
    params, arguments = placed(extractor.load(), mesh), placed(source.arguments, mesh)
    shapes = _shapes(source, extractor, params, batch)
    network: Any = extractor
    named: Any = tuple(statistics.items())
    step = _program(source.function, source.quantiser, network, named, mesh)
    empty = _empty(named, tuple(sorted(shapes.items())), _span(batch), mesh)

    def block(begin: int, stop: int) -> tuple[Any, ...]:
        indices, weight = padded_block(begin, stop, batch, mesh)
        if source.read is None:
            return arguments, indices, weight
        return _with(_read(source.read, begin, stop, batch, mesh), arguments), indices, weight

    def run(first: int, stop: int, report: Callable[[int], None]) -> dict[str, Accumulator]:
        accumulators, pending, ready = empty(), None, block(first, stop)
        for begin in range(first, stop, batch):
            given, indices, weight = ready
            accumulators, bad = step(given, params, accumulators, indices, weight)
            if begin + batch < stop:  # the next batch is read while the device works
                ready = block(begin + batch, stop)
            _refuse(pending)  # read a step late, so that the device never waits for the host
            pending = bad
            report(begin + batch)
        _refuse(pending)
        return accumulators

    return run


def traced_step(
    source: ImageSet, extractor: Extractor, statistics: Mapping[str, Statistic], params: Any, *, batch: int, mesh: Mesh
) -> Any:
    """Gives the step of `collect` as jax traces it for a mesh, from shapes: nothing is allocated, nothing loaded.

    Args:
      source: what would be evaluated: stored images (`ImageSet.read`).
      params: shapes of the extractor's parameters.
    """
    assert source.read is not None
    shapes, named = _shapes(source, extractor, params, batch), tuple(statistics.items())
    network: Any = extractor
    empty = jax.eval_shape(_empty(named, tuple(sorted(shapes.items())), _span(batch), mesh))
    rows = _rows(source.read, batch)
    numbers = (jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.float32))
    split, whole = batch_sharding(mesh), replicated(mesh)

    def on(where: Any, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)

    step: Any = _program(source.function, source.quantiser, network, named, mesh)
    with jax.set_mesh(mesh):
        return step.trace(on(split, rows), on(whole, params), on(whole, empty), *on(split, numbers))


def _rows(read: Callable[..., Any], batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of what is read on the host."""
    first = read(np.zeros(1, np.int32))
    return {name: jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for name, a in first.items()}


def _with(rows: Mapping[str, Any], arguments: Any) -> Mapping[str, Any]:
    """What a source's function gets beside the indices when rows are read for it."""
    return {**rows, "arguments": arguments} if arguments else rows


def _read(read: Callable[..., Any], begin: int, stop: int, batch: int, mesh: Mesh | None) -> dict[str, jax.Array]:
    """The rows of a block on the devices that work on them; each process reads its own only."""
    rows = np.minimum(begin + np.arange(batch), stop - 1)
    if mesh is None:
        return {name: jnp.asarray(array) for name, array in read(rows).items()}
    where = batch_sharding(mesh)
    parts = where.addressable_devices_indices_map((batch,))
    starts = {device: (part[0].start or 0) if part else 0 for device, part in parts.items()}
    size = batch // (mesh.shape["data"] * mesh.shape["fsdp"])
    held = {start: read(rows[start : start + size]) for start in sorted(set(starts.values()))}
    return {
        name: jax.make_array_from_single_device_arrays(
            (batch, *first.shape[1:]),
            where,
            [jax.device_put(held[start][name], device) for device, start in starts.items()],
        )
        for name, first in next(iter(held.values())).items()
    }


@functools.lru_cache(maxsize=16)
def _program(
    function: Any, quantiser: str, extractor: Any, statistics: tuple[tuple[str, Any], ...], mesh: Mesh | None
) -> Callable[..., tuple[dict[str, Accumulator], jax.Array]]:
    """The jitted step; cached, so that evaluations that differ in seeds or weights alone compile once."""

    def step(
        arguments: Any, params: Any, accumulators: dict[str, Accumulator], block: jax.Array, weight: jax.Array
    ) -> tuple[dict[str, Accumulator], jax.Array]:
        made = function(arguments, block)
        rows = _features(quantiser, extractor, params, made)
        whole = _whole(_pixels(made)) & _whole(rows["features"])
        bad = jnp.min(jnp.where(whole | (weight == 0), _NONE_BAD, block))
        return {name: s.update(accumulators[name], rows, weight, block) for name, s in statistics}, bad

    return jax.jit(step, donate_argnums=2, out_shardings=None if mesh is None else replicated(mesh))


@functools.lru_cache(maxsize=16)
def _empty(
    statistics: tuple[tuple[str, Any], ...], shapes: tuple[tuple[str, Any], ...], span: int, mesh: Mesh | None
) -> Callable[[], dict[str, Accumulator]]:
    """Accumulators of no samples, whole on every device."""
    return jax.jit(
        lambda: {name: s.init(dict(shapes), span) for name, s in statistics},
        out_shardings=None if mesh is None else replicated(mesh),
    )


def _features(quantiser: str, extractor: Extractor, params: Any, made: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    image = _pixels(made)
    levels = image if "levels" in made or image.dtype == jnp.uint8 else QUANTISERS[quantiser](image)
    levels = jnp.broadcast_to(levels, (*levels.shape[:3], extractor.image[2]))  # grey for a network that takes RGB
    found = extractor(params, levels.astype(jnp.float32))
    return {**{name: a for name, a in made.items() if name not in ("image", "levels")}, "levels": levels, **found}


def _pixels(made: Mapping[str, jax.Array]) -> jax.Array:
    return made["levels"] if "levels" in made else made["image"]


def _whole(rows: jax.Array) -> jax.Array:
    return jnp.isfinite(rows).all(tuple(range(1, rows.ndim)))


def _shapes(source: ImageSet, extractor: Extractor, params: Any, batch: int) -> Mapping[str, Any]:
    """Shapes of what statistics see; checks the images against the extractor before anything is compiled."""
    arguments = source.arguments
    if source.read is not None:
        arguments = _with(_rows(source.read, batch), arguments)
    made = jax.eval_shape(source.function, arguments, jax.ShapeDtypeStruct((batch,), jnp.int32))
    shape = tuple(_pixels(made).shape[1:])
    if not accepts(extractor, shape):
        raise GenError(
            f"images of shape {shape} for the {extractor.name} extractor; expected {tuple(extractor.image)}; "
            "resize them or use another extractor"
        )
    result: Mapping[str, Any] = jax.eval_shape(lambda p, m: _features(source.quantiser, extractor, p, m), params, made)
    return result


def _check(source: ImageSet, indices: range, batch: int, mesh: Mesh | None) -> None:
    if not len(indices) or indices.step != 1 or indices.start < 0 or indices.stop > source.count:
        raise GenError(
            f"samples {indices.start}..{indices.stop - 1} asked of a source with {source.count}; expected a range "
            f"within 0..{source.count - 1}; make more samples or ask for fewer"
        )
    microbatch_count(batch, None, {"data": 1, "fsdp": 1} if mesh is None else mesh.shape)


def _refuse(bad: jax.Array | None) -> None:
    index = _NONE_BAD if bad is None else int(bad)
    if index != _NONE_BAD:
        raise GenError(
            f"sample {index} has NaN or infinite pixels or features; expected finite images; no score is given: "
            "look at the generator's weights or leave that sample out"
        )


def _resume(path: str | Path, identity: str, indices: range) -> Tally:
    tally = Tally.load(path)
    if tally.identity != identity or len(tally.spans) != 1 or tally.spans[0][0] != indices.start:
        raise GenError(f"{path} is a partial result of another evaluation; delete it, or keep this one's elsewhere")
    if tally.spans[0][1] > indices.stop:
        raise GenError(f"{path} already holds {tally.count} samples; expected at most {len(indices)}; delete it")
    return tally


def _agree(start: int, path: str | Path | None) -> None:
    """Raises GenError on every process unless all go on at the same sample: else they would wait for one another."""
    if jax.process_count() == 1:
        return
    starts = multihost_utils.process_allgather(np.int32(start)).tolist()
    if len(set(starts)) > 1:
        raise GenError(
            f"the processes of this job would go on at samples {starts}: they do not see the same {path}; expected a "
            "folder that all share; delete the file, or write to another folder"
        )


def _union(a: Sequence[tuple[int, int]], b: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    spans: list[tuple[int, int]] = []
    for start, stop in sorted([*a, *b]):
        if spans and start < spans[-1][1]:
            raise GenError(
                f"sample {start} is in two partial evaluations; expected disjoint parts; leave one of them out"
            )
        if spans and start == spans[-1][1]:
            spans[-1] = (spans[-1][0], stop)
        else:
            spans.append((start, stop))
    return tuple(spans)
