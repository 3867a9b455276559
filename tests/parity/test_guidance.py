"""Guidance rules against golden numbers: the predictions of a case's calls are given, there is no network."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.prediction import Prediction, PredictionKind
from gen.diffusion.process import Linear
from gen.sampling.guidance import AdaptiveProjected, Autoguidance, ClassifierFree, Interval, ZeroStar
from tests.parity.conftest import Fixture, fixtures
from tests.parity.toys import nchw, nhwc

CASES = [
    pytest.param(fx, case, id=f"{fx}-{case}")
    for fx in fixtures("guidance-cfg-variants*")
    for case in fx.config["cases"]
]
# rules that are not linear act in one quantity; the given predictions are taken to be in it
KINDS: dict[str, PredictionKind] = {"AdaptiveProjectedGuidance": "x", "ClassifierFreeZeroStarGuidance": "velocity"}


def guidance_of(spec: dict[str, Any], count: int) -> Any:
    """The case's guidance in our terms; scales that count from zero are one more."""
    from_zero = spec.get("use_original_formulation", False)
    scale = spec["guidance_scale"] + from_zero
    assert scale == spec["scale_counted_from_one"]
    rescale = spec.get("guidance_rescale", 0.0)
    inner: Any = {
        "ClassifierFreeGuidance": lambda: ClassifierFree(scale, rescale=rescale),
        "AdaptiveProjectedGuidance": lambda: AdaptiveProjected(
            scale,
            spec.get("eta", 1.0),
            spec.get("adaptive_projected_guidance_rescale", 15.0),
            spec.get("adaptive_projected_guidance_momentum") or 0.0,
            "conditional" if from_zero else "unconditional",
            rescale,
        ),
        "ClassifierFreeZeroStarGuidance": lambda: ZeroStar(scale, spec.get("zero_init_steps", 1), rescale),
        "AutoGuidance": lambda: Autoguidance(scale, rescale),
    }[spec["guider"]]()
    start, stop = spec.get("start", 0.0), spec.get("stop", 1.0)
    if (start, stop) == (0.0, 1.0):
        return inner
    return Interval(inner, math.floor(start * count), math.floor(stop * count), by="step")


@pytest.mark.parametrize(("fx", "case"), CASES)
def test_guided_predictions(fx: Fixture, case: str) -> None:
    spec = fx.config["cases"][case]
    guidance = guidance_of(spec, fx.config["num_inference_steps"])
    c, u = nhwc(fx.io["pred_cond"]), nhwc(fx.io["pred_uncond"])
    sizes: list[int] = []

    def denoise(x, t, cond, step, carry):
        sizes.append(len(x))
        value = jnp.where(cond["given"][:, None, None, None] > 0, *(jnp.resize(v[int(step)], x.shape) for v in (c, u)))
        return Prediction(value, x, t, {}, Linear(), KINDS.get(spec["guider"], "velocity")), carry

    def weak(x, t, cond, step, carry):
        return denoise(x, t, null(cond), step, carry)

    def null(cond):
        return {"given": jnp.zeros_like(cond["given"])}

    guided, x = guidance(denoise, null, weak), jnp.ones(c.shape[1:])
    carry, outs, guided_calls = guidance.init(x), [], []
    for step in range(fx.config["calls"]):
        sizes.clear()
        with jax.disable_jit():  # only the branch taken makes its call
            prediction, carry = guided(x, jnp.float32(0.5), {"given": jnp.ones(len(x))}, jnp.int32(step), carry)
        guided_calls += [step] * (sum(sizes) > len(x))
        outs.append(nchw(prediction.value))
    fx.close(np.stack(outs), f"{case}.out")
    assert guided_calls == spec["guided_calls"]
