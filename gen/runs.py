"""`load`: a run folder back as something to use."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gen import arrays
from gen.config import fingerprint, suggest
from gen.errors import GenError
from gen.files import read_json
from gen.nn.conditions import make_conditions
from gen.nn.network import param_shapes
from gen.sampling.generate import quantise
from gen.sampling.noise import decode_keys
from gen.training.budget import abstract_states
from gen.training.checkpoints import kept_steps, latest_step
from gen.training.ema import PowerFunction, combine, posthoc_coefficients
from gen.training.indexed import sample_keys
from gen.training.run import RunConfig, load_config, load_run
from gen.training.task import State

__all__ = ["Loaded", "Weights", "averaged", "load", "planned", "read_config"]

Weights = Literal["ema", "raw"]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained run: its configuration and its parameters.

    Attributes:
      path: the run folder.
      config: its RunConfig.
      params: arrays by role: what the last stage's task exports (``net`` or ``tokenizer``), and the run's artifacts.
      weights: which weights ``params`` holds: ``ema`` where the task keeps an average, else ``raw``.
      step: the training step they are from.
      identity: fingerprint of the configuration as it was written, whatever settings later versions add to it; "" for
        a run that is in no folder.
    """

    path: Path
    config: RunConfig
    params: Mapping[str, Any]
    weights: Weights
    step: int
    identity: str = ""

    def __repr__(self) -> str:
        what = ", ".join(type(model.config).__name__ for model in self.config.exported().values())
        return f"Loaded({str(self.path)!r}: {what}, step {self.step}, {self.weights} weights)"

    @property
    def generator(self) -> Any:
        """Gives the Generator. Raises GenError for a run that makes no images by itself (a tokenizer's)."""
        generator = self.config.generator()
        if generator is None:
            raise GenError(f"{self.path} holds no generator ({self._what()}); give a teacher's or student's run")
        return generator

    @property
    def denoiser(self) -> Any:
        """Gives the Denoiser; its parameters are ``params["net"]``. Raises GenError for a run of another kind."""
        models = self.config.exported()
        if "net" not in models:
            raise GenError(f"{self.path} holds no denoiser ({self._what()}); give a diffusion or flow model's run")
        return models["net"].config

    @property
    def tokenizer(self) -> Any:
        """Gives the Tokenizer; its parameters are ``params["tokenizer"]``.

        Raises GenError for a run without a tokenizer.
        """
        models = self.config.exported()
        found = models["tokenizer"].config if "tokenizer" in models else self.config.tokenizer
        if found is None or "tokenizer" not in self.params:
            raise GenError(f"{self.path} holds no tokenizer ({self._what()}); give a tokenizer's run")
        return found

    def with_sampler(self, sampler: Any) -> "Loaded":
        """Gives the same run, sampled otherwise."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, sampler=sampler))

    def sample(
        self,
        seeds: Sequence[int],
        labels: int | Sequence[int] | None = None,
        *,
        steps: int | None = None,
        solver: Any = None,
        grid: Any = None,
        guidance: Any = None,
        cond: Mapping[str, Any] | None = None,
        batch: int = 64,
    ) -> np.ndarray:
        """Gives images (N, H, W, C) uint8, one per seed.

        Args:
          seeds: sample i depends on seeds[i] and its condition alone.
          labels: one class, or one per seed; classes in turn (seed mod number of classes) by default.
          steps, solver, grid, guidance: other settings than the run's own: a number, the configuration of a solver and
            of a grid, a guidance scale or the configuration of a guidance.
          cond: further conditions by name, one value for all seeds or one per seed.
          batch: images at a time.

        Raises:
          GenError: a label out of range, a condition that is missing or unknown, a setting that the run has not.
        """
        self.generator  # noqa: B018 - says what a run without one is
        changes = {"steps": steps, "solver": solver, "grid": grid, "guidance": guidance}
        generator = self.with_sampler(self.config.sampler.changed(**changes)).generator
        numbers = np.asarray(list(seeds), np.int32)
        made = make_conditions(generator.conditions, numbers, {"label": labels, **(cond or {})})
        call = _sampler(generator)
        out = []
        for start in range(0, len(numbers), batch):
            rows = np.minimum(np.arange(start, start + min(batch, len(numbers))), len(numbers) - 1)
            images = call(self.params, jnp.asarray(numbers[rows]), {k: v[rows] for k, v in made.items()})
            out.append(np.asarray(images)[: len(numbers) - start])
        return np.concatenate(out)

    def encode(self, images: np.ndarray, *, cond: Mapping[str, Any] | None = None) -> np.ndarray:
        """Gives what a cache keeps of images (N, H, W, C) uint8: latents (the mode, raw scale), token ids, or bits.

        Args:
          cond: the tokenizer's conditions by name, one value for all images or one each.

        Raises GenError for images of another size or type.
        """
        tokenizer = self.tokenizer
        expected = tuple(tokenizer.spec.image)
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1:] != expected:
            given = f"{images.dtype} {images.shape}"
            raise GenError(f"images are {given}; this tokenizer takes uint8 (N, {', '.join(map(str, expected))})")
        numbers = np.arange(len(images), dtype=np.int32)
        made = make_conditions(tokenizer.spec.conditions, numbers, cond)
        return np.asarray(_encoder(tokenizer)(self.params["tokenizer"], images, numbers, made))

    def decode(
        self,
        stored: np.ndarray,
        *,
        seeds: Sequence[int] | None = None,
        cond: Mapping[str, Any] | None = None,
        options: Any = None,
    ) -> np.ndarray:
        """Gives images (N, H, W, C) uint8 of what `encode` gives: raw latents, ids or bits (N, *spec.shape).

        Args:
          seeds: of decoders that sample, one per image; 0 to N - 1 by default.
          cond: the tokenizer's conditions by name.
          options: settings of a decoder that samples; None for its own.

        Raises GenError for latents, ids or bits of another shape or range.
        """
        tokenizer = self.tokenizer
        if tuple(stored.shape[1:]) != tuple(tokenizer.spec.shape):
            raise GenError(f"{stored.shape} is not what this tokenizer decodes: (N, {tokenizer.spec.shape})")
        _check_rows(tokenizer.spec, stored)
        numbers = np.arange(len(stored), dtype=np.int32) if seeds is None else np.asarray(list(seeds), np.int32)
        made = make_conditions(tokenizer.spec.conditions, numbers, cond)
        return np.asarray(_decoder(tokenizer, options)(self.params["tokenizer"], stored, numbers, made))

    @property
    def origin(self) -> str:
        """Tells where these weights came from: name and fingerprint of the configuration, step, averaged or raw.

        How they are sampled is no part of it.
        """
        return f"{self.config.name} {self.identity or fingerprint(self.config)} step {self.step} {self.weights}"

    def _what(self) -> str:
        tasks = ", ".join(type(stage.task).__name__ for stage in self.config.stages)
        return f"'{self.config.name}', {tasks or 'no training stage'}"


def _check_rows(spec: Any, stored: np.ndarray) -> None:
    """Raises GenError for ids that the tokenizer does not have, and for latents that are no numbers."""
    if spec.kind == "continuous":
        good, expected = np.isfinite(stored), "finite latents"
    else:
        top = (spec.vocabulary or 2) - 1
        good, expected = (stored >= 0) & (stored <= top), f"integers from 0 to {top}"
        if stored.dtype.kind not in "iub":
            raise GenError(f"{spec.kind} are {stored.dtype}; this tokenizer decodes {expected}")
    if not good.all():
        row = np.argwhere(~good)[0]
        raise GenError(f"row {row[0]} holds {stored[tuple(row)]}; this tokenizer decodes {expected}")


@functools.lru_cache(maxsize=8)
def _sampler(generator: Any) -> Callable[..., jax.Array]:
    return jax.jit(lambda params, seeds, cond: quantise(generator(params, sample_keys(0, seeds), cond)))


@functools.lru_cache(maxsize=8)
def _encoder(tokenizer: Any) -> Callable[..., jax.Array]:
    def encode(params: Any, images: jax.Array, seeds: jax.Array, cond: Any) -> jax.Array:
        keys = sample_keys(0, seeds)
        stored: jax.Array = tokenizer.encode(params, images / 127.5 - 1.0, cond=cond, keys=keys).stored
        return stored

    return jax.jit(encode)


@functools.lru_cache(maxsize=8)
def _decoder(tokenizer: Any, options: Any) -> Callable[..., jax.Array]:
    def decode(params: Any, stored: jax.Array, seeds: jax.Array, cond: Any) -> jax.Array:
        codes = stored if tokenizer.spec.kind == "continuous" else tokenizer.embed(params, stored)
        keys = decode_keys(sample_keys(0, seeds))
        return quantise(tokenizer.decode(params, codes, cond=cond, keys=keys, options=options))

    return jax.jit(decode)


def read_config(path: str | Path) -> RunConfig:
    """Gives the configuration of the run folder at `path`. Raises GenError when there is no run, or not a sound one."""
    path = Path(path)
    if not (path / "config.json").is_file():
        raise GenError(f"{path} is not a run folder (it has no config.json); {_nearby(path)}")
    return load_config(path)


def _nearby(path: Path) -> str:
    """What the user may have meant: a run inside the folder, or one with a similar name beside it."""
    if path.is_dir():
        inside = sorted(p.parent.name for p in path.glob("*/config.json"))
        return f"runs inside it: {', '.join(str(path / p) for p in inside)}" if inside else "give a folder made by gen"
    beside = [str(p.parent) for p in path.parent.glob("*/config.json")]
    return suggest(str(path), beside) if beside else "give a folder made by gen train, demo or convert"


def load(path: str | Path, *, weights: Weights = "ema", step: int | None = None) -> Loaded:
    """Loads the run folder at `path`: a teacher, a student, a tokenizer, or converted published weights.

    Args:
      path: the run folder.
      weights: ``ema`` for the averaged weights, which the field reports; ``raw`` for the optimiser's own.
      step: a kept checkpoint's step; the last by default.
    Raises GenError when there is no such run or checkpoint, or its files are damaged or do not fit its configuration.
    """
    path = Path(path)
    config = read_config(path)
    identity = fingerprint(read_json(path / "config.json"))
    params = {file.stem: arrays.load(file) for file in sorted((path / "artifacts").glob("*.safetensors"))}
    if not config.stages:
        loaded = Loaded(path, config, params, "raw", 0, identity)
    else:
        step = latest_step(path) if step is None else step
        _, stage, state = load_run(path, step)
        if weights == "raw":
            state = dataclasses.replace(state, ema={})
        params = dict(stage.task.opened({**params, **stage.task.export(state)}))
        loaded = Loaded(path, config, params, "ema" if state.ema else "raw", step, identity)
    _check_shapes(loaded)
    return loaded


def averaged(path: str | Path, std: float) -> Loaded:
    """Gives a run with averaged weights of any relative width, made after training (EDM2; arXiv 2312.02696, sec. 3).

    Its stored averages, of all widths and at all kept checkpoints of the last stage, are combined by least squares.

    Args:
      path: the run folder.
      std: the width, relative to the length of the training.

    Raises GenError for a run without power-function averages, and for a width out of range.
    """
    loaded = load(path)
    last = loaded.config.stages[-1] if loaded.config.stages else None
    part = last.task.parts[0] if last is not None else None
    widths = {} if part is None else {k: d.std for k, d in part.named_averages.items() if isinstance(d, PowerFunction)}
    if part is None or last is None or len(widths) < 2:
        raise GenError(
            f"{path} keeps no power-function averages to make others of; train with two or more of them, such as "
            "emas of ema-power with std 0.05 and 0.1 (the presets of edm2 do)"
        )
    PowerFunction(std)  # says what widths there are
    times, stds, trees = [], [], []
    for step in kept_steps(path):
        _, stage, state = load_run(path, step)
        if stage.name == last.name and int(state.step) > 0:
            for key, width in widths.items():
                times.append(float(state.step))
                stds.append(width)
                trees.append(state.ema[key])
    weights = posthoc_coefficients(times, stds, [max(times)], [std])[:, 0]
    made = {part.name: combine(trees, weights)}
    state = State(step=jnp.asarray(max(times), jnp.int32), params=made, ema=made)
    kept = {file.stem: arrays.load(file) for file in sorted((Path(path) / "artifacts").glob("*.safetensors"))}
    params = dict(last.task.opened({**kept, **last.task.export(state)}))
    return dataclasses.replace(loaded, params=params)


def planned(config: RunConfig, frozen: Mapping[str, Any], artifacts: Mapping[str, Any]) -> Loaded:
    """Gives a run that has not been trained, as what is planned with it sees it: shapes in place of weights.

    Args:
      frozen, artifacts: arrays or shapes by role, as the run would be trained with them.
    """
    *_, state = abstract_states(config.stages, frozen)
    task = config.stages[-1].task
    params = jax.eval_shape(lambda kept, state: task.opened({**kept, **task.export(state)}), dict(artifacts), state)
    return Loaded(Path(config.name), config, params, "ema" if state.ema else "raw", config.steps)


def _check_shapes(loaded: Loaded) -> None:
    """Raises GenError where the arrays are not those of the networks that the configuration describes."""
    owners = {role: model.config for role, model in loaded.config.exported().items() if role == "tokenizer"}
    generator = loaded.config.generator()
    for role, owner in {**owners, **({} if generator is None else generator.networks)}.items():
        if role not in loaded.params:
            continue
        pairs = [_shapes(tree) for tree in (param_shapes(owner), loaded.params[role])]
        wrong = next((p for p in sorted({*pairs[0], *pairs[1]}) if pairs[0].get(p) != pairs[1].get(p)), None)
        if wrong is not None:
            found, want = (pair.get(wrong, "nothing") for pair in reversed(pairs))
            raise GenError(
                f"{loaded.path}: {role} has {found} at {wrong}, its configuration wants {want}; "
                "the weights belong to another configuration: restore config.json or the weights"
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path: np.shape(leaf) for path, leaf in arrays.flatten(tree).items()}
