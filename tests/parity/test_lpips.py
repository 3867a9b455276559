"""`gen.features.lpips` against the lpips package and taming-transformers' copy of it.

The random weights of `lpips*` are drawn again by the recipe in the fixture's README.
"""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.errors import GenError
from gen.features.lpips import SCALE, SHIFT, distances, lpips, lpips_map, trunk
from gen.features.weights import load_weights
from gen.pretrained.lpips import convert, fold
from tests.parity.conftest import fixtures

FIXTURES = fixtures("lpips*")
RECIPES = [fx for fx in FIXTURES if "nets" in fx.config]  # several networks, their weights by a recipe
STORED = [fx for fx in FIXTURES if "nets" not in fx.config]
NETS = [(fx, net) for fx in RECIPES for net in fx.config["nets"]]


@functools.cache
def _drawn(fx, net):
    weights = {}
    for name, entry in fx.config["nets"][net]["tensors"].items():
        seed = zlib.crc32((name if name.startswith("lin") else f"{net}/{name}").encode())
        draw, shape = np.random.RandomState((fx.config["base_seed"] + seed) % 2**32), tuple(entry["shape"])
        value = draw.standard_normal(shape)
        if name.startswith("lin"):
            value = np.abs(value)
        else:
            value = value * (np.sqrt(2 / np.prod(shape[1:])) if name.endswith("weight") else 0.1)
        weights[name] = value.astype(np.float32)
        assert np.abs(weights[name].astype(np.float64)).sum() == pytest.approx(entry["abssum"], rel=1e-6)
    return fold(weights)


@pytest.mark.parametrize(("fx", "net"), NETS, ids=str)
def test_packages_nets(fx, net):
    found, params = _drawn(fx, net)
    assert found == net
    a, b = (jnp.asarray(fx.io[name], jnp.float32) / 127.5 - 1 for name in ("img_a", "img_b"))
    maps, whole, features = jax.jit(
        lambda p, a, b: (distances(p, a, b, net), lpips_map(p, a, b, net), trunk(p, a, net))
    )(params, a, b)
    for i, (d, x) in enumerate(zip(maps, features, strict=True)):
        fx.close(d.mean((1, 2)), f"{net}_layer{i}")
        fx.close(x.mean((1, 2)), f"{net}_feat{i}_mean")
        np.testing.assert_array_equal(np.asarray(x.shape)[[0, 3, 1, 2]], fx.io[f"{net}_feat{i}_shape"])
    fx.close(sum(d.mean((1, 2)) for d in maps), f"{net}_lpips")
    fx.close(whole[:, None, ::5, ::5], f"{net}_spatial_sub")
    fx.close(lpips(params, a, b, net, heads=False), f"{net}_baseline_no_lin")


@pytest.mark.parametrize("fx", STORED, ids=str)
def test_tamings_copy(fx):
    assert (tuple(fx.config["shift"]), tuple(fx.config["scale"])) == (SHIFT, SCALE)
    net, params = fold(fx.weights)
    assert net == "vgg"
    a, b = (jnp.asarray(fx.io[name].transpose(0, 2, 3, 1)) for name in ("image_0", "image_1"))
    names = [name for name in fx.io if name.startswith("feat_0_")]
    for name, x in zip(names, trunk(params, a), strict=True):
        fx.close(x.transpose(0, 3, 1, 2), name)
    maps = distances(params, a, b)
    fx.close(jnp.stack([d.mean((1, 2)) for d in maps], 1), "per_layer")
    fx.close(lpips(params, a, b)[:, None, None, None], "lpips")
    gradient = jax.grad(lambda b: lpips(params, a, b).sum())(b)
    fx.close(gradient.transpose(0, 3, 1, 2), "grad_image_1")


@pytest.mark.parametrize("fx", STORED, ids=str)
def test_equal_flat_images_have_a_gradient(fx):
    _, params = fold(fx.weights)
    dead = jax.tree.map(lambda x: -jnp.abs(x), params)  # every feature is 0 behind the ReLUs
    image = jnp.ones((1, 32, 32, 3))
    assert jnp.all(jnp.isfinite(jax.grad(lambda b: lpips(dead, image, b).sum())(image)))


@pytest.mark.parametrize("fx", STORED, ids=str)
def test_convert(fx, tmp_path):
    out = tmp_path / "net.safetensors"
    assert convert(fx.path / "weights.safetensors", out).startswith("lpips-vgg: identity ")
    jax.tree.map(np.testing.assert_array_equal, load_weights(out, ""), fold(fx.weights)[1])
    with pytest.raises(GenError, match="lacks lin4"):
        fold({name: array for name, array in fx.weights.items() if name != "lin4.model.1.weight"})
