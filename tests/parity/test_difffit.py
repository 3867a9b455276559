"""DiffFit against the official DiT with scale factors: outputs, which parameters learn, gradients, positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.arrays import flatten, unflatten
from gen.finetune.adapters import Adapted
from gen.finetune.difffit import DiffFit
from gen.nn.layers import sincos_positions
from gen.nn.network import Network, count, param_shapes
from gen.pretrained import dit
from tests.parity.conftest import Fixture, fixtures
from tests.parity.toys import nchw, nhwc

GAMMAS = {"gamma1": "blocks/attn/proj/gamma", "gamma2": "blocks/mlp/fc2/gamma"}


def official(values: dict, extra: dict, config: dit.DiTConfig) -> dict[str, np.ndarray]:
    """The adapter's arrays under the fixture's names: the rules of DiT, and a vector of each block for the factors."""
    shapes = flatten(param_shapes(config))
    whole = {path: values.get(path, np.zeros(leaf.shape, np.float32)) for path, leaf in shapes.items()}
    saved = dit.IMPORTER.save(config, unflatten(whole))
    names = dit.IMPORTER.save(config, unflatten({p: np.full(s.shape, p in values) for p, s in shapes.items()}))
    found = {name: array for name, array in saved.items() if name in names and np.all(names[name] == 1)}
    found.pop("pos_embed", None)
    for name, path in GAMMAS.items():
        found |= {f"blocks.{i}.{name}": row for i, row in enumerate(np.asarray(extra[path]))}
    return found


@pytest.mark.parametrize("fx", fixtures("difffit*"), ids=str)
def test_difffit(fx: Fixture) -> None:
    given = fx.config["dit"]
    weights = {name: array for name, array in fx.weights.items() if "gamma" not in name}
    config = dit.config(weights, heads=given["num_heads"], null_class=given["class_dropout_prob"] > 0)
    _, params, report = dit.IMPORTER.load(weights, config)
    assert report.clean
    adapter = DiffFit(blocks=fx.config["scaled_blocks"])
    adapted = Adapted(config, adapter)
    own = adapted.start(jax.random.key(0), params)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(lambda leaf: leaf.shape, param_shapes(adapted))

    x, t, cond = nhwc(fx.io["x"]), jnp.asarray(fx.io["t"]), {"label": jnp.asarray(fx.io["y"])}
    call = jax.jit(lambda own: Network(config)(adapter.merge(params, own), x, (t,), cond)[0])
    fx.close(nchw(call(own)), "out_gamma_one")
    rows = range(fx.config["scaled_blocks"])
    extra = {path: np.stack([fx.weights[f"blocks.{i}.{name}"] for i in rows]) for name, path in GAMMAS.items()}
    own = {**own, "extra": unflatten(extra)}
    fx.close(nchw(call(own)), "out")

    target = nhwc(fx.io["target"])
    loss, grads = jax.jit(jax.value_and_grad(lambda own: jnp.mean(jnp.square(call(own) - target))))(own)
    fx.close(loss, "loss")
    found = official(*(flatten(jax.device_get(grads[key])) for key in ("value", "extra")), config)
    assert set(found) == set(fx.config["trainable"])
    assert count(own) == fx.config["num_trainable"]
    assert count(params) + count(own["extra"]) + weights["pos_embed"].size == fx.config["num_total"]
    for name, gradient in found.items():
        fx.close(gradient, f"grad.{name}")

    # plain weights: the merged network needs no factors
    merged = adapter.merge(params, own)
    fx.close(nchw(Network(config)(merged, x, (t,), cond)[0]), "out")


@pytest.mark.parametrize("fx", fixtures("difffit*"), ids=str)
def test_positions_of_a_larger_grid(fx: Fixture) -> None:
    side, width = fx.config["dit"]["input_size"] // fx.config["dit"]["patch_size"], fx.config["dit"]["hidden_size"]
    fx.close(sincos_positions((side, side), width)[None], "pos_embed_base")
    fx.close(sincos_positions((2 * side, 2 * side), width)[None], "pos_embed_2x_plain")
    fx.close(sincos_positions((2 * side, 2 * side), width, 0.5)[None], "pos_embed_2x_scaled")
