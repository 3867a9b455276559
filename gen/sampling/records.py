"""Teacher records: what a teacher made, by index, with who made it, for students that learn from it.

A record folder holds one row per index in each of its arrays, and what the rows were conditioned on beside them:

| array | row |
|---|---|
| ``noise`` | where the teacher's solver started, as it was given to it (scaled: 80 n for EDM, n unit normal) |
| ``sample`` | where the solver ended: a latent on the scale the teacher was trained on, or an image in [-1, 1] |
| ``path`` | (P, ...) the states at P chosen points of the solver's steps |
| ``tokens`` | the ids that a token model drew |

Row i depends on (seed, i), the maker and its settings alone. A student names the maker that it needs, and records of
another are refused. Regression on stored outputs (Luhman & Luhman, arXiv 2101.02388), reflow (arXiv 2209.03003) and
distilled decoding (arXiv 2412.17153) read such records.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gen.arrays import digest
from gen.config import PLACE, fingerprint
from gen.data import loader
from gen.data.sources import ArraySource
from gen.data.stores import load_arrays
from gen.diffusion.conversions import rectified
from gen.diffusion.denoiser import Denoiser
from gen.errors import GenError
from gen.files import read_json, write_json
from gen.nn.network import Cond
from gen.sampling.generator import DiffusionGenerator, GeneratorParams
from gen.sampling.grids import Grid
from gen.sampling.integrate import Problem, integrate
from gen.sampling.noise import prior
from gen.sampling.solvers import Euler
from gen.training.indexed import ArrayWriter, Elsewhere, Writer, agreed, run_indexed, sample_keys

__all__ = ["ARRAYS", "Inverted", "Make", "Records", "Solved", "make_records"]

ARRAYS = ("noise", "sample", "path", "tokens")
_NEAREST = 1e-3  # the first time of an inversion
SEED = 1  # `gen sample` draws with seed 0: no record shares its noise with a sample
_HEAD = "records.json"
_AGAIN = "make records of the teacher: gen distill PRESET --teacher RUN --pairs N"


class Make(Protocol):
    """A function that makes the rows of one kind of record from a teacher's parameters."""

    @property
    def identity(self) -> str:
        """Gives text that differs when other rows would be made of the same parameters."""
        ...

    def __call__(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> Mapping[str, jax.Array]:
        """Gives rows (B, ...) by the names of `ARRAYS`; row i depends on keys[i] and cond[i] alone."""
        ...


@dataclasses.dataclass(frozen=True)
class Solved:
    """What a teacher's solver does with its noise: ``noise`` and ``sample``, and ``path`` where points are given.

    Attributes:
      generator: the teacher with its sampler.
      points: numbers of solver steps after which the state is kept, ascending; 0 is the noise.

    Raises GenError for points that do not rise within the solver's steps.
    """

    generator: DiffusionGenerator
    points: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        steps = self.generator.sampler.times(self.generator.denoiser.process).steps
        if list(self.points) != sorted(set(self.points)) or not all(0 <= point <= steps for point in self.points):
            raise GenError(f"path points {self.points}; expected ascending numbers of solver steps from 0 to {steps}")

    @property
    def identity(self) -> str:
        """Does what `Make.identity` says."""
        return f"solved {fingerprint(self.generator)} points {','.join(map(str, self.points)) or 'none'}"

    def __call__(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> dict[str, jax.Array]:
        """Does what `Make.__call__` says; float32."""
        own = self.generator
        noise = prior(own.sampler.times(own.denoiser.process), keys, own.latent)
        if not self.points:
            return {"noise": noise, "sample": own.latents(params, keys, cond)}
        given = own.denoiser, params["net"], keys, own.latent, cond
        states = own.sampler(*given, guide=params.get("guide"), trajectory=True)
        states = jnp.concatenate([noise[None], states])
        return {"noise": noise, "sample": states[-1], "path": jnp.moveaxis(states[np.asarray(self.points)], 0, 1)}


@dataclasses.dataclass(frozen=True)
class Inverted:
    """The noise from which a teacher's flow comes to given data: ``noise``; the data, ``latent``, are kept beside it.

    The data are rows of the condition "latent", on the scale that the teacher was trained on. Euler's method follows
    the linear flow backwards, from just above clean data to pure noise (2-rectified flow++, arXiv 2405.20320); the
    noise is stored as the teacher's solver would take it.

    Attributes:
      denoiser: the teacher's.
      steps: network calls; 128 in the paper.
    """

    denoiser: Denoiser
    steps: int = 128

    @property
    def identity(self) -> str:
        """Does what `Make.identity` says."""
        return f"inverted {fingerprint(self.denoiser)} steps {self.steps}"

    def __call__(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> dict[str, jax.Array]:
        """Does what `Make.__call__` says; no noise is drawn."""
        del keys
        flow, own, x = rectified(self.denoiser), self.denoiser.process, cond["latent"]
        times = np.append(_NEAREST, np.arange(1, self.steps + 1) / self.steps)
        kept = {name: value for name, value in cond.items() if name != "latent"}
        problem = Problem(flow.bind(params["net"]), x, Grid(times, flow.process), lambda i: x, kept)
        return {"noise": float(own.sigma(np.float64(own.t_max))) * integrate(Euler(), problem)}


def make_records(
    make: Make,
    params: GeneratorParams,
    path: str | Path,
    *,
    count: int,
    maker: str,
    cond: Mapping[str, np.ndarray] | None = None,
    batch: int = 1024,
    mesh: Mesh | None = None,
    label: str = "records",
) -> "Records":
    """Writes rows 0 .. count - 1 of what a teacher makes.

    Interrupted and called again it goes on where it was; once all is there it does nothing.

    Args:
      make: what is made; `Solved` for teachers that a solver samples.
      params: the teacher's arrays by role.
      path: the folder.
      count: number of rows.
      maker: identity of the teacher's weights (`gen.runs.Loaded.origin`), which its students ask for.
      cond: conditioning arrays by name, (count, ...), kept beside the rows.
      batch: rows at a time; changes nothing but speed and memory.
      mesh: devices to share the work.
      label: text of the progress line; "" for none.

    Raises GenError for a folder that holds something else, NaN in what is made, conditions of another number, and a
    disk that does not take the rows.
    """
    path, cond = Path(path), {name: np.asarray(values) for name, values in (cond or {}).items()}
    for name, values in cond.items():
        if len(values) != count:
            raise GenError(f"{len(values)} values of '{name}' for {count} records; give one per record")
    made_by = {"maker": maker, "how": make.identity, "seed": SEED, "count": count}
    given = digest(cond) if cond else "none"
    if (path / _HEAD).exists():
        head = _read(path)
        if {name: head[name] for name in (*made_by, "cond")} != made_by | {"cond": given}:
            raise GenError(f"{path} holds records of another teacher, number or settings; choose another folder")
        return Records(str(path), maker)
    if (path / "cache.json").exists():
        raise GenError(f"{path} is a cache, or stored pairs of an earlier version; choose another folder or delete it")

    def rows(arguments: Any, indices: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
        del weight
        weights, beside = arguments
        made = dict(make(weights, sample_keys(SEED, indices), beside))
        if not made or set(made) - set(ARRAYS):
            raise GenError(f"records of {', '.join(made) or 'nothing'}; expected some of {', '.join(ARRAYS)}")
        return {name: _stored(values) for name, values in made.items()} | dict(beside)

    main = jax.process_index() == 0
    writer: Writer = ArrayWriter(path, count, f"{maker} {make.identity} {given}") if main else Elsewhere()
    run_indexed(
        rows,
        range(count),
        batch=min(batch, count),
        writer=writer,
        arguments=params,
        mesh=mesh,
        label=label,
        read=lambda indices: {name: values[indices] for name, values in cond.items()},
    )
    if main:
        arrays = {file.stem: load_arrays(file)["image"] for file in sorted(path.glob("*.npy"))}
        shapes = {name: [array.dtype.str, list(array.shape[1:])] for name, array in arrays.items()}
        whose = np.frombuffer(f"{maker}\n{make.identity}".encode(), np.uint8)
        identity = digest({**arrays, "made by": whose})
        write_json(path / _HEAD, made_by | {"cond": given, "arrays": shapes, "identity": identity})
    agreed(np.zeros((), np.int32))  # nobody reads before the head is there
    return Records(str(path), maker)


def _stored(values: jax.Array) -> jax.Array:
    return values.astype(jnp.float32 if jnp.issubdtype(values.dtype, jnp.floating) else jnp.int32)


@dataclasses.dataclass(frozen=True)
class Records:
    """A teacher's records as training data.

    Rows come by the names of the arrays, but for ``sample``, which comes as ``latent``, as data do: what trains on
    latents also trains on a teacher's.

    Attributes:
      path: the folder.
      maker: the teacher that the student needs (`gen.runs.Loaded.origin`).
    """

    path: str = dataclasses.field(metadata=PLACE)
    maker: str

    def source(self) -> ArraySource:
        """Gives the rows by index, memory-mapped. Raises GenError for no records, altered ones, or another
        teacher's.
        """
        head = _read(self.path)
        if head["maker"] != self.maker:
            raise GenError(
                f"{self.path} holds records of {head['maker']}; this student's teacher is {self.maker}: {_AGAIN}, or "
                "give the other teacher"
            )
        arrays = {}
        for name, (dtype, shape) in head["arrays"].items():
            array = load_arrays(Path(self.path) / f"{name}.npy")["image"]
            if array.dtype.str != dtype or list(array.shape) != [head["count"], *shape]:
                raise GenError(
                    f"{self.path}/{name}.npy holds {array.dtype.str} {array.shape}; expected {dtype} "
                    f"{(head['count'], *shape)} as {_HEAD} says, delete the folder and make the records again"
                )
            arrays["latent" if name == "sample" else name] = array
        return ArraySource(**arrays)

    def batches(
        self, *, batch: int, seed: int, start: int, process: int = 0, processes: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """Endless shuffled batches, this process's slice, from global step `start` (see `gen.data.loader`)."""
        source = self.source()
        loader.enough(self.path, len(source), batch)
        return loader.batches(source, batch=batch, seed=seed, start=start, process=process, processes=processes)

    def identity(self) -> str:
        """Gives the fingerprint of the rows and of who made them."""
        return str(_read(self.path)["identity"])


def _read(path: str | Path) -> dict[str, Any]:
    """The head of a record folder."""
    file = Path(path) / _HEAD
    if not file.exists():
        if (Path(path) / "cache.json").exists():
            raise GenError(
                f"{path} is a cache, or stored pairs of an earlier version, which do not say whose they are; {_AGAIN}"
            )
        raise GenError(f"no records at {path} (no {_HEAD}); {_AGAIN}")
    head = read_json(file)
    kinds = {"maker": str, "how": str, "seed": int, "count": int, "cond": str, "arrays": dict, "identity": str}
    if not isinstance(head, dict) or any(not isinstance(head.get(name), kind) for name, kind in kinds.items()):
        raise GenError(f"{file} was altered; delete the folder and {_AGAIN}")
    return head
