"""Flow maps of normal data, whose flow is known: jumps, their derivative, the diagonal, and what is refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gen.config import from_json, to_json
from gen.diffusion.backbones.backbone import BackboneConfig
from gen.diffusion.denoiser import EDMPrecondition, Predict
from gen.diffusion.flowmap import AverageVelocity, Consistency, FlowMap, Jump
from gen.diffusion.process import EDM, Linear, Trigonometric, expand
from gen.errors import GenError
from gen.sampling.grids import Karras
from gen.sampling.integrate import Problem, integrate
from gen.sampling.solvers import Heun
from tests.distill.tiny import Tiny

STD = 0.6
X = jnp.linspace(-1.5, 1.5, 12).reshape(4, 3)
T = jnp.array([0.9, 0.7, 0.5, 0.4])
S = jnp.array([0.3, 0.6, 0.1, 0.4])  # the last jump has length 0


def spread(process: Any, t: Any) -> Any:
    """Standard deviation of x_t; the flow keeps x_t / spread."""
    return jnp.sqrt((STD * process.alpha(t)) ** 2 + process.sigma(t) ** 2)


@dataclasses.dataclass(frozen=True)
class Normal(BackboneConfig):
    """The exact flow map of normal data: its average velocity, or its data prediction."""

    process: Any
    kind: str
    times: int = 2
    size: tuple[int, ...] = ()
    channels: int = 1
    num_classes: int = 0

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return _Normal(self)


class _Normal(nnx.Module):
    def __init__(self, config: Normal) -> None:
        self.config = config
        self.gain = nnx.Param(jnp.ones(()))

    def __call__(self, x, times, cond, *, controls=None, taps=(), stop=False):
        process, (t, s) = self.config.process, times
        rate = (STD**2 * process.alpha(t) * process.dalpha(t) + process.sigma(t) * process.dsigma(t)) / spread(
            process, t
        ) ** 2
        if self.config.kind == "u":
            same = s == 0.0  # the second time is the duration
            out = jnp.where(same, rate, (1.0 - spread(process, t - s) / spread(process, t)) / jnp.where(same, 1.0, s))
        else:
            (a, sigma), (a_end, sigma_end) = ((process.alpha(u), process.sigma(u)) for u in (t, s))
            below = a_end - a * sigma_end / sigma
            same = jnp.abs(below) < 1e-6
            jump = (spread(process, s) / spread(process, t) - sigma_end / sigma) / jnp.where(same, 1.0, below)
            out = jnp.where(same, a * STD**2 / spread(process, t) ** 2, jump)
        return self.gain * expand(out, x) * x, dict.fromkeys(taps, x)


EXACT = [
    FlowMap(Normal(Linear(), "u"), Linear(), AverageVelocity()),
    FlowMap(Normal(Trigonometric(), "u"), Trigonometric(), AverageVelocity()),
    FlowMap(Normal(Linear(), "x"), Linear(), Jump(Predict("x"))),
    FlowMap(Normal(EDM(), "x"), EDM(), Jump(Predict("x"))),
]
IDS = [f"{type(f.process).__name__}-{type(f.parameterization).__name__}" for f in EXACT]


def params(flow_map: FlowMap) -> Any:
    return flow_map.net.init(jax.random.key(0))


@pytest.mark.parametrize("flow_map", EXACT, ids=IDS)
def test_jumps_follow_the_flow_and_compose(flow_map: FlowMap) -> None:
    process, p = flow_map.process, params(flow_map)
    exact = X * expand(spread(process, S) / spread(process, T), X)
    np.testing.assert_allclose(flow_map(p, X, T, S, {}), exact, rtol=1e-5, atol=1e-6)
    middle = 0.5 * (T + S)
    np.testing.assert_allclose(flow_map(p, flow_map(p, X, T, middle, {}), middle, S, {}), exact, rtol=1e-4, atol=1e-6)
    assert from_json(to_json(flow_map.parameterization)) == flow_map.parameterization


@pytest.mark.parametrize("flow_map", EXACT, ids=IDS)
def test_the_diagonal_is_a_denoiser(flow_map: FlowMap) -> None:
    process, p, denoiser = flow_map.process, params(flow_map), flow_map.diagonal()
    assert from_json(to_json(denoiser.parameterization)) == denoiser.parameterization
    a = expand(process.alpha(T), X)
    exact = a * STD**2 / expand(spread(process, T), X) ** 2 * X
    np.testing.assert_allclose(denoiser(p, X, T, {}).denoised, exact, rtol=1e-4, atol=1e-5)


def test_the_diagonal_is_sampled_by_any_solver() -> None:
    flow_map = EXACT[3]
    grid = Karras(sigma_max=5.0)(EDM(), 100)
    bound = flow_map.diagonal().bind(params(flow_map))
    end = jax.jit(lambda x: integrate(Heun(), Problem(bound, x, grid, lambda i: x, {})))(X)
    np.testing.assert_allclose(end, X * STD / spread(EDM(), 5.0), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("flow_map", EXACT[:2], ids=IDS[:2])
def test_the_derivative_satisfies_the_identity_of_mean_flow(flow_map: FlowMap) -> None:
    """u = v - (t - s) du/dt along (v, 1, 0) (arXiv 2505.13447, eq. 6)."""
    p, h = params(flow_map), expand(T - S, X)[:3]
    x, t, s = X[:3], T[:3], S[:3]
    v = flow_map.diagonal()(p, x, t, {}).velocity
    found = flow_map.jvp(p, (x, t, s), (v, jnp.float32(1.0), jnp.float32(0.0)), {}, taps=("input",))
    np.testing.assert_allclose(found.value, v - h * found.tangent, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.extra["input"], x)
    assert np.abs(np.asarray(found.tangent)).max() > 0.1


def test_ctm_and_consistency_by_their_formulas() -> None:
    """arXiv 2310.02279, eq. 9 with EDM's inner scalings; arXiv 2303.01469, appendix C."""
    ctm, cm = (FlowMap(Tiny(times=n), EDM(), p) for n, p in ((2, Jump()), (1, Consistency())))
    p, cond, d, low = params(cm), {"label": jnp.arange(4) % 3}, 0.5, 0.002
    x, t, s = jnp.ones((4, 2, 3)), jnp.array([80.0, 2.0, 0.3, low]), jnp.array([2.0, 0.3, 0.0, low])
    te, se = expand(t, x), expand(s, x)
    scaled = x / jnp.sqrt(te**2 + d**2)
    raw = ctm.net(p, scaled, (jnp.log(t) / 4, jnp.log(jnp.maximum(s, low)) / 4), cond)[0]
    g = d**2 / (te**2 + d**2) * x + te * d / jnp.sqrt(te**2 + d**2) * raw
    np.testing.assert_allclose(ctm(p, x, t, s, cond), se / te * x + (1 - se / te) * g, rtol=1e-5, atol=1e-5)
    raw = cm.net(p, scaled, (jnp.log(t) / 4,), cond)[0]
    f = d**2 / ((te - low) ** 2 + d**2) * x + (te - low) * d / jnp.sqrt(te**2 + d**2) * raw
    found = cm(p, x, t, jnp.float32(low), cond)
    np.testing.assert_allclose(found, f, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[3], x[3])


@pytest.mark.parametrize(("second", "expected"), [("duration", [3.0, 1.8]), ("end", [3.0, 1.2])])
def test_network_times(second: Any, expected: list[float]) -> None:
    _, times = AverageVelocity(second, 3.0).inputs(Linear(), X, jnp.float32(1.0), jnp.float32(0.4))
    np.testing.assert_allclose(times, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowMap(Tiny(), Linear()), "AverageVelocity with a network of 1 times; set the network's times to 2"),
        (lambda: FlowMap(Tiny(), EDM(), Consistency()).diagonal(), "Consistency knows no jump of length 0"),
        (lambda: Consistency().inputs(Linear(), X, T, S), "needs the edm process, not Linear"),
        (lambda: Jump(EDMPrecondition()).inputs(Linear(), X, T, S), "needs the edm process, not Linear"),
    ],
)
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(GenError, match=message):
        make()
