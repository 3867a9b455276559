"""Published consistency and trajectory models: their names, their clocks, and samples by their own samplers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.backbones.edm_unet import DhariwalUNetConfig, SongUNetConfig
from gen.nn.network import Network, param_shapes
from gen.pretrained.systems import locate, system
from gen.sampling.noise import unit_noise

ADM = DhariwalUNetConfig(
    64, num_classes=3, width=32, mult=(1, 2, 3, 4), emb=4, blocks=1, attention=(8,), head_width=32, groups=32
)
SONG = SongUNetConfig(8, 3, 3, width=16, mult=(1, 2), blocks=1, attention=(4,))
NETWORKS = {
    "consistency-adm": ADM,
    "edm-adm": ADM,
    "ctm": dataclasses.replace(ADM, times=2),
    "ect": SONG,
    "ctm-cifar10": dataclasses.replace(SONG, times=2),
}


def drawn(network: object) -> dict:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: (0.1 * rng.standard_normal(s.shape)).astype(s.dtype), param_shapes(network))


@pytest.mark.parametrize("name", NETWORKS)
def test_official_names(name: str) -> None:
    """Save and load are inverse, shapes give the configuration back, and a second time tells CTM from the others."""
    network, importer = NETWORKS[name], system(name)
    params = drawn(network)
    weights = importer.save(network, params)
    options = {"head_width": 32} if network.__class__ is DhariwalUNetConfig else {}
    assert importer.infer(weights, **options) == network
    _, back, report = importer.load(weights, network)
    assert report.clean
    jax.tree.map(np.testing.assert_array_equal, back, params)
    if name.startswith("ctm"):
        assert locate(None, weights).importer.name == name
    if name == "ect":
        assert locate(None, weights | {"class:ECMPrecond": np.ones(())}).importer.name == name
    if isinstance(network, DhariwalUNetConfig):
        kernel = weights["middle_block.1.qkv.weight"]
        assert kernel.shape[2:] == (1, 1)
        assert ("middle_block.0.emb_layers_s.1.weight" in weights) == (name == "ctm")


def test_samplers_are_the_published_ones() -> None:
    found = {name: system(name).generator(network) for name, network in NETWORKS.items()}  # type: ignore[misc]
    assert {name: made.nfe for name, made in found.items()} == {
        "consistency-adm": 1,
        "edm-adm": 79,
        "ctm": 1,
        "ect": 2,
        "ctm-cifar10": 1,
    }
    x, level = jnp.ones((2, 1)), jnp.array([0.5, 80.0])
    for name, scale in (("consistency-adm", 250.0), ("ctm", 250.0), ("ect", 0.25), ("ctm-cifar10", 0.25)):
        flow_map = found[name].flow_map
        _, times = flow_map.parameterization.inputs(flow_map.process, x, level, jnp.full(2, 0.002))
        np.testing.assert_allclose(times[0], scale * np.log(level), rtol=1e-5)
        if len(times) == 2:
            np.testing.assert_allclose(times[1], np.full(2, scale * np.log(0.002)), rtol=1e-5)
    _, times = found["edm-adm"].denoiser.parameterization.inputs(found["edm-adm"].denoiser.process, x, level)
    np.testing.assert_allclose(times[0], 250.0 * np.log(level), rtol=1e-5)


@pytest.mark.parametrize("name", ["ect", "ctm-cifar10"])
def test_a_network_of_published_form_makes_images(name: str) -> None:
    network = NETWORKS[name]
    generator, params = system(name).generator(network), drawn(network)  # type: ignore[misc]
    keys = jax.random.split(jax.random.key(0), 2)
    images = jax.jit(generator)({"net": params}, keys, {})
    assert images.shape == (2, 8, 8, 3)
    flow_map, first = generator.flow_map, 80.0 * unit_noise(keys, (8, 8, 3))
    one = flow_map(params, first, 80.0, flow_map.process.t_min, {})
    assert np.isfinite(images).all()
    if name == "ctm-cifar10":
        np.testing.assert_allclose(images, one, rtol=1e-3, atol=1e-4)
    assert Network(network).init(jax.random.key(1)).keys() == params.keys()
