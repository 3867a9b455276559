"""Images from flow maps: on normal data, whose map is known, any number of jumps gives the data."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.flowmap import AverageVelocity, Consistency, FlowMap
from gen.diffusion.process import EDM, Linear
from gen.errors import GenError
from gen.sampling.flowmaps import FlowMapSampler
from gen.sampling.noise import per_sample_noise, unit_noise
from gen.training.task import Model
from tests.diffusion.test_flowmap import EXACT, STD, params
from tests.distill.tiny import Tiny
from tests.sampling.mixture import keys


def sampled(flow_map, shape, times=None, gamma=0.0):
    """The generator of samples of a shape."""
    network = dataclasses.replace(flow_map.network, size=shape[:-1], channels=shape[-1])
    sampler = FlowMapSampler(times, gamma=gamma)
    return sampler.generator({"net": Model(dataclasses.replace(flow_map, network=network))}, None)


@pytest.mark.parametrize("flow_map", EXACT)
def test_jumps_without_noise_all_end_in_the_same_samples(flow_map):
    top = flow_map.process.t_max
    one = sampled(flow_map, (3,), (top, 0.0))
    four = sampled(flow_map, (3,), (top, 0.5 * top, 0.3 * top, 0.1 * top, 0.0))
    assert (one.nfe, four.nfe) == (1, 4)
    found = [jax.jit(g)({"net": params(flow_map)}, keys(5), {}) for g in (one, four)]
    np.testing.assert_allclose(*found, rtol=1e-3, atol=1e-5)  # the network sees EDM's t_min for clean data
    np.testing.assert_allclose(found[0], STD * unit_noise(keys(5), (3,)), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("gamma", [0.4, 1.0])
@pytest.mark.parametrize("flow_map", EXACT)
def test_fresh_noise_between_jumps_keeps_the_distribution(flow_map, gamma):
    top = flow_map.process.t_max
    generator = sampled(flow_map, (1,), (top, 0.6 * top, 0.2 * top, 0.0), gamma)
    samples = jax.jit(generator)({"net": params(flow_map)}, keys(8192), {})
    assert float(samples.std()) == pytest.approx(STD, rel=0.03)
    straight = sampled(flow_map, (1,), generator.sampler.times)({"net": params(flow_map)}, keys(8192), {})
    assert np.abs(np.asarray(samples - straight)).max() > 0.1


def test_consistency_models_noise_their_samples_afresh():
    """arXiv 2303.01469, alg. 1."""
    flow_map = FlowMap(Tiny(), EDM(), Consistency())
    generator = sampled(flow_map, (2, 3), (80.0, 5.0, 0.002), gamma=1.0)
    net, cond, noise = params(flow_map), {"label": jnp.arange(4) % 3}, per_sample_noise(keys(4), (2, 3))
    first = flow_map(net, 80.0 * unit_noise(keys(4), (2, 3)), 80.0, 0.002, cond)
    second = flow_map(net, first + np.sqrt(5.0**2 - 0.002**2) * noise(0), 5.0, 0.002, cond)
    np.testing.assert_allclose(generator({"net": net}, keys(4), cond), second, rtol=1e-4, atol=1e-5)
    tiny = sampled(FlowMap(Tiny(times=2), Linear(), AverageVelocity("end", 2.0)), (2, 3))
    assert tiny.ends.tolist() == [1.0, 0.0]


def test_images_are_clipped_before_they_are_noised_again():
    flow_map = FlowMap(Tiny(), EDM(), Consistency())
    net = params(flow_map) | {"outer": {"kernel": jnp.zeros((16, 3)), "bias": jnp.full(3, 9.0)}}
    cond = {"label": jnp.arange(4) % 3}
    sampler = FlowMapSampler((80.0, 5.0, 0.002), gamma=1.0, clip=True)
    network = dataclasses.replace(flow_map.network, size=(2,))
    made = sampler.generator({"net": Model(dataclasses.replace(flow_map, network=network))}, None)
    np.testing.assert_array_equal(made({"net": net}, keys(4), cond), 1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: FlowMapSampler((80.0, 1.0, 0.002), clip=True).generator({"net": Model(f)}, None), "that can be cl"),
        (lambda f: sampled(f, (3,), (1.0, 2.0, 0.002)), "at least two, falling from noise to data"),
        (lambda f: sampled(f, (3,), (90.0, 0.002)), "expected times within 0 and 80 of EDM"),
        (lambda f: sampled(f, (3,), gamma=1.5), "gamma 1.5; expected a number between 0"),
        (lambda f: sampled(f, (3,), (80.0, 1.0, 0.002)), "2 jumps of a consistency model"),
        (lambda f: sampled(f, (3,), (80.0, 1.0)), "ends at its process's 0.002, not at 1"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(GenError, match=message):
        make(FlowMap(Tiny(), EDM(), Consistency()))


def test_another_number_of_steps_is_jumps_of_equal_length():
    flow_map = FlowMap(Tiny(times=2), Linear(), AverageVelocity("end", 2.0))
    four = dataclasses.replace(sampled(flow_map, (2, 3)), sampler=FlowMapSampler((1.0, 0.2, 0.0)).changed(steps=4))
    assert four.ends.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert four.nfe == 4
    assert FlowMapSampler((1.0, 0.0)).changed() == FlowMapSampler((1.0, 0.0))
    with pytest.raises(GenError, match="jumps along its own times; change steps"):
        FlowMapSampler().changed(guidance=2.0)
    with pytest.raises(GenError, match="0 jumps along no times; give times, or a positive number"):
        FlowMapSampler(steps=0)
