"""Images by the thousand: a generator as an indexed job whose rows are written as samples (`sample_files`)."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gen.errors import GenError
from gen.sampling.generator import Generator, GeneratorParams
from gen.sampling.sample_files import sample_form, sample_writer
from gen.sampling.seeds import spell
from gen.training.indexed import Elsewhere, Writer, agreed, run_indexed, sample_keys

__all__ = ["generate", "quantise"]


def quantise(images: jax.Array) -> jax.Array:
    """Gives images (...) float in [-1, 1] as uint8 levels, ``floor(clip(127.5 x + 128, 0, 255))``: the rounding of the
    official codes. Values outside of [-1, 1] are cut.
    """
    return jnp.floor(jnp.clip(127.5 * images + 128.0, 0.0, 255.0)).astype(jnp.uint8)


def generate(
    generator: Generator,
    params: GeneratorParams,
    *,
    seeds: Sequence[int],
    out: str | Path,
    batch: int,
    labels: np.ndarray | None = None,
    cond: Mapping[str, np.ndarray] | None = None,
    mesh: Mesh | None = None,
    rule: str = "given",
    label: str = "sample",
) -> np.ndarray | None:
    """Makes one image per seed and writes them; image i depends on seeds[i] and its condition alone.

    The ending of `out` decides the form: ``.npz`` (``arr_0`` uint8 (N, H, W, C), ``arr_1`` labels), ``.zip`` (PNG
    files and dataset.json with labels, as EDM's datasets), ``.png`` (one contact sheet of all), none a folder of PNG
    files named by seed (000000.png ...) with samples.json and a contact sheet grid.png of the first 64.
    An interrupted job goes on where it was (a contact sheet starts again), and what is half-written never has the
    final name. Once all is there, the same call does nothing. Further seeds of the same model add to a folder.

    Args:
      generator: see `gen.sampling.generator`.
      params: arrays by role.
      seeds: different seeds, in the order in which the images stand in an .npz, a .zip or a contact sheet.
      batch: global batch size; it does not change the images beyond rounding.
      labels: (N,) class labels, the condition ``label``; they are stored with the images.
      cond: further conditioning arrays by name, (N, ...).
      mesh: devices to share the work.
      rule: how the labels follow from the seeds, for the note that goes with the samples (`read_note`).
      label: text of the progress line; "" for none.

    Returns:
      for generators that measure their network calls, those of the images made now (n,); None for others, and on
      processes other than the first.

    Raises GenError for a model of latents without their tokenizer, seeds that repeat, conditions of another length, NaN
    images, an `out` that holds other samples or whose ending is another kind of file's, and a disk that does not take
    them.
    """
    ending = sample_form(out)
    cond = dict(cond or {}) | ({} if labels is None else {"label": np.asarray(labels, np.int32)})
    numbers = np.asarray(seeds)
    if not len(numbers) or len(set(seeds)) < len(numbers) or numbers.min() < 0 or numbers.max() >= 2**31:
        raise GenError(f"seeds {spell(seeds) or 'none'}; expected different seeds, at least one, from 0 to 2147483647")
    for name, values in cond.items():
        if len(values) != len(seeds):
            raise GenError(f"{len(values)} values of '{name}' for {len(seeds)} seeds; give one per seed")
    sorted_order = np.argsort(numbers)

    def read(chosen: np.ndarray) -> dict[str, np.ndarray]:
        rows = sorted_order[np.searchsorted(numbers, chosen, sorter=sorted_order)]
        return {name: values[rows] for name, values in cond.items()}

    def make(arguments: Any, indices: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
        del weight
        weights, rows = arguments
        given = weights, sample_keys(0, indices), rows
        images, calls = (generator(*given), None) if counted is None else counted(*given)
        if images.ndim != 4:
            raise GenError(
                f"the model makes latents {images.shape[1:]} and no images: its run has no tokenizer; give it one, "
                "RunConfig(tokenizer=...) with the arrays in Recipe(artifacts=...)"
            )
        made = {"arr_0": quantise(images), "image": jnp.abs(images).max(axis=(1, 2, 3))}
        made |= {} if calls is None else {"calls": calls}
        return made | ({"arr_1": rows["label"]} if "label" in rows else {})

    counted = getattr(generator, "counted", None)
    # guidance without a null class and the like is refused before anything is compiled or written
    one = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.float32)
    jax.eval_shape(make, (params, read(numbers[:1])), *one)
    grows = not ending and not set(cond) - {"label"}  # samples.json keeps the labels, and no other condition
    note = {
        "identity": _identity(generator, params, *(() if grows else (seeds, cond))),
        "seeds": spell(seeds),
        "quantiser": "round",
        "rule": rule if "label" in cond else "none",
    }
    if jax.process_index() == 0:
        samples = sample_writer(Path(out), ending, list(map(int, seeds)), cond.get("label"), note)
        writer, order = _Counting(samples), np.asarray(samples.seeds, np.int32)
    else:
        writer, order = _Counting(Elsewhere()), np.zeros(len(seeds), np.int32)
    todo = agreed(order).tolist()
    run_indexed(make, todo, batch=batch, writer=writer, arguments=params, mesh=mesh, label=label, read=read)
    return np.concatenate(writer.calls) if writer.calls else None


def _identity(
    generator: Any, params: Any, seeds: Sequence[int] = (), cond: Mapping[str, np.ndarray] | None = None
) -> str:
    """Text that differs when the images would: of configuration and weights, and of seeds and conditions if given."""
    leaves, tree = jax.tree.flatten(params)
    digest = hashlib.sha256(f"{generator!r} {tree} {spell(seeds)}".encode())
    digest.update(np.asarray(_bit_sums(leaves)).tobytes())
    for name, values in sorted((cond or {}).items()):
        digest.update(name.encode() + np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:16]


@jax.jit
def _bit_sums(leaves: list[jax.Array]) -> jax.Array:
    """One weighted sum of bit patterns per array, in integers: the same for any layout over devices."""

    def total(leaf: jax.Array) -> jax.Array:
        kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        bits = leaf if leaf.dtype == bool else jax.lax.bitcast_convert_type(leaf, kind)
        bits = bits.astype(jnp.uint32).reshape(-1)
        weights = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(2654435761) | jnp.uint32(1)
        return jnp.sum(bits * weights, dtype=jnp.uint32)

    return jnp.stack([total(jnp.asarray(leaf)) for leaf in leaves]) if leaves else jnp.zeros(0, jnp.uint32)


class _Counting:
    """Keeps the measured network calls and hands on the rest."""

    def __init__(self, inner: Writer) -> None:
        self.inner, self.calls = inner, list[np.ndarray]()

    @property
    def next(self) -> int:
        return self.inner.next

    def write(self, first: int, arrays: dict[str, np.ndarray]) -> None:
        self.calls += [arrays["calls"]] if "calls" in arrays else []
        self.inner.write(first, {name: rows for name, rows in arrays.items() if name != "calls"})

    def close(self) -> None:
        self.inner.close()
