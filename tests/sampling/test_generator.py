"""Samplers and generators: a denoiser under any process, one step, latents and their normaliser."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.config import from_json, to_json
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.ddpm import DDPM
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.process import EDM, VP, Linear, Trigonometric
from gen.sampling.adaptive import AdaptiveSampler, Dopri5
from gen.sampling.edm_samplers import ablation_sampler, edm_sampler
from gen.sampling.generator import DiffusionGenerator, FewSteps, OneStepGenerator, Sampler
from gen.sampling.grids import Explicit, Karras, Respaced, Uniform
from gen.sampling.noise import per_sample_noise, unit_noise
from gen.sampling.solvers import DDIM, EDMStochastic, Heun, Renoise
from gen.tokenizers.base import TokenizerSpec
from gen.training.task import Model
from tests.sampling.mixture import MixtureNet, distance, keys

VIEWS = [
    Sampler(Heun(), Uniform(), 40),
    Sampler(Heun(), Uniform(), 40, process=Linear()),
    Sampler(Heun(), Uniform(), 40, process=Trigonometric()),
    Sampler(Heun(), Karras(), 30, process=EDM()),
    Sampler(EDMStochastic(10.0), Karras(), 60, process=EDM()),
    Sampler(DDIM(), Respaced(), 100, process=DDPM()),
    edm_sampler(30),
    ablation_sampler(40, discretization="vp", schedule="vp", scaling="vp"),
    ablation_sampler(40, discretization="iddpm", schedule="linear", scaling="none"),
    ablation_sampler(400, discretization="ve", schedule="ve", solver="euler"),
]


def exact(process, shape=(1,)):
    denoiser = Denoiser(MixtureNet(process, shape[:-1], shape[-1]), process, Predict("x"))
    return denoiser, denoiser.net.init(jax.random.key(0))


@pytest.mark.parametrize("sampler", VIEWS, ids=lambda s: f"{type(s.process).__name__}-{type(s.solver).__name__}")
@pytest.mark.parametrize("trained", [VP(), EDM()], ids=repr)
def test_one_denoiser_under_any_process_gives_the_data(sampler, trained):
    if trained == EDM() and sampler.process is None:
        sampler = dataclasses.replace(sampler, grid=Karras())
    denoiser, params = exact(trained)
    samples = jax.jit(lambda: sampler(denoiser, params, keys(8192), (1,), {"shift": jnp.zeros(8192)}))()
    assert distance(samples) < 0.025


def test_nfe():
    denoiser, _ = exact(VP())
    assert DiffusionGenerator(denoiser, Sampler(Heun(), steps=7)).nfe == 13
    assert DiffusionGenerator(denoiser, Sampler(DDIM(), steps=7)).nfe == 7
    assert DiffusionGenerator(denoiser, Sampler(DDIM(), Karras(), 7, process=EDM())).nfe == 7
    assert OneStepGenerator(denoiser).nfe == 1


@dataclasses.dataclass(frozen=True)
class Doubling:
    """A stand-in tokenizer."""

    spec = TokenizerSpec("continuous", (4, 2), (4, 2, 1))

    def decode(self, params, latents, *, cond, keys, options):
        return params["factor"] * latents


def test_latents_are_normalised_back_and_decoded():
    denoiser, net = exact(Linear(), (4, 2))
    params = {
        "net": net,
        "tokenizer": {"factor": jnp.float32(2.0)},
        "normalizer": {"shift": jnp.array([1.0, -1.0]), "scale": jnp.array([0.5, 3.0])},
    }
    cond = {"shift": jnp.zeros(5)}
    for generator in (
        DiffusionGenerator(denoiser, Sampler(steps=3), Doubling()),
        OneStepGenerator(denoiser, tokenizer=Doubling()),
    ):
        latents = generator.latents(params, keys(5), cond)
        assert latents.shape == (5, 4, 2)
        expected = 2.0 * (latents * np.array([0.5, 3.0]) + np.array([1.0, -1.0]))
        np.testing.assert_allclose(generator(params, keys(5), cond), expected, rtol=1e-6)


def test_student_and_teacher_start_from_the_same_noise():
    """At one step from pure noise, Euler on the linear process is the data prediction there."""
    denoiser, net = exact(Linear(), (3,))
    cond = {"shift": jnp.zeros(6)}
    from gen.sampling.solvers import Euler

    teacher = DiffusionGenerator(denoiser, Sampler(Euler(), steps=1)).latents({"net": net}, keys(6), cond)
    student = OneStepGenerator(denoiser).latents({"net": net}, keys(6), cond)
    np.testing.assert_allclose(teacher, student, rtol=1e-5, atol=1e-6)


def test_students_start_at_the_noise_they_were_trained_on():
    """EDM's at 80 times unit noise; those that take unit noise for an earlier time, at that."""
    noise = unit_noise(keys(6), (3,))
    cond = {"shift": jnp.zeros(6)}
    for process, t, scale in ((EDM(), None, 80.0), (EDM(), 2.5, 2.5), (VP(), 0.4, None)):
        denoiser, net = exact(process, (3,))
        student = OneStepGenerator(denoiser, t, noise_scale=None if scale else 1.0)
        expected = denoiser(net, (scale or 1.0) * noise, process.t_max if t is None else t, cond).denoised
        np.testing.assert_allclose(student.latents({"net": net}, keys(6), cond), expected, rtol=1e-5, atol=1e-6)
        assert from_json(to_json(student)).noise_scale == student.noise_scale


def test_students_of_several_steps_renoise_between_their_times():
    denoiser, net = exact(EDM(), (3,))
    cond, times = {"shift": jnp.zeros(6)}, (80.0, 24.0, 5.0, 0.7)
    student = FewSteps().generator({"net": Model(denoiser, times)}, None)
    assert student == DiffusionGenerator(denoiser, Sampler(Renoise(), Explicit((*times, 0.0)), 4))
    assert student.nfe == 4
    x, fresh = 80.0 * unit_noise(keys(6), (3,)), per_sample_noise(keys(6), (3,))
    for i, (t, after) in enumerate(zip(times, (*times[1:], 0.0), strict=True)):
        x = denoiser(net, x, t, cond).denoised + after * fresh(i)
    np.testing.assert_allclose(student.latents({"net": net}, keys(6), cond), x, rtol=1e-4, atol=1e-5)


def test_samples_do_not_depend_on_their_batch():
    config = DiTConfig(size=(4,), channels=2, patch=1, width=16, depth=1, heads=2, num_classes=3)
    denoiser = Denoiser(config, Linear())
    net = denoiser.net.init(jax.random.key(1))
    generator = DiffusionGenerator(denoiser, Sampler(steps=3))
    cond = {"label": jnp.arange(6) % 3}
    whole = generator({"net": net}, keys(6), cond)
    part = generator({"net": net}, keys(6)[2:4], {"label": cond["label"][2:4]})
    np.testing.assert_allclose(part, whole[2:4], rtol=1e-5, atol=1e-5)


def test_configuration_round_trip():
    config = DiTConfig(size=(4,), channels=2, patch=1, width=16, depth=1, heads=2, num_classes=3)
    generator = DiffusionGenerator(Denoiser(config, VP()), ablation_sampler(8, discretization="iddpm"))
    adaptive = AdaptiveSampler.of(generator.sampler, generator.denoiser, Dopri5(1e-3))
    for made in (generator, adaptive.generator({"net": Model(generator.denoiser)}, None)):
        assert from_json(to_json(made)) == made
