"""MeanFlow and shortcut models against the official losses, targets, gradients and samples, on the toy network."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.denoiser import Predict
from gen.diffusion.flowmap import AverageVelocity, FlowMap
from gen.diffusion.meanflow import MeanFlowTask
from gen.diffusion.objectives import Draws, noised
from gen.diffusion.process import Linear
from gen.diffusion.shortcut import ShortcutTask, bootstrap_halvings
from gen.diffusion.times import TimeSampler
from gen.sampling.flowmaps import jumps
from gen.training.ema import Constant
from tests.parity.conftest import Fixture, fixtures
from tests.parity.toys import Toy, official, ours


def toy(config: dict[str, Any]) -> Toy:
    return Toy(config["channels"], config["toy_C"], config["toy_M"], config["num_classes"] + 1, times=2)


def condition(labels: np.ndarray, classes: int) -> dict[str, jax.Array]:
    """The label as the toy takes it, with the null label beside."""
    return {
        "y": jax.nn.one_hot(jnp.asarray(labels), classes + 1),
        "null": jnp.broadcast_to(jax.nn.one_hot(classes, classes + 1), (len(labels), classes + 1)),
    }


@dataclasses.dataclass(frozen=True)
class Conditional(Toy):
    """The toy with what a task asks of a backbone."""

    shape: tuple[int, ...] = ()
    conditions: Any = ()


def conditional(config: dict[str, Any]) -> Conditional:
    side = config["resolution"]
    plain = toy(config)
    return Conditional(
        **{f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)},
        shape=(side, side, config["channels"]),
        conditions=("label",),
    )


@pytest.mark.parametrize("fx", fixtures("meanflow-loss*"), ids=str)
def test_meanflow(fx: Fixture) -> None:
    c, classes = fx.config, fx.config["num_classes"]
    flow_map = FlowMap(conditional(c), Linear(), AverageVelocity())
    weights = {("ws" if name == "wh" else name): value for name, value in fx.weights.items()}
    params = ours(weights, "")
    x, eps = jnp.asarray(fx.io["x"]), jnp.asarray(fx.io["noise"])
    cond = condition(fx.io["label"], classes)
    for name, case in c["cases"].items():
        task = MeanFlowTask(
            flow_map=flow_map,
            dropout=case["class_dropout_prob"],
            times=TimeSampler("logit-normal", c["P_mean"], c["P_std"]),
            instant=case["data_proportion"],
            omega=case["omega"] if case["guidance_eq"] == "cfg" else 1.0,
            kappa=case["kappa"] if case["guidance_eq"] == "cfg" else 0.0,
            guided_from=case.get("t_start", c["t_start_default"]),
            guided_to=case.get("t_end", c["t_end_default"]),
            power=case["norm_p"],
            floor=case.get("norm_eps", c["norm_eps_default"]),
        )
        t, s = task.ordered(*(task.times.times(Linear(), jnp.asarray(fx.io[f"{k}_normal_draw"])) for k in "tr"))
        fx.close(t, f"{name}_t")
        fx.close(s, f"{name}_r")
        lost = (fx.io["drop_uniform_draw"] < task.dropout).sum()
        dropped = task.first(int(lost), len(x))
        draws = Draws(t, eps, {"s": s, "dropped": dropped})
        x_t = noised(Linear(), x, draws)
        fx.close(x_t, f"{name}_z_t")
        kept = task.dropped(params, cond, dropped)
        fx.close(kept["y"].argmax(-1).astype(jnp.int32), f"{name}_label_input")
        v = task.velocity({}, x_t, x, cond, draws)
        guided = task.guided(params, v, x_t, cond, draws)
        fx.close(guided, f"{name}_v_guided")
        found = flow_map.jvp(params, (x_t, t, s), (guided, jnp.float32(1.0), jnp.float32(0.0)), kept)
        fx.close(found.value, f"{name}_u")
        fx.close(found.tangent, f"{name}_du_dt")
        fx.close(guided - (t - s)[:, None, None, None] * found.tangent, f"{name}_u_target")
        (loss, aux), grads = jax.value_and_grad(task.loss, has_aux=True)(params, {}, x, cond, draws)
        fx.close(loss, f"{name}_loss")
        np.testing.assert_allclose(aux.metrics["v_loss"], fx.io[f"{name}_v_loss_per_sample"].mean(), rtol=1e-4)
        for array, value in official(grads, f"{name}_grad.").items():
            fx.close(value, array.replace("grad.ws", "grad.wh"))
    for name in sorted(k for k in fx.io if k.endswith("_timesteps")):
        times = fx.io[name].astype(np.float64)
        made = jumps(flow_map, params, eps, times, lambda i: eps, cond)
        fx.close(made, name.replace("timesteps", "sample"))


@pytest.mark.parametrize("fx", fixtures("shortcut-target*"), ids=str)
def test_shortcut(fx: Fixture) -> None:
    c, classes, finest = fx.config, fx.config["num_classes"], fx.config["denoise_timesteps"]
    levels = finest.bit_length() - 1
    process = Linear(sigma_min=1e-5)
    flow_map = FlowMap(
        conditional(c), process, AverageVelocity("halvings", 1.0, Predict("velocity", "reversed", sign=-1), finest)
    )
    # the fixture's toy divides the halvings by 7
    names = {f"{role}.wd": f"{role}.ws" for role in ("net", "ema")}
    weights = {names.get(k, k): v / 7.0 if k in names else v for k, v in fx.weights.items()}
    images, labels = jnp.asarray(fx.io["images"]), fx.io["labels"]
    for name, case in c["cases"].items():
        task = ShortcutTask(
            flow_map=flow_map,
            emas=(Constant(0.999),) if case["bootstrap_ema"] else (),
            every=case["bootstrap_every"],
            biased=bool(case["bootstrap_dt_bias"]),
            scale=case["cfg_scale"] if case["bootstrap_cfg"] else 1.0,
        )
        b, n = len(images), len(images) // case["bootstrap_every"]
        assert len(fx.io[f"{name}_boot_t_int"]) == n
        rows = np.concatenate([np.arange(n), np.arange(b - n)])  # the flow rows begin again at the first image
        halvings = np.concatenate([bootstrap_halvings(n, finest, task.biased), np.full(b - n, levels)])
        start = np.concatenate([fx.io[f"{name}_boot_t_int"], fx.io[f"{name}_flow_t_int"][: b - n]])
        t, s = task.ends(jnp.asarray(start), 2**halvings)
        fx.close(1.0 - t, f"{name}_t")
        fx.close(np.float32(halvings), f"{name}_dt_base")
        noise = np.concatenate([fx.io[f"{name}_boot_noise"], fx.io[f"{name}_flow_noise"][: b - n]])
        lost = np.concatenate([np.zeros(n, bool), fx.io[f"{name}_label_drop"][: b - n].astype(bool)])
        x, cond = images[rows], condition(labels[rows], classes)
        draws = Draws(t, jnp.asarray(noise), {"s": s, "dropped": jnp.asarray(lost)})
        x_t = noised(process, x, draws)
        fx.close(x_t, f"{name}_x_t")
        averaged = ours(weights, "ema." if case["bootstrap_ema"] else "net.")
        target = task.targets({}, averaged, x, x_t, cond, draws)
        fx.close(-target, f"{name}_v_target")
        params = ours(weights, "net.")
        kept = task.dropped(params, cond, jnp.asarray(lost))
        fx.close(kept["y"].argmax(-1).astype(jnp.int32), f"{name}_labels_out")
        loss, _ = task.loss(params, x_t, target, cond, t, s, jnp.asarray(lost))
        fx.close(loss, f"{name}_loss")
