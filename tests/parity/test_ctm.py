"""CTM's terms, adaptive weights, gradients and draws against the official code, through the functions that train."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gen.diffusion.denoiser import Denoiser, EDMPrecondition
from gen.diffusion.flowmap import FlowMap, Jump
from gen.diffusion.objectives import Draws, EDMLoss
from gen.distill.ctm import CTMDraws, CTMTask, discriminator_loss, step_law
from gen.features.resize import resize
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_consistency import check_gradient, edm, image, network
from tests.parity.toys import nchw, official, ours

FOUND = fixtures("ctm-losses*")
LOSS, GRADIENT = {"rtol": 1e-4, "atol": 0.0}, {"rtol": 1e-3, "atol": 1e-7}  # the README's tolerances


def conv(layer: Any, x: jax.Array, stride: int, pad: int) -> jax.Array:
    pads = ((pad, pad), (pad, pad))
    numbers = ("NHWC", "HWIO", "NHWC")
    return (
        jax.lax.conv_general_dilated(x, layer["kernel"], (stride, stride), pads, dimension_numbers=numbers)
        + layer["bias"]
    )


@dataclasses.dataclass(frozen=True)
class Features:
    """The fixture's stand-in for LPIPS: images enlarged to 224 pixels in [0, 1], compared after one convolution."""

    def expect(self, frozen: Any) -> None:
        pass

    def __call__(self, frozen: Any, a: jax.Array, b: jax.Array) -> jax.Array:
        maps = [
            conv(frozen["feature"]["conv"], 0.5 * (resize(x, (224, 224), "torch-bilinear") + 1.0), 4, 2) for x in (a, b)
        ]
        return jnp.square(maps[0] - maps[1]).reshape(len(a), -1).mean(1)


@dataclasses.dataclass(frozen=True)
class TwoHeads:
    """The fixture's discriminator: two heads on the raw image."""

    channels: int
    hidden: int

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return _TwoHeads(self, rngs)


class _TwoHeads(nnx.Module):
    def __init__(self, config: TwoHeads, rngs: nnx.Rngs) -> None:
        self.a = nnx.Conv(config.channels, config.hidden, (3, 3), strides=2, padding=((1, 1), (1, 1)), rngs=rngs)
        self.b = nnx.Conv(config.hidden, 1, (3, 3), strides=2, padding=((1, 1), (1, 1)), rngs=rngs)
        self.c = nnx.Conv(config.channels, 1, (4, 4), strides=4, padding="VALID", rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[tuple[jax.Array, ...], dict[str, jax.Array]]:
        return (self.b(jax.nn.leaky_relu(self.a(x), 0.2)), self.c(x)), {}


def make(fx: Fixture) -> tuple[CTMTask, dict[str, Any], CTMDraws]:
    """The task, the networks by role, and the fixture's draws."""
    c, process = fx.config, edm(fx)
    toy, student = network(fx, "student.model.")
    single, teacher = network(fx, "teacher.model.")
    judge = ours(fx.weights, "disc.")
    nets = {
        "student": student,
        "target": network(fx, "target.model.")[1],
        "disc": judge,
        "frozen": {"teacher": teacher, "feature": ours(fx.weights, "feature.")},
    }
    last = c["adaptive_last_layer"].removeprefix("student.model.").replace(".", "/").replace("/weight", "/kernel")
    channels, hidden = judge["a"]["kernel"].shape[2:]
    task = CTMTask(
        flow_map=FlowMap(toy, process, Jump()),
        teacher=Denoiser(single, process, EDMPrecondition(), EDMLoss()),
        points=c["num_grid"],
        most=c["num_grid"] - 1,
        distance=Features(),
        last_layer=last,
        dsm=c["weights"]["dsm"],
        gan=c["weights"]["gan"],
        span=c["diffusion_mult"],
        discriminator=TwoHeads(channels, hidden),
    )
    half = jnp.zeros(c["batch"] - len(fx.io["dsm_normal_draw"]))
    own = jnp.exp(-1.2 + 1.2 * jnp.concatenate([jnp.asarray(fx.io["dsm_normal_draw"]), half]))
    uniform = jnp.concatenate([jnp.zeros(c["batch"] - len(fx.io["dsm_uniform_draw"])), fx.io["dsm_uniform_draw"]])
    draws = CTMDraws(
        steps=jnp.full(c["batch"], c["heun_steps"], jnp.int32),
        start=jnp.asarray(fx.io["t_index"]),
        end=jnp.asarray(fx.io["s_index"]),
        eps=image(fx, "noise"),
        dsm=Draws(task.dsm_times(own, uniform), image(fx, "dsm_noise")),
    )
    return task, nets, draws


@pytest.mark.parametrize("fx", FOUND, ids=str)
def test_jumps_and_solver(fx: Fixture) -> None:
    task, nets, draws = make(fx)
    cond, x = {"y": jnp.asarray(fx.io["label_onehot"])}, image(fx, "x_start")
    grid = jnp.asarray(task.times, jnp.float32)
    t, s = grid[draws.start], grid[draws.end]
    for name, value in (("t", t), ("s", s), ("u", grid[draws.start + draws.steps]), ("dsm_sigma", draws.dsm.t)):
        fx.close(value, name)
    x_t = x + t[:, None, None, None] * draws.eps
    fx.close(nchw(x_t), "x_t")
    fx.close(nchw(task.flow_map.value(nets["student"], x_t, t, s, cond).value), "g_student")
    fx.close(nchw(task.jump(nets["student"], x_t, t, s, cond)), "G_student_t_to_s")
    fx.close(nchw(jax.jit(task.solve)(nets["frozen"]["teacher"], x_t, draws, cond)), "x_u_teacher")
    fx.close(nchw(task.estimate(nets["student"], nets["target"], x, cond, draws)), "ctm_estimate")
    reference = jax.jit(task.reference)(nets["student"], nets["target"], nets["frozen"]["teacher"], x, cond, draws)
    fx.close(nchw(reference), "ctm_target")
    fx.close(step_law(len(fx.io["heun_step_prob"])), "heun_step_prob")


@pytest.mark.parametrize("fx", FOUND, ids=str)
def test_student(fx: Fixture) -> None:
    """Terms, weights and gradients: of consistency alone, and of the sum."""
    task, nets, draws = make(fx)
    cond, x = {"y": jnp.asarray(fx.io["label_onehot"])}, image(fx, "x_start")
    rest = (nets["frozen"], x, cond, draws)
    loss, aux = jax.jit(lambda p: task.student_loss(p, nets["target"], nets["disc"], *rest))(nets["student"])
    fx.close(loss, "total_loss", **LOSS)
    found = aux.metrics
    fx.close(found["consistency"], fx.io["consistency_loss_per_sample"].mean(), **LOSS)
    fx.close(found["dsm_weight"], "dsm_adaptive_weight", **LOSS)
    fx.close(found["gan_weight"], "gan_adaptive_weight", **LOSS)
    fx.close(found["gan"], "gan_generator_loss_raw", **LOSS)
    fx.close(found["gan"] * found["gan_weight"], "gan_generator_loss", **LOSS)
    dsm = task.dsm_losses(nets["student"], x, cond, draws)
    fx.close(dsm, "dsm_loss_raw_per_sample", **LOSS)
    fx.close(dsm * found["dsm_weight"], "dsm_loss_per_sample", **LOSS)

    def consistency(params: Any) -> jax.Array:
        reference = task.reference(params, nets["target"], nets["frozen"]["teacher"], x, cond, draws)
        return task.distance(nets["frozen"], task.estimate(params, nets["target"], x, cond, draws), reference)

    fx.close(consistency(nets["student"]), "consistency_loss_per_sample", **LOSS)
    norm = jnp.linalg.norm(task.pull(nets["student"], lambda p: consistency(p).mean()))
    fx.close(norm, "last_layer_grad_norm_consistency", **GRADIENT)
    total = lambda p: task.student_loss(p, nets["target"], nets["disc"], *rest)[0]  # noqa: E731
    for name, term in (("consistency", lambda p: consistency(p).mean()), ("total", total)):
        check_gradient(fx, term, nets["student"], f"grad_{name}.model.", **GRADIENT)


@pytest.mark.parametrize("fx", FOUND, ids=str)
def test_discriminator(fx: Fixture) -> None:
    task, nets, _ = make(fx)
    x, fake = image(fx, "x_start"), image(fx, "discriminator_fake_input")

    def loss(params: Any) -> jax.Array:
        return discriminator_loss(task.judged(params, {}, x)[0], task.judged(params, {}, fake)[0])

    value, grads = jax.jit(jax.value_and_grad(loss))(nets["disc"])
    fx.close(value, "discriminator_loss", **LOSS)
    found = official(grads, "grad_disc.")
    assert set(found) == {name for name in fx.io if name.startswith("grad_disc.")}
    for name, array in found.items():
        fx.close(array, name, **GRADIENT)


@pytest.mark.parametrize("fx", FOUND, ids=str)
def test_draws_are_ordered_times_of_the_grid(fx: Fixture) -> None:
    task, _, _ = make(fx)
    x = jnp.zeros((64, 2, 2, 3))
    draw = jax.jit(task.draw)
    found = [jax.tree.map(np.asarray, draw(jax.random.key(i), x)) for i in range(50)]
    for d in found:
        assert len(np.unique(d.steps)) == 1
        assert (d.start >= 0).all()
        assert (d.start + d.steps <= d.end).all()
        assert (d.end <= task.points - 1).all()
    assert max(int(d.end.max()) for d in found) == task.points - 1
    few, many = (np.mean([(d.steps[0] > k) for d in found]) for k in (task.most // 2, 0))
    assert few > 0.6 < many  # three quarters of the mass lies above the middle
