"""A known distribution in the plane, a teacher of it, and how far samples are from it.

The data are eight normal blobs on a ring, four of each class. The teacher is a small network that is trained here, in
a second or two, on the flow from them to noise. `check_toy` trains a student and holds its samples against the data.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.diffusion.backbones.backbone import BackboneConfig
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.process import Linear
from gen.diffusion.train import DenoiserTask
from gen.nn.network import Params
from gen.sampling.generator import FewSteps, Sampler
from gen.sampling.grids import Uniform
from gen.sampling.noise import unit_noise
from gen.sampling.solvers import Euler, Heun
from gen.training.ema import Constant
from gen.training.optim import OptimConfig

__all__ = ["DENOISER", "Plane", "batch", "check_toy", "data", "distance", "mmd", "pairs", "sample", "teacher", "train"]

BLOBS, CLASSES = 8, 2


@dataclasses.dataclass(frozen=True)
class Plane(BackboneConfig):
    """A perceptron of points in the plane, times (through sines) and labels."""

    channels: int = 2
    width: int = 64
    num_classes: int = CLASSES
    times: int = 1
    size: tuple[int, ...] = (1,)

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return _Plane(self, rngs)


class _Plane(nnx.Module):
    def __init__(self, config: Plane, rngs: nnx.Rngs) -> None:
        self.config, width = config, config.width
        self.point = nnx.Linear(config.channels, width, rngs=rngs)
        self.label = nnx.Linear(config.num_classes + 1, width, use_bias=False, rngs=rngs)
        self.time = nnx.Linear(8, width, rngs=rngs)
        if config.times == 2:  # the second time starts without a say
            self.time2 = nnx.Linear(8, width, kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.inner = nnx.Linear(width, width, rngs=rngs)
        self.inner2 = nnx.Linear(width, width, rngs=rngs)
        self.outer = nnx.Linear(width, config.channels, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        times: tuple[jax.Array, ...],
        cond: Mapping[str, jax.Array],
        *,
        controls: Any = None,
        taps: tuple[str, ...] = (),
        stop: bool = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        where = self.label(jax.nn.one_hot(cond["label"], self.config.num_classes + 1)) + self.time(_waves(times[0]))
        if self.config.times == 2:
            where = where + self.time2(_waves(times[1]))
        h = jax.nn.silu(self.point(x) + where[:, None])
        h = jax.nn.silu(self.inner(h) + where[:, None])
        h = jax.nn.silu(self.inner2(h))
        return (x if stop else self.outer(h)), dict.fromkeys(taps, h)

    def null(self, cond: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        return {**cond, "label": jnp.full_like(cond["label"], self.config.num_classes)}


def _waves(t: jax.Array) -> jax.Array:
    angles = t[:, None] * jnp.asarray([0.5, 1.0, 2.0, 4.0])
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


DENOISER = Denoiser(Plane(), Linear(), Predict("velocity"))


def data(key: jax.Array, label: jax.Array) -> jax.Array:
    """Gives points (B, 1, 2) of the blobs of each label: the even ones, or the odd ones."""
    which, spread = jax.random.split(key)
    angle = (2.0 * jnp.pi / BLOBS) * (CLASSES * jax.random.randint(which, label.shape, 0, BLOBS // CLASSES) + label)
    centre = 1.4 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
    return (centre + 0.12 * jax.random.normal(spread, centre.shape))[:, None]


@functools.partial(jax.jit, static_argnums=1)
def batch(step: jax.Array | int, count: int = 256) -> dict[str, jax.Array]:
    """Gives the training batch of a step."""
    label = jnp.arange(count, dtype=jnp.int32) % CLASSES
    return {"latent": data(jax.random.fold_in(jax.random.key(11), step), label), "label": label}


@functools.partial(jax.jit, static_argnums=1)
def pairs(step: jax.Array | int, count: int = 256) -> dict[str, jax.Array]:
    """Gives a batch of noise and what the toy teacher's solver makes of it, as "latent"."""
    label = jnp.arange(count, dtype=jnp.int32) % CLASSES
    keys = jax.random.split(jax.random.fold_in(jax.random.key(13), step), count)
    made = Sampler(Heun(), Uniform(), 8)(DENOISER, teacher(), keys, (1, 2), {"label": label})
    return {"latent": made, "noise": unit_noise(keys, (1, 2)), "label": label}


def train(
    task: Any,
    frozen: Mapping[str, Any],
    steps: int,
    *,
    count: int = 256,
    previous: Any = None,
    rows: Callable[..., Mapping[str, jax.Array]] = batch,
) -> Any:
    """Gives the state after `steps` steps of a task, as the engine would run them.

    A task of one program runs as one loop on the device.

    Args:
      previous: the state of a stage before.
      rows: the batch of a step: `batch` or `pairs`.
    """
    state = jax.jit(task.init)(jax.random.key(0), frozen, previous)
    programs = {name: jax.jit(program) for name, program in task.programs.items()}

    def update(program: Any, state: Any, step: Any, schedule: Any) -> Any:
        return program(state, frozen, rows(step, count), schedule, jax.random.fold_in(jax.random.key(7), step))[0]

    if len(programs) > 1:
        for step in range(steps):
            state = update(programs[task.select(step)], state, step, task.inputs(step, steps))
        return state
    (program,) = task.programs.values()
    inputs = [{k: np.asarray(v) for k, v in task.inputs(step, steps).items()} for step in range(steps)]
    schedules = {name: np.stack([given[name] for given in inputs]) for name in inputs[0]}

    @jax.jit
    def run(state: Any) -> Any:
        body = lambda state, row: (update(program, state, *row), None)  # noqa: E731
        return jax.lax.scan(body, state, (jnp.arange(steps), schedules))[0]

    return run(state)


@functools.cache
def teacher(denoiser: Denoiser = DENOISER, steps: int = 1000) -> Params:
    """Gives the parameters of a denoiser that was trained on `data`, for any process."""
    optim = OptimConfig(3e-3, schedule="cosine", clip=1.0, warmup=50)
    task = DenoiserTask(denoiser, optim=optim, emas=(Constant(0.99, warmup=True),))
    return task.export(train(task, {}, steps))["net"]


def sample(models: Mapping[str, Any], params: Mapping[str, Any], sampler: Any, count: int = 1024) -> np.ndarray:
    """Gives samples (count, 2) of what a task exports, from fixed noise."""
    generator = sampler.generator(models, None)
    label = jnp.arange(count, dtype=jnp.int32) % CLASSES
    keys = jax.random.split(jax.random.key(5), count)
    return np.asarray(jax.jit(generator)(params, keys, {"label": label}))[:, 0]


def mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Gives the squared maximum mean discrepancy of two samples, unbiased, under a sum of three Gaussian kernels."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        square = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2.0 * a @ b.T
        return sum(np.exp(-square / (2.0 * s**2)) for s in (0.1, 0.3, 1.0)) / 3.0

    n, m = len(x), len(y)
    own = (kernel(x, x).sum() - n) / (n * (n - 1)) + (kernel(y, y).sum() - m) / (m * (m - 1))
    return float(own - 2.0 * kernel(x, y).mean())


def distance(samples: np.ndarray) -> float:
    """Gives the mean over the classes of the discrepancy of samples (label i mod 2) from fresh data."""
    label = jnp.arange(len(samples), dtype=jnp.int32) % CLASSES
    fresh = np.asarray(data(jax.random.key(99), label))[:, 0]
    return float(np.mean([mmd(samples[k::CLASSES], fresh[k::CLASSES]) for k in range(CLASSES)]))


@functools.cache
def teacher_distance(steps: int, denoiser: Denoiser = DENOISER) -> float:
    """Gives the distance of the teacher's samples by Euler steps."""
    task = DenoiserTask(denoiser)
    return distance(sample(task.models(), {"net": teacher(denoiser)}, Sampler(Euler(), Uniform(), steps)))


def check_toy(
    task: Any,
    steps: int,
    *,
    sampler: Any = None,
    count: int = 256,
    frozen: Callable[[Params], Mapping[str, Any]] = lambda params: {"teacher": params},
    previous: Any = None,
    rows: Callable[..., Mapping[str, jax.Array]] = batch,
) -> Any:
    """Holds that a student of the toy teacher is nearer to the data than the teacher at four Euler steps.

    Args:
      task: the method, made for `DENOISER`.
      steps: of training, in batches of `count`.
      sampler: how the student is sampled; None for the times that it was trained for.
      frozen: the frozen arrays, from the teacher's parameters.
      previous: the state of a stage before.
      rows: see `train`.

    Returns:
      The state after training.
    """
    state = train(task, frozen(teacher()), steps, count=count, previous=previous, rows=rows)
    found = distance(sample(task.models(), task.export(state), sampler or FewSteps()))
    limit = teacher_distance(4)
    assert found < limit, f"the student is {found:.4f} from the data; the teacher at 4 Euler steps is {limit:.4f}"
    return state
