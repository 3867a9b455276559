"""The programs of a run, traced for a mesh of devices that need not be there: training, sampling, evaluation.

Each is traced as the command that runs it traces it (`gen.training.program`, `gen.sampling.generate`,
`gen.metrics.onepass`), from shapes alone, so that what is compiled is what would run.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gen.arrays import unflatten
from gen.diffusion.denoiser import Denoiser
from gen.features.inception import Inception
from gen.metrics.onepass import traced_step
from gen.metrics.sources import from_arrays
from gen.metrics.statistics import basic_statistics
from gen.nn.conditions import empty_conditions
from gen.nn.network import count, param_shapes
from gen.sampling.generate import quantise
from gen.sampling.generator import OneStepGenerator
from gen.training.budget import Memory, abstract_states, held
from gen.training.checks import batches, check_batch, close, drawable
from gen.training.indexed import sample_keys
from gen.training.program import Compiled, Placement
from gen.training.run import RunConfig
from gen.training.sharding import batch_parts, batch_sharding, microbatch_count, replicated, shardings
from gen.training.task import Stage, State

__all__ = ["KINDS", "Traced", "programs"]

KINDS = ("train", "sample", "one-step", "evaluate")
_SAMPLES, _EVALUATED = 64, 256  # images at a time: what gen sample and gen evaluate take


@dataclasses.dataclass(frozen=True)
class Traced:
    """A program of a run, which can be traced.

    Attributes:
      kind: one of `KINDS`.
      name: for people.
      images: how many it takes or makes in a call.
      parameters: how many numbers it trains; 0 where it trains none.
      held: what a device holds between training steps; None where it trains nothing.
      trace: gives what ``jax.jit(...).trace(...)`` gives.
    """

    kind: str
    name: str
    images: int
    parameters: int
    held: Memory | None
    trace: Callable[[], Any]


def programs(
    config: RunConfig,
    mesh: Mesh,
    *,
    frozen: Mapping[str, Any],
    artifacts: Mapping[str, Any],
    kinds: Sequence[str] = KINDS,
    batch_gpu: int | None = None,
) -> list[Traced]:
    """Gives the programs of a run on a mesh; each is traced when it is asked for.

    Args:
      frozen, artifacts: arrays or shapes by role.
      kinds: which of `KINDS`; those that the run has.
      batch_gpu: images one device trains on, or at most samples, at a time.

    Raises GenError for a batch that the devices do not divide, and data that the task does not take.
    """
    found: list[Traced] = []
    frozen, artifacts = (jax.tree.map(_shape, dict(tree)) for tree in (frozen, artifacts))
    if "train" in kinds:
        frozen = {role: tree for role, tree in frozen.items() if role != "start"}
        for stage, state in zip(config.stages, abstract_states(config.stages, frozen), strict=True):
            found += _training(config, stage, state, mesh, frozen, batch_gpu)
    for kind, generator in _generators(config).items():
        if kind in kinds:
            found.append(_sampling(kind, generator, mesh, artifacts, batch_gpu))
    if "evaluate" in kinds and config.generator() is not None:
        found.append(_evaluation(config, mesh))
    return found


def _training(
    config: RunConfig, stage: Stage, state: State, mesh: Mesh, frozen: Mapping[str, Any], batch_gpu: int | None
) -> list[Traced]:
    """The programs of a stage, as `gen.training.engine` runs them."""
    shard_from = config.engine.mesh.shard_from
    layout = shardings(state, mesh, shard_from)
    parts = microbatch_count(stage.batch, batch_gpu, mesh.shape)
    placement = Placement(mesh, layout, parts, shard_from, None)
    rows = batches(dataclasses.replace(stage, batch=1), 0, 0)
    try:
        row = check_batch(dataclasses.replace(stage, batch=1), next(rows))
    finally:
        close(rows)
    batch = {name: jax.ShapeDtypeStruct((stage.batch, *a.shape[1:]), a.dtype) for name, a in row.items()}
    batch = _on(jax.tree.map(lambda _: batch_sharding(mesh), batch), batch)
    schedule = {name: np.asarray(value) for name, value in stage.task.inputs(0, stage.steps).items()}
    given = (_on(layout, state), _on(shardings(frozen, mesh, shard_from), frozen), batch, schedule)

    def tracer(name: str, program: Any) -> Callable[[], Any]:
        def trace() -> Any:
            with jax.set_mesh(mesh):
                return Compiled(name, program, placement, config.engine.seed, 0, print).traced(*given)

        return trace

    parameters, memory = count(state.params), held(state, frozen, dict(mesh.shape), shard_from)
    return [
        Traced("train", f"train {stage.name}/{name}", stage.batch, parameters, memory, tracer(name, program))
        for name, program in stage.task.programs.items()
    ]


def _generators(config: RunConfig) -> dict[str, Any]:
    """What makes images of what the run trains: as it samples, and a student of its model in one call."""
    generator, models = config.generator(), config.exported()
    if generator is None:
        return {}
    if generator.nfe == 1:
        return {"one-step": generator}
    if "net" not in models or not isinstance(models["net"].config, Denoiser):
        return {"sample": generator}
    return {"sample": generator, "one-step": OneStepGenerator(models["net"].config, tokenizer=config.tokenizer)}


def _sampling(kind: str, generator: Any, mesh: Mesh, artifacts: Mapping[str, Any], batch_gpu: int | None) -> Traced:
    """A batch of images, as `gen.sampling.generate` makes it."""
    most = _SAMPLES if batch_gpu is None else batch_gpu * batch_parts(mesh.shape)
    images = _rounded(min(_SAMPLES, most), mesh)
    params = {role: param_shapes(network) for role, network in generator.networks.items()} | dict(artifacts)
    made = empty_conditions(generator.conditions, images)

    def make(params: Any, indices: jax.Array, cond: Any) -> jax.Array:
        return quantise(generator(params, sample_keys(0, indices), cond))

    def trace() -> Any:
        split, whole = batch_sharding(mesh), replicated(mesh)
        rows = {"indices": jax.ShapeDtypeStruct((images,), jnp.int32), "cond": jax.tree.map(_shape, made)}
        rows = _on(jax.tree.map(lambda _: split, rows), rows)
        with jax.set_mesh(mesh):
            given = (_on(jax.tree.map(lambda _: whole, params), params), rows["indices"], rows["cond"])
            return jax.jit(make, out_shardings=split).trace(*given)

    calls = generator.nfe
    name = "generate in one call" if calls == 1 else f"sample, {calls or 'measured'} calls"
    return Traced(kind, name, images, 0, None, trace)


def _evaluation(config: RunConfig, mesh: Mesh) -> Traced:
    """Features of a batch of images by the Inception network and their sums, as `gen.metrics.onepass` takes them."""
    images, generator = _rounded(_EVALUATED, mesh), config.generator()
    side = generator.shape[0] if drawable(generator.shape) else 256
    extractor = Inception()
    params = unflatten({path: jax.ShapeDtypeStruct(s, jnp.float32) for path, s in extractor.shapes().items()})
    source = from_arrays(np.zeros((1, side, side, 3), np.uint8), np.zeros(1, np.int32), identity="shapes")
    statistics = basic_statistics(extractor, True, 10_000)

    def trace() -> Any:
        return traced_step(source, extractor, statistics, params, batch=images, mesh=mesh)

    return Traced("evaluate", f"evaluate, Inception at {side} px", images, 0, None, trace)


def _rounded(count: int, mesh: Mesh) -> int:
    """A batch of at least `count` that the devices divide."""
    parts = batch_parts(mesh.shape)
    return -(-count // parts) * parts


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    dtype = jax.dtypes.canonicalize_dtype(np.result_type(leaf))
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype)


def _on(where: Any, tree: Any) -> Any:
    return jax.tree.map(lambda n, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=n), where, tree)
