"""Progressive distillation against the official targets, losses, gradients and samples, on the toy network."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gen.diffusion.conversions import DataAndNoise
from gen.diffusion.cosine import Cosine
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.process import expand
from gen.distill.progressive_distillation import ProgressiveTask, Weight, halves, weighted_error
from gen.sampling.grids import Grid
from gen.sampling.guidance import Clip
from gen.sampling.integrate import Problem, integrate
from gen.sampling.solvers import DDIM
from tests.parity.conftest import Fixture, fixtures
from tests.parity.toys import Toy, _Toy, official, ours

WEIGHTS: dict[str, Weight] = {"snr_trunc": "snr-trunc", "constant": "constant", "snr": "snr", "v_mse": "v"}
MSE: dict[str, Weight] = {"x_mse": "constant", "eps_mse": "snr", "v_mse": "v"}


@dataclasses.dataclass(frozen=True)
class Angles(Toy):
    """The toy on the official clock, with what a task asks of a backbone.

    It takes the angle of the noise level that a time of `process` has, between -1 and 1.
    """

    process: Any = Cosine()
    outputs: int = 1
    shape: tuple[int, ...] = ()

    null_class: ClassVar[bool] = True
    dropout: ClassVar[float] = 0.0
    num_classes: ClassVar[int] = 1
    conditions: ClassVar[dict[str, Any]] = {"y": None}

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return _Angles(self, rngs)


class _Angles(_Toy):
    def __init__(self, config: Angles, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs)
        self.process = config.process
        self.conv_out = nnx.Conv(config.hidden, config.outputs * config.channels, (3, 3), rngs=rngs)

    def __call__(self, x: jax.Array, times: tuple[jax.Array, ...], cond: Any, **options: Any) -> Any:
        angle = jnp.arctan2(self.process.sigma(times[0]), self.process.alpha(times[0]))
        return super().__call__(x, (angle / (0.25 * jnp.pi) - 1.0, *times[1:]), cond, **options)


def network(config: dict[str, Any], process: Any, *, null: int = 0, outputs: int = 1) -> Angles:
    """The toy of a fixture; `null` further classes."""
    channels, side = config.get("channels", 3), config["resolution"]
    classes = config["num_classes"] + null
    shape = (side, side, channels)
    return Angles(channels, config["toy_C"], config["toy_M"], classes, process=process, outputs=outputs, shape=shape)


@pytest.mark.parametrize("fx", fixtures("progressive-distillation*"), ids=str)
def test_progressive(fx: Fixture) -> None:
    c = fx.config
    process = Cosine(c["logsnr_min"], c["logsnr_max"])
    with np.errstate(all="ignore"):
        fx.close(process.logsnr(fx.io["schedule_t"].astype(np.float64)), "schedule_logsnr")
    x, eps = jnp.asarray(fx.io["x"]), jnp.asarray(fx.io["noise"])
    cond = {"y": jax.nn.one_hot(fx.io["label"], c["num_classes"])}
    for case in c["cases"]:
        name, steps, kind = case["name"], case["student_steps"], case["mean_type"]
        parameterization = DataAndNoise() if kind == "both" else Predict(kind)
        denoiser = Denoiser(network(c, process, outputs=2 if kind == "both" else 1), process, parameterization)
        task = ProgressiveTask(teacher=denoiser, steps=steps, weight=WEIGHTS[case["loss_weight"]])
        student, teacher = (ours(fx.weights, f"{name}.{role}.") for role in ("student", "teacher"))
        i = jnp.asarray(fx.io[f"{name}_i"])
        assert fx.io[f"{name}_num_steps"] == steps
        at = halves(process, steps, i)
        a, s = expand(at.a, x), expand(at.s, x)
        z = a * x + s * eps
        fx.close(z, f"{name}_z")
        fx.close(2.0 * jnp.log(at.a / at.s), f"{name}_logsnr")
        fx.close(2.0 * jnp.log(at.a_middle / at.s_middle), f"{name}_logsnr_mid")
        target, middle, _ = task.target(denoiser, teacher, z, at, cond)
        fx.close(middle, f"{name}_z_mid")
        fx.close(target, f"{name}_x_target")
        noise = (z - a * target) / s
        fx.close(noise, f"{name}_eps_target")
        fx.close(a * noise - s * target, f"{name}_v_target")
        inside = fx.io[f"{name}_i"] > 0  # there one DDIM step of the student ends where the teacher's two do
        a2, s2 = (expand(jnp.float32(f(np.arange(steps) / steps))[i], x) for f in (process.alpha, process.sigma))
        fx.close((a2 * target + s2 * noise)[inside], fx.io[f"{name}_z_teacher"][inside], rtol=1e-3)
        found = denoiser(student, z, at.t, cond).denoised
        fx.close(found, f"{name}_model_x")
        for array, weight in MSE.items():
            fx.close(weighted_error(found, target, at.a, at.s, weight), f"{name}_{array}")
        fx.close(weighted_error(found, target, at.a, at.s, task.weight), f"{name}_loss_per_sample")
        grads, _ = jax.grad(task.loss, has_aux=True)(student, (denoiser, teacher), x, cond, i, eps)
        for array, value in official(grads, f"{name}_grad.").items():
            fx.close(value, array)
        bound = Clip()(denoiser.bind(student), lambda cond: cond)
        grid = Grid(np.linspace(1.0, 0.0, 5), process)
        made = integrate(DDIM(), Problem(bound, eps, grid, lambda i: eps, cond, Clip().init(eps)))
        fx.close(made, f"{name}_ddim4_from_noise")
