"""Official DiT files: configuration from shapes, refusals, and the way from a file to samples."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen import arrays
from gen.config import from_json, to_json
from gen.diffusion.backbones.dit import DiTConfig, dit
from gen.errors import GenError
from gen.nn.network import Network, count, param_shapes
from gen.pretrained.dit import IMPORTER, config, generator, rules
from gen.pretrained.readers import read_weights
from gen.pretrained.systems import locate
from gen.sampling.guidance import ClassifierFree

TINY = DiTConfig((4, 4), 3, 2, 16, 2, 2, num_classes=5, learned_variance=True)


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    params = Network(TINY).init(jax.random.key(0))
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    noisy = [np.asarray(v) + 0.1 * rng.normal(size=v.shape).astype(np.float32) for v in leaves]
    return IMPORTER.save(TINY, jax.tree.unflatten(treedef, noisy))


@pytest.mark.parametrize("changes", [{}, {"learned_variance": False}, {"null_class": False}, {"mlp_ratio": 3.0}])
def test_configuration_is_inferred(changes) -> None:
    expected = dataclasses.replace(TINY, **changes)
    official = IMPORTER.save(expected, Network(expected).init(jax.random.key(0)))
    assert IMPORTER.infer(official, heads=2, null_class=expected.null_class) == expected


@pytest.mark.parametrize("name", ["S/8", "B/4", "L/2", "XL/2"])
def test_published_sizes_need_no_help(name: str) -> None:
    """From shapes alone: the arrays are never made (broadcast views of one number)."""
    expected = dit(name)
    one = np.zeros((), np.float32)
    params = jax.tree.map(lambda s: np.broadcast_to(one, s.shape), param_shapes(expected))
    small = dataclasses.replace(expected, depth=1)
    cut = {**params, "blocks": jax.tree.map(lambda a: a[:1], params["blocks"])}
    official = {r.official: r.value for r in rules(small) if hasattr(r, "value")}
    for rule in rules(small):
        if not hasattr(rule, "value"):
            array = cut
            for part in rule.ours.split("/"):
                array = array[part]
            (saved,) = rule.transform.save(array[0] if rule.stacked else array)
            official[rule.names[0].replace("{i}", "0")] = saved
    assert IMPORTER.infer(official) == small
    assert count(params) == count(param_shapes(expected))


def test_what_cannot_be_inferred(weights) -> None:
    with pytest.raises(GenError, match="width 16 is not a published size"):
        IMPORTER.infer(weights)
    with pytest.raises(GenError, match="no option 'head'; did you mean 'heads'"):
        IMPORTER.infer(weights, head=2)
    with pytest.raises(GenError, match="heads is 'two'"):
        IMPORTER.infer(weights, heads="two")
    with pytest.raises(GenError, match="not divisible by heads 3"):
        IMPORTER.infer(weights, heads=3)
    with pytest.raises(GenError, match="not a DiT"):
        config({"a": np.zeros(1)})
    with pytest.raises(GenError, match="5 patches of 2x2, which are not latents of 4x4"):
        config(weights | {"pos_embed": np.zeros((1, 5, 16), np.float32)})


def test_refusals(weights) -> None:
    assert locate(None, weights).importer is IMPORTER
    changed = dict(weights)
    del changed["blocks.1.mlp.fc2.bias"]
    changed["head.weight"] = np.zeros(3, np.float32)
    changed["final_layer.linear.bias"] = np.zeros(3, np.float32)
    with pytest.raises(GenError) as caught:
        IMPORTER.load(changed, TINY)
    assert "1 missing (blocks.1.mlp.fc2.bias); 1 unexpected (head.weight); 1 misshaped" in str(caught.value)
    with pytest.raises(GenError, match="pos_embed with other values"):
        IMPORTER.load(weights | {"pos_embed": weights["pos_embed"][:, ::-1]}, TINY)


def test_from_file_to_samples(weights, tmp_path: Path) -> None:
    """File -> network -> official sampler, through JSON; a sample depends on its own key alone."""
    arrays.write(tmp_path / "w.safetensors", weights)
    network, params, _ = IMPORTER.load(read_weights(tmp_path / "w.safetensors"), TINY)
    made = generator(network, 4, ClassifierFree(2.0, channels=3))
    made = from_json(json.loads(json.dumps(to_json(made))))
    assert made.nfe == 4
    sample = jax.jit(lambda keys, label: made({"net": params}, keys, {"label": label}))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(3))
    images = sample(keys, jnp.array([0, 1, 4]))
    assert images.shape == (3, 4, 4, 3)
    assert np.isfinite(images).all()
    np.testing.assert_allclose(sample(keys[1:2], jnp.array([1]))[0], images[1], rtol=1e-4, atol=1e-4)
    unguided = dataclasses.replace(made, sampler=dataclasses.replace(made.sampler, guidance=ClassifierFree()))
    assert not np.allclose(unguided({"net": params}, keys, {"label": jnp.array([0, 1, 4])}), images, atol=1e-3)


def test_default_sampler_is_the_published_one() -> None:
    made = generator(dit("XL/2"))
    assert made.nfe == 250
    assert made.shape == (32, 32, 4)
    assert made.sampler.solver.variance == "learned"
    assert generator(dataclasses.replace(TINY, learned_variance=False)).sampler.solver.variance == "large"
