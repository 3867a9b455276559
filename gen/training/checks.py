"""What is checked of a run before its first step: its data, whether what it trains can be sampled, what it needs."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from gen import own
from gen.config import from_json, to_json
from gen.errors import GenError
from gen.nn.conditions import empty_conditions
from gen.nn.network import param_shapes
from gen.training.budget import abstract_states, describe, device_bytes, held, refuse
from gen.training.run import RunConfig
from gen.training.sharding import mesh_sizes, microbatch_count
from gen.training.task import Frozen, Stage

__all__ = ["batches", "check_batch", "check_data", "check_run", "close", "drawable", "dry_run"]


def batches(stage: Stage, seed: int, start: int) -> Iterator[Mapping[str, np.ndarray]]:
    """This process's batches of a stage's data from a global step on; raises what is wrong with the data."""
    found: Iterator[Mapping[str, np.ndarray]] = stage.data.batches(
        batch=stage.batch, seed=seed, start=start, process=jax.process_index(), processes=jax.process_count()
    )
    return found


def close(rows: Iterator[Any]) -> None:
    """Ends the threads behind an iterator, where it has any."""
    end = getattr(rows, "close", None)
    if end is not None:
        end()


def check_batch(stage: Stage, batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Checks a batch. Raises GenError for shapes and values that cannot be right, and what the task says of them."""
    local = stage.batch // jax.process_count()
    for name, array in batch.items():
        if np.ndim(array) < 1 or len(array) != local:
            raise GenError(
                f"data '{name}' has shape {np.shape(array)}; expected {local} rows, one for each sample of the "
                "batch; change what the data source yields"
            )
        if np.issubdtype(np.asarray(array).dtype, np.floating) and not np.isfinite(array).all():
            raise GenError(f"data '{name}' of stage '{stage.name}' holds NaN or infinity; make the data again")
    stage.task.check(batch)
    return batch


def check_data(stage: Stage) -> None:
    """Reads a stage's first batch. Raises GenError for data that are missing or do not fit its task."""
    rows = batches(stage, 0, 0)
    try:
        check_batch(stage, next(rows))
    finally:
        close(rows)


def check_run(config: RunConfig, artifacts: Mapping[str, Any] | None = None) -> None:
    """Reads the configuration as it will be stored, and traces how what each stage trains would be sampled.

    Nothing is allocated or compiled.

    Args:
      artifacts: the run's arrays, or their shapes, by role.

    Raises:
      GenError: a value that the configuration may not hold, such as a misspelt choice; a sampler, guidance or
        tokenizer that does not go with the model, said before it is trained; a network that sampling needs, such as the
        tokenizer, of which neither the run nor its artifacts have arrays.
    """
    from_json(to_json(config), RunConfig)
    for stage in config.stages:
        generator = config.generator(stage)
        if generator is None:
            continue
        params = {role: param_shapes(network) for role, network in generator.networks.items()}
        missing = sorted(
            params.keys() - stage.task.models().keys() - (params if artifacts is None else artifacts).keys()
        )
        if missing:
            raise GenError(
                f"run '{config.name}' samples with '{missing[0]}' and has no arrays of it; give them to the recipe, "
                f"such as Recipe(..., artifacts={{'{missing[0]}': teacher.params['{missing[0]}']}})"
            )
        params |= {role: jax.tree.map(_shape, tree) for role, tree in (artifacts or {}).items()}
        try:
            cond = empty_conditions(generator.conditions, 1)
            jax.eval_shape(generator, params, jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1)), cond)
        except (GenError, KeyError, TypeError, ValueError) as error:
            if own.where(error):
                raise  # a fault in a user's own file, said with its line
            raise GenError(
                f"run '{config.name}' could train stage '{stage.name}' but not sample what it makes: {error}"
            ) from error


def dry_run(
    config: RunConfig,
    *,
    frozen: Frozen | None = None,
    artifacts: Mapping[str, Any] | None = None,
    batch_gpu: int | None = None,
    devices: int | None = None,
) -> list[str]:
    """Prints and returns a line for each stage: parameters per network, bytes per device of all that stays there.

    Makes every check of `train` that comes before compiling; allocates and compiles nothing.

    Args:
      config: the run.
      frozen, artifacts: arrays or shapes by role.
      batch_gpu: as for `train`; checked.
      devices: number of devices to plan for; those present by default.

    Raises:
      GenError: as `train`, for what is wrong before anything is compiled.
    """
    sizes = mesh_sizes(config.engine.mesh, jax.device_count() if devices is None else devices)
    check_run(config, artifacts)
    frozen = dict(frozen or {})
    lines = []
    for stage, state in zip(config.stages, abstract_states(config.stages, frozen), strict=True):
        microbatch_count(stage.batch, batch_gpu, sizes)
        stage.task.inputs(0, stage.steps)
        check_data(dataclasses.replace(stage, batch=jax.process_count()))  # one row: the data may be a sample of them
        lines.append(describe(stage, state, frozen, sizes, config.engine.mesh.shard_from))
        refuse(
            f"stage '{stage.name}'",
            held(state, frozen, sizes, config.engine.mesh.shard_from),
            None
            if devices is not None and config.engine.memory_gib is None
            else device_bytes(config.engine.memory_gib),
            sizes,
        )
    print("\n".join(lines))
    return lines


def drawable(shape: tuple[int, ...]) -> bool:
    """Tells whether what a generator makes is a picture, and not latents."""
    return len(shape) == 3 and shape[-1] in (1, 3)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)
