"""Guidance: formulas, composition, and one batched network call per step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.config import from_json, to_json
from gen.diffusion.ddpm import DDPM
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.prediction import Prediction
from gen.diffusion.process import EDM, VP, Linear
from gen.errors import GenError
from gen.sampling.generator import Sampler
from gen.sampling.grids import Karras, Uniform
from gen.sampling.guidance import (
    AdaptiveProjected,
    Autoguidance,
    Chained,
    ClassifierFree,
    ClassifierGradient,
    Clip,
    Interval,
    ZeroStar,
)
from gen.sampling.integrate import Problem, integrate, nfe, states
from gen.sampling.solvers import DDIM, Ancestral, Euler, Heun
from tests.sampling.mixture import keys

COND = {"label": jnp.array([1.0, 2.0])}


def null(cond):
    return {"label": jnp.zeros_like(cond["label"])}


def linear_denoise(process, calls=None, extra=False):
    """A toy whose eps depends on input, time, condition and channel; counts calls by batch size and time."""

    def denoise(x, t, cond, step, carry):
        if calls is not None:
            calls.append((x.shape[0], float(t)))
        label = cond["label"].reshape((-1,) + (1,) * (x.ndim - 1))
        value = 0.5 * x + label * (1.0 + jnp.arange(x.shape[-1])) + t
        taps = {"variance": -value} if extra else {}
        return Prediction(value, x, t, taps, process, "eps"), carry

    return denoise


def evaluate(guidance, denoise, x, t=0.5, step=0):
    return guidance(denoise, null)(x, jnp.float32(t), COND, jnp.int32(step), guidance.init(x))[0]


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(0), (2, 3, 4))


def test_classifier_free(x):
    denoise = linear_denoise(Linear(), extra=True)
    c = denoise(x, 0.5, COND, 0, {})[0].value
    u = denoise(x, 0.5, null(COND), 0, {})[0].value
    got = evaluate(ClassifierFree(2.5), denoise, x)
    np.testing.assert_allclose(got.value, u + 2.5 * (c - u), rtol=1e-6)
    np.testing.assert_allclose(got.extra["variance"], -c, rtol=1e-6)
    assert got.x.shape == x.shape
    three = evaluate(ClassifierFree(2.5, channels=3), denoise, x).value
    np.testing.assert_allclose(three[..., :3], (u + 2.5 * (c - u))[..., :3], rtol=1e-6)
    np.testing.assert_allclose(three[..., 3:], c[..., 3:], rtol=1e-6)


def test_scale_one_makes_no_unconditional_call(x):
    calls = []
    evaluate(ClassifierFree(1.0), linear_denoise(Linear(), calls), x)
    assert calls == [(2, 0.5)]


@pytest.mark.parametrize("guidance", [AdaptiveProjected(1.0, base="unconditional"), ZeroStar(1.0, zero_steps=1)])
def test_scale_one_leaves_the_other_rules_out(guidance, x):
    calls = []
    denoise = linear_denoise(Linear(), calls)
    out = evaluate(guidance, denoise, x, step=1)
    assert calls == [(2, 0.5)]
    np.testing.assert_allclose(out.velocity, denoise(x, jnp.float32(0.5), COND, 1, {})[0].velocity, rtol=1e-6)


def test_guidance_needs_a_condition(x):
    guided = ClassifierFree(2.0)(linear_denoise(Linear()), null)
    with pytest.raises(GenError, match="without conditioning"):
        guided(x, jnp.float32(0.5), {}, 0, {})


@pytest.mark.parametrize("solver", [Euler(), Heun(), DDIM()], ids=repr)
def test_interval_guides_inside_only_with_one_call_a_step(solver, x):
    calls = []
    guidance = Interval(ClassifierFree(3.0), low=0.3, high=5.0)
    grid = Karras(sigma_max=20.0)(EDM(), 6)
    with jax.disable_jit():
        guided = guidance(linear_denoise(EDM(), calls), null)
        integrate(solver, Problem(guided, 20 * x, grid, None, COND, guidance.init(x)))
    assert len(calls) == nfe(solver, grid)
    for size, t in calls:
        assert size == (4 if 0.3 <= t < 5.0 else 2), f"batch {size} at level {t}"
    assert {size for size, _ in calls} == {2, 4}


@pytest.mark.parametrize("guidance", [ClassifierFree(2.5, rescale=0.5), AdaptiveProjected(), ZeroStar()], ids=repr)
def test_every_rule_makes_one_call_on_the_doubled_batch(guidance, x):
    calls = []
    evaluate(guidance, linear_denoise(Linear(), calls), x, step=1)
    assert [size for size, _ in calls] == [2 * len(x)]


def test_each_sample_may_have_its_own_scale(x):
    denoise, cond = linear_denoise(Linear()), {**COND, "w": jnp.array([1.0, 3.0])}
    got = ClassifierFree(scales="w")(denoise, null)(x, jnp.float32(0.5), cond, 0, {})[0].value
    np.testing.assert_allclose(got[0], evaluate(ClassifierFree(), denoise, x).value[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], evaluate(ClassifierFree(3.0), denoise, x).value[1], rtol=1e-6)
    with pytest.raises(GenError, match="no entry 'v'"):
        ClassifierFree(scales="v")(denoise, null)(x, jnp.float32(0.5), cond, 0, {})


def test_rescaling_keeps_the_spread_of_the_conditional_prediction(x):
    denoise = linear_denoise(Linear())
    plain = evaluate(ClassifierFree(), denoise, x).value
    guided = evaluate(ClassifierFree(4.0, rescale=1.0), denoise, x).value
    np.testing.assert_allclose(guided.std(axis=(1, 2)), plain.std(axis=(1, 2)), rtol=1e-5)
    free = evaluate(ClassifierFree(4.0), denoise, x).value
    np.testing.assert_allclose(
        guided / guided.std(axis=(1, 2), keepdims=True), free / free.std(axis=(1, 2))[:, None, None], rtol=1e-5
    )


def test_apg_without_projection_bound_and_momentum_is_classifier_free(x):
    denoise = linear_denoise(VP())
    free = evaluate(ClassifierFree(3.0), denoise, x).denoised
    np.testing.assert_allclose(
        evaluate(AdaptiveProjected(3.0, eta=1.0), denoise, x).denoised, free, rtol=1e-3, atol=1e-4
    )


def test_apg_guides_across_the_conditional_data_prediction(x):
    denoise = linear_denoise(VP())
    c = evaluate(ClassifierFree(), denoise, x).denoised
    change = evaluate(AdaptiveProjected(3.0), denoise, x).denoised - c
    sizes = np.sqrt(np.sum(change**2, axis=(1, 2)) * np.sum(c**2, axis=(1, 2)))
    assert np.all(sizes > 0.1)
    assert np.all(np.abs(np.sum(change * c, axis=(1, 2))) < 1e-4 * sizes)


def test_apg_momentum_is_carried_through_a_solver_and_rests_outside_the_interval(x):
    guidance = Interval(AdaptiveProjected(2.0, momentum=-0.5), low=1, high=3, by="step")
    guided, carry, seen = guidance(linear_denoise(Linear()), null), guidance.init(x), []
    for step in range(4):
        _, carry = guided(x, jnp.float32(0.5), COND, jnp.int32(step), carry)
        seen.append(float(jnp.abs(carry["apg"]).max()))
    assert seen[0] == 0.0
    assert seen[2] == pytest.approx(0.5 * seen[1], rel=1e-5)
    assert seen[3] == seen[2]
    grid = Uniform(start=0.9)(Linear(), 4)
    out = integrate(Heun(), Problem(guided, x, grid, None, COND, guidance.init(x)))
    assert np.isfinite(out).all()


def test_zero_star_starts_with_no_velocity(x):
    denoise = linear_denoise(Linear())
    assert not np.any(evaluate(ZeroStar(3.0, zero_steps=2), denoise, x, step=1).velocity)
    assert np.any(evaluate(ZeroStar(3.0, zero_steps=2), denoise, x, step=2).velocity)


def test_autoguidance_extrapolates_from_the_weaker_model():
    from tests.sampling.mixture import MixtureNet

    denoiser = Denoiser(MixtureNet(Linear()), Linear(), Predict("x"))
    params, weak = {"gain": jnp.ones(())}, {"gain": jnp.float32(0.5)}
    cond = {"shift": jnp.full(3, 0.25)}
    plain, guided = (Sampler(Euler(), steps=1, guidance=g) for g in (ClassifierFree(), Autoguidance(2.0)))
    c = plain(denoiser, params, keys(3), (2,), cond)
    u = plain(denoiser, weak, keys(3), (2,), cond)
    np.testing.assert_allclose(
        guided(denoiser, params, keys(3), (2,), cond, guide=weak), 2.0 * c - u, rtol=1e-4, atol=1e-5
    )
    # a weaker model of its own structure, trained under another process
    other = Denoiser(MixtureNet(VP()), VP(), Predict("x"))
    sampler = dataclasses.replace(guided, guide=other, process=EDM(), grid=Karras())
    same = dataclasses.replace(sampler, guidance=ClassifierFree())
    got = sampler(denoiser, params, keys(3), (2,), cond, guide={"gain": jnp.ones(())})
    np.testing.assert_allclose(got, same(denoiser, params, keys(3), (2,), cond), rtol=1e-3, atol=1e-3)
    with pytest.raises(GenError, match="parameters of one as 'guide'"):
        guided(denoiser, params, keys(3), (2,), cond)


def test_interval_by_step_and_value(x):
    denoise = linear_denoise(Linear())
    inner = ClassifierFree(3.0)
    by_step = Interval(inner, low=1, high=3, by="step")
    plain, guided = evaluate(ClassifierFree(1.0), denoise, x).value, evaluate(inner, denoise, x).value
    for step, expected in enumerate([plain, guided, guided, plain]):
        np.testing.assert_allclose(evaluate(by_step, denoise, x, step=step).value, expected, rtol=1e-6)
    inside = Interval(inner, low=0.25, high=0.3)
    np.testing.assert_allclose(
        evaluate(inside, denoise, x, t=0.25).value, evaluate(inner, denoise, x, t=0.25).value, rtol=1e-6
    )
    np.testing.assert_allclose(
        evaluate(inside, denoise, x, t=0.5).value, evaluate(ClassifierFree(), denoise, x).value, rtol=1e-6
    )


def test_interval_for_samples_with_times_of_their_own(x):
    guidance, times = Interval(ClassifierFree(3.0), low=0.2, high=0.6), jnp.array([0.5, 0.7])
    denoise = per_sample_denoise
    got = guidance(denoise, null)(x, times, COND, 0, {})[0].value
    np.testing.assert_allclose(got[0], ClassifierFree(3.0)(denoise, null)(x, times, COND, 0, {})[0].value[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], denoise(x, times, COND, 0, {})[0].value[1], rtol=1e-6)


def per_sample_denoise(x, t, cond, step, carry):
    value = 0.5 * x + (cond["label"] * t)[:, None, None]
    return Prediction(value, x, t, {}, Linear(), "eps"), carry


def test_interval_takes_guidance_of_another_kind(x):
    guidance = Interval(Chained((ClassifierFree(3.0), Clip())), low=0.0, high=10.0)
    got = evaluate(guidance, linear_denoise(VP()), x)
    assert got.kind == "eps"
    assert float(jnp.abs(got.denoised).max()) < 1.0 + 1e-4


def test_clip(x):
    t = jnp.float32(0.05)
    got = evaluate(Chained((ClassifierFree(3.0), Clip(-0.5, 0.7))), linear_denoise(VP()), 3 * x, t=t)
    assert float(got.denoised.min()) == -0.5
    assert float(got.denoised.max()) == pytest.approx(0.7)
    a, s = VP().alpha(t), VP().sigma(t)
    np.testing.assert_allclose(a * got.denoised + s * got.eps, 3 * x, rtol=1e-5, atol=1e-5)


def test_classifier_gradient_on_the_score(x):
    process = VP()
    got = evaluate(ClassifierGradient(lambda x, t, cond: -0.2 * x + t), linear_denoise(process), x)
    plain = evaluate(ClassifierFree(), linear_denoise(process), x)
    np.testing.assert_allclose(got.score, plain.score - 0.2 * x + 0.5, rtol=1e-4, atol=1e-5)


def test_classifier_gradient_on_the_mean(x):
    process, grid = DDPM(), Uniform()(DDPM(), 5)
    guidance = ClassifierGradient(lambda x, t, cond: jnp.ones_like(x), on="mean")

    def run(denoise):
        return states(Ancestral("large"), Problem(denoise, x, grid, lambda i: jnp.zeros_like(x), COND)).x[0]

    shift = run(guidance(linear_denoise(process), null)) - run(linear_denoise(process))
    a, s = grid.alpha, grid.sigma
    np.testing.assert_allclose(shift, s[0] ** 2 - (a[0] / a[1] * s[1]) ** 2, rtol=1e-3)


def test_chained_carries_the_state_of_its_parts(x):
    @dataclasses.dataclass(frozen=True)
    class Counter:
        name: str

        def init(self, x):
            return {self.name: jnp.int32(0)}

        def __call__(self, denoise, null, weak=None):
            def counted(x, t, cond, step, carry):
                prediction, carry = denoise(x, t, cond, step, carry)
                return prediction, {**carry, self.name: carry[self.name] + 1}

            return counted

    guidance = Chained((Counter("a"), ClassifierFree(2.0), Counter("b")))
    guided = guidance(linear_denoise(Linear()), null)
    carry = guidance.init(x)
    for _ in range(3):
        _, carry = guided(x, jnp.float32(0.5), COND, 0, carry)
    assert carry == {"a": 3, "b": 3}


@pytest.mark.parametrize(
    "guidance",
    [
        Chained((Interval(ClassifierFree(3.0, rescale=0.5), low=0.3, high=0.9), Clip())),
        Interval(Chained((AdaptiveProjected(2.0, momentum=-0.5, norm=5.0), Clip())), low=0.3),
        Chained((ZeroStar(3.0), Clip())),
        Interval(ClassifierFree(scales="w"), low=0.3, high=0.9),
        Interval(Autoguidance(2.0, rescale=0.3), low=0.3, high=0.9),
    ],
    ids=lambda g: f"{type(g).__name__}-{type(getattr(g, 'guidance', None) or g.parts[0]).__name__}",
)
def test_compositions_call_each_network_once_a_step(guidance, x):
    main, weak, cond = [], [], {**COND, "w": jnp.array([1.5, 4.0])}
    guided = guidance(linear_denoise(Linear(), main), null_beside, linear_denoise(Linear(), weak))
    problem = Problem(guided, x, Uniform(start=0.99)(Linear(), 5), None, cond, guidance.init(x))
    with jax.disable_jit():
        out = integrate(Heun(), problem)
    assert np.isfinite(out).all()
    assert len(main) == 9
    assert len(weak) <= 9
    double = [t for size, t in main if size == 2 * len(x)]
    alone = isinstance(getattr(guidance, "guidance", None), Autoguidance)
    assert bool(double) != alone
    assert all(t >= 0.3 for t in double) or isinstance(guidance, Chained)
    assert [t for _, t in weak] == ([t for _, t in main if 0.3 <= t < 0.9] if alone else [])


def null_beside(cond):
    return {**cond, "label": jnp.zeros_like(cond["label"])}


def test_samples_with_scales_of_their_own_inside_an_interval(x):
    """As each alone at its scale."""
    denoise, w = linear_denoise(Linear()), jnp.array([1.5, 4.0])
    guidance = Interval(ClassifierFree(scales="w"), low=0.3, high=0.9)
    for t in (0.5, 0.1):
        got = guidance(denoise, null_beside)(x, jnp.float32(t), {**COND, "w": w}, 0, {})[0].value
        for i, scale in enumerate(w):
            alone = evaluate(Interval(ClassifierFree(float(scale)), low=0.3, high=0.9), denoise, x, t=t).value
            np.testing.assert_allclose(got[i], alone[i], rtol=1e-6)


def test_empty_interval_is_refused():
    with pytest.raises(GenError, match="is empty"):
        Interval(low=2.0, high=1.0)


def test_configuration_round_trip():
    parts = (
        Interval(ClassifierFree(2.0, channels=3), 0.1, 2.0),
        AdaptiveProjected(),
        ZeroStar(),
        Autoguidance(2.0),
        Clip(),
    )
    config = Sampler(guidance=Chained(parts))
    assert from_json(to_json(config), Sampler) == config


def test_guided_sampling_compiles_the_network_once_per_call_site():
    """The solver's scan holds one network call, so compile time does not grow with the number of stages."""
    traces = []
    inner = linear_denoise(Linear())

    def denoise(*args):
        traces.append(1)
        return inner(*args)

    guided = ClassifierFree(2.0)(denoise, null)
    x = jnp.ones((2, 3))
    grid = Uniform()(Linear(), 5)
    text = jax.jit(lambda x: integrate(Heun(), Problem(guided, x, grid, None, COND))).lower(x).as_text()
    assert text.count("stablehlo.while") == 1
    assert len(traces) <= 2  # a scan may trace its body twice to settle types


def test_denoiser_null_condition_is_used():
    from tests.sampling.mixture import MixtureNet

    process = Linear()
    denoiser = Denoiser(MixtureNet(process), process, Predict("x"))
    params = denoiser.net.init(jax.random.key(0))
    cond = {"shift": jnp.full(4, 0.5)}
    sampler = Sampler(Euler(), steps=1)
    plain = sampler(denoiser, params, keys(4), (2,), cond)
    guided = dataclasses.replace(sampler, guidance=ClassifierFree(3.0))(denoiser, params, keys(4), (2,), cond)
    # one Euler step from pure noise gives the data prediction: mean + w * shift
    np.testing.assert_allclose(guided - plain, 2.0 * 0.5, rtol=1e-5)
