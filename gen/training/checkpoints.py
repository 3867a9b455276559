"""Checkpoints of training state, by Orbax.

A checkpoint is a folder ``<run>/checkpoints/<step>`` with the items ``params``, ``opt``, ``ema``, ``aux`` (each
readable alone) and ``meta`` (JSON). It appears under its name only when it is whole.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gen.errors import GenError
from gen.files import writing
from gen.training.task import State

__all__ = ["Checkpoints", "best_step", "kept_steps", "latest_step", "load_meta", "load_weights"]

_ITEMS = ("params", "opt", "ema", "aux")


class Checkpoints:
    """The checkpoints of one run. Saves run in the background; use as a context manager, or call `close`.

    Args:
      folder: where they stand; made if missing.
      keep: the newest `keep` are kept.
      keep_every: those at multiples of it are kept for good; 0 for none.
      best: also keep the one whose ``score`` given to `save` is lowest; False for no such rule.

    Raises:
      GenError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, keep_every: int = 0, best: bool = False) -> None:
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        # Orbax logs every phase of every save, and each failure once per thread: those become one GenError here.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._saving: int | None = None
        self.folder = Path(folder).absolute()
        rules: list[Any] = [policies.LatestN(max(keep, 1))]
        if keep_every:
            rules.append(policies.EveryNSteps(keep_every))

        def score(metrics: Mapping[str, float]) -> float:
            return metrics["score"]

        if best:
            rules.append(policies.BestN(get_metric_fn=score, reverse=True, n=1, keep_checkpoints_without_metrics=False))
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(rules),
                cleanup_tmp_directories=True,
                best_fn=score
                if best
                else None,  # without it scores are not written, and forgotten by a run that goes on
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._args = ocp.args

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def latest(self) -> int | None:
        """Gives the newest whole checkpoint's step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all whole checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: State, meta: Mapping[str, Any], score: float | None = None) -> None:
        """Starts saving; returns once the arrays are copied. `state` may be donated afterwards.

        Raises:
          GenError: this or the previous save could not be written. Earlier checkpoints stand.
        """
        items = {name: getattr(state, name) for name in _ITEMS}
        saves = {name: self._args.StandardSave(tree) for name, tree in items.items() if jax.tree.leaves(tree)}
        meta = {**meta, "items": sorted(saves), "stage_step": int(state.step)}
        metrics = None if score is None else {"score": float(score)}
        self._check_room(saves, items)
        self._saving = step
        with self._failing("save", step):
            self._manager.save(
                step, args=self._args.Composite(meta=self._args.JsonSave(meta), **saves), metrics=metrics, force=True
            )

    def meta(self, step: int) -> dict[str, Any]:
        """Gives what was given to `save` as `meta`, with ``items`` and ``stage_step``."""
        return _read_meta(self.folder / str(step))

    def restore(self, step: int, target: State) -> State:
        """Gives the state saved at `step`.

        Args:
          step: one of `steps`.
          target: `jax.ShapeDtypeStruct` leaves with shardings: restored onto that layout, whatever it was.

        Raises:
          GenError: unreadable, or of another structure.
        """
        saved = self.meta(step)["items"]
        wanted = {name: getattr(target, name) for name in _ITEMS if jax.tree.leaves(getattr(target, name))}
        if set(saved) != set(wanted):
            raise GenError(
                f"checkpoint {self.folder / str(step)} holds {', '.join(saved)} but this task has "
                f"{', '.join(sorted(wanted))}; use the configuration it was made with"
            )
        with self._failing("restore", step):
            args = {name: self._args.StandardRestore(tree) for name, tree in wanted.items()}
            found = self._manager.restore(step, args=self._args.Composite(**args))
        trees = {name: found[name] if name in wanted else {} for name in _ITEMS}
        count = jax.device_put(np.asarray(self.meta(step)["stage_step"], np.int32), target.step.sharding)
        return State(step=count, **trees)

    def wait(self) -> None:
        """Blocks until the save under way is whole. Raises GenError when it failed."""
        with self._failing("save", self._saving):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and frees the threads."""
        try:
            self.wait()
        finally:
            with self._failing("save", self._saving):
                self._manager.close()

    def _check_room(self, saves: Mapping[str, Any], items: Mapping[str, Any]) -> None:
        """Finds out now what Orbax's threads would take minutes to report: a folder or a disk that takes nothing."""
        if jax.process_index() != 0:
            return
        with writing(self.folder):
            probe = self.folder / ".probe"
            probe.mkdir(exist_ok=True)
            probe.rmdir()
            free = shutil.disk_usage(self.folder).free
        size = sum(leaf.nbytes for name in saves for leaf in jax.tree.leaves(items[name]))
        if size > free:
            raise GenError(
                f"cannot write {self.folder}: a checkpoint takes {size / 1e9:.3g} GB and {free / 1e9:.3g} GB are "
                "free; free space or choose another output folder"
            )

    def _failing(self, what: str, step: int | None) -> "_Failing":
        return _Failing(f"cannot {what} checkpoint {self.folder / str(step)}")


@dataclasses.dataclass
class _Failing:
    """Orbax and its storage library raise many types; a person needs the place and the first line."""

    what: str

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, GenError) or not isinstance(error, Exception):
            return
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise GenError(
            f"{self.what}: {reason[:300]}; earlier checkpoints stand, free space or check the folder"
        ) from error


def latest_step(run_dir: str | Path) -> int:
    """Gives the newest whole checkpoint of a run folder. Raises GenError when there is none."""
    return kept_steps(run_dir)[-1]


def kept_steps(run_dir: str | Path) -> list[int]:
    """Gives the steps of all whole checkpoints of a run folder, rising. Raises GenError when there is none."""
    folder = Path(run_dir) / "checkpoints"
    steps = [int(p.name) for p in folder.glob("*") if p.name.isdigit() and (p / "meta" / "metadata").exists()]
    if not steps:
        raise GenError(f"{run_dir} has no finished checkpoint; train it first, or give a run folder")
    return sorted(steps)


def best_step(run_dir: str | Path) -> int:
    """Gives the kept checkpoint with the lowest score. Raises GenError when there is none that has a score."""
    scores = {
        int(path.parents[1].name): float(json.loads(path.read_text())["score"])
        for path in (Path(run_dir) / "checkpoints").glob("[0-9]*/metrics/metrics")
    }
    if not scores:
        raise GenError(f"{run_dir} has no checkpoint with a score; train it with engine.best and a hook that scores it")
    return min(scores, key=lambda step: scores[step])


def load_meta(run_dir: str | Path, step: int | None = None) -> dict[str, Any]:
    """Gives the metadata of a checkpoint (the newest by default), read without touching arrays."""
    return _read_meta((Path(run_dir) / "checkpoints") / str(latest_step(run_dir) if step is None else step))


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "meta" / "metadata").read_text()))
    except (OSError, ValueError) as error:
        raise GenError(f"{folder} is not a whole checkpoint ({error}); choose another step") from error


def load_weights(run_dir: str | Path, step: int | None = None) -> State:
    """Gives parameters and averages of a run's checkpoint, whole on the default device; optimisers are not read.

    Args:
      run_dir: a run folder.
      step: global step; the newest by default.

    Returns:
      A State whose ``opt`` and ``aux`` are empty.
    """
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # it warns of a file that only whole checkpoints have
    step = latest_step(run_dir) if step is None else step
    meta = load_meta(run_dir, step)
    folder = (Path(run_dir) / "checkpoints").absolute() / str(step)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    trees: dict[str, Any] = {}
    with _Failing(f"cannot read checkpoint {folder}"), ocp.StandardCheckpointer() as reader:
        for name in ("params", "ema"):
            if name not in meta["items"]:
                continue
            shapes = reader.metadata(folder / name).item_metadata
            target = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), dict(shapes))
            trees[name] = reader.restore(folder / name, target)
    return State(
        step=jax.numpy.asarray(meta["stage_step"], jax.numpy.int32), params=trees["params"], ema=trees.get("ema", {})
    )
