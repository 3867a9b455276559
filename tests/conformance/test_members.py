"""One suite over every registered task, source, tokenizer and generator; solvers have theirs in tests/sampling."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.arrays import flatten
from gen.config import from_json, to_json
from gen.data.sources import ArraySource
from gen.diffusion.denoiser import Denoiser
from gen.diffusion.process import Linear
from gen.errors import GenError
from gen.kinds import KINDS
from gen.nn.conditions import make_conditions
from gen.nn.network import Network, count, param_shapes
from gen.runs import Loaded
from gen.sampling.generate import quantise
from gen.sampling.generator import DiffusionGenerator, Sampler
from gen.sampling.noise import decode_keys
from gen.tokenizers.encode import encode_images
from gen.training.run import RunConfig
from gen.training.task import Model
from tests.conformance import examples
from tests.conformance.tokenizers import Codebook, Drawn, Steps
from tests.distill.tiny import Tiny
from tests.training.conformance import check_devices, check_task


@pytest.fixture(autouse=True)
def _kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "conformance", examples.KINDS_HERE)


@pytest.mark.parametrize("family", ["solver", "tokenizer", "generator", "task", "data"])
def test_every_member_has_an_example(family: str, tmp_path: Path) -> None:
    for kind in KINDS[family]:
        found = examples.sources(kind, tmp_path / kind) if family == "data" else [examples.example(kind)]
        assert found, f"'{kind}' reads none of the stores"
        assert all(from_json(json.loads(json.dumps(to_json(member)))) == member for member in found)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] if k in examples.SLOW else []) for k in KINDS["task"]]
)
def test_task(kind: str, tmp_path: Path) -> None:
    check_task(examples.task(kind), examples.rows(kind), examples.frozen(kind), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS["task"])
def test_task_on_eight_devices(kind: str, tmp_path: Path) -> None:
    check_devices(f"tests.conformance.examples:build({kind})", tmp_path, steps=6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", examples.DIVIDED)
def test_students_on_devices_of_their_own(kind: str, tmp_path: Path) -> None:
    check_devices(f"tests.conformance.examples:build({kind})", tmp_path, steps=6, meshes="students")


@pytest.mark.parametrize("kind", KINDS["data"])
def test_source(kind: str, tmp_path: Path) -> None:
    for data in examples.sources(kind, tmp_path):
        _check_source(data)


def _take(stream: Iterator[Any], steps: int) -> list[dict[str, np.ndarray]]:
    rows = list(itertools.islice(stream, steps))
    stream.close()
    return rows


def _check_source(data: Any) -> None:
    """One global stream whatever the start and the processes; labels and images of the promised types."""
    whole = _take(data.batches(batch=4, seed=3, start=0), 7)
    assert data.identity() == from_json(to_json(data)).identity()
    assert {"image", "latent", "tokens", "bits", "noise"} & set(whole[0])
    for name, rows in whole[0].items():
        assert len(rows) == 4
        assert rows.dtype == {"image": np.uint8, "latent": np.float32, "label": np.int32}.get(name, rows.dtype)
    _same(_take(data.batches(batch=4, seed=3, start=5), 2), whole[5:])
    for processes in (2, 4):
        parts = [
            _take(data.batches(batch=4, seed=3, start=0, process=i, processes=processes), 3) for i in range(processes)
        ]
        joined = [{k: np.concatenate([p[step][k] for p in parts]) for k in whole[0]} for step in range(3)]
        _same(joined, whole[:3])
    other = _take(data.batches(batch=4, seed=4, start=0), 7)
    assert any((a[k] != b[k]).any() for a, b in zip(other, whole, strict=True) for k in a)


def _same(left: list[dict[str, np.ndarray]], right: list[dict[str, np.ndarray]]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("kind", [*KINDS["tokenizer"], *examples.TOKENIZERS])
def test_tokenizer(kind: str) -> None:
    """What `spec` promises is what encode and decode give; checked on shapes alone, for defaults may be large."""
    tokenizer = examples.SMALL.get(kind) or examples.example(kind)
    spec, params = tokenizer.spec, param_shapes(tokenizer)
    assert count(params) > 0
    assert tokenizer.last_layer in flatten(params)
    images = jax.ShapeDtypeStruct((2, *spec.image), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    cond = make_conditions(spec.conditions, range(2))

    def encode(params: Any, images: Any, keys: Any) -> Any:
        return tokenizer.encode(params, images, cond=cond, keys=keys)

    def decode(params: Any, codes: Any, keys: Any) -> Any:
        return tokenizer.decode(params, codes, cond=cond, keys=keys, options=None)

    encoded = jax.eval_shape(encode, params, images, keys)
    assert encoded.stored.shape == (2, *spec.shape)
    if spec.kind == "continuous":
        drawn = jax.eval_shape(lambda p, k: p.sample(k), encoded, keys)
        assert (drawn.shape, drawn.dtype) == ((2, *spec.shape), jnp.float32)
    else:
        assert jnp.issubdtype(encoded.ids.dtype, jnp.integer)
        codes = jax.eval_shape(tokenizer.embed, params, encoded.ids)
        assert codes.shape == encoded.codes.shape
        assert codes.shape[-1] == spec.width
        again = jax.eval_shape(tokenizer.snap, params, codes)
        assert (again.ids.shape, again.ids.dtype) == (encoded.ids.shape, encoded.ids.dtype)
        assert (again.codes.shape, again.codes.dtype) == (encoded.codes.shape, encoded.codes.dtype)
        assert set(encoded.statistics) <= Network(tokenizer).buffers
    decoded = jax.eval_shape(decode, params, encoded.mode(), keys)
    assert (decoded.shape, decoded.dtype) == ((2, *spec.image), jnp.float32)


def test_ids_go_to_a_cache_and_back(tmp_path: Path) -> None:
    """As they are: neither averaged nor normalised."""
    tokenizer = Codebook()
    params = jax.tree.map(np.asarray, Network(tokenizer).init(jax.random.key(0)))
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)
    run = Loaded(tmp_path, RunConfig("t", models={"tokenizer": Model(tokenizer)}), {"tokenizer": params}, "raw", 0)
    ids = run.encode(images)
    cache = encode_images(tokenizer, params, ArraySource(image=images), tmp_path / "c", batch=5, label="")
    rows = cache.source().gather(np.arange(12))["tokens"]
    np.testing.assert_array_equal(rows, ids)
    assert (rows.dtype, cache.vocabulary, len(np.unique(ids)) > 2) == (np.int32, 8, True)
    embedded = tokenizer.embed(params, jnp.asarray(ids))
    np.testing.assert_array_equal(tokenizer.snap(params, embedded).ids, ids)
    np.testing.assert_array_equal(run.decode(ids), np.asarray(quantise(tokenizer.decode(params, embedded))))
    with pytest.raises(GenError, match="row 1 holds 8; this tokenizer decodes integers from 0 to 7"):
        run.decode(np.array([[[0, 1], [2, 7]], [[3, 8], [0, 0]]]))
    with pytest.raises(GenError, match="tokens are float32"):
        run.decode(np.zeros((1, 2, 2), np.float32))


def test_a_decoder_that_samples_draws_for_each_image_alone(tmp_path: Path) -> None:
    """From a stream of its own, by options and conditions that every caller passes on."""
    denoiser = Denoiser(Tiny(channels=1, size=(4,)), Linear())
    params = {"net": denoiser.net.init(jax.random.key(0)), "tokenizer": Network(Drawn()).init(jax.random.key(1))}
    label, keys = jnp.arange(3), jax.random.split(jax.random.key(2), 3)
    made = {}
    for steps in (1, 2):
        generator = DiffusionGenerator(denoiser, Sampler(steps=2, decoding=Steps(steps)), Drawn())
        assert (generator.shape, set(generator.conditions)) == ((8, 8, 1), {"label", "keep"})
        cond = {"label": label, "keep": jnp.array([4, 4, 0], jnp.int32)}
        images = jax.jit(generator)(params, keys, cond)
        alone = generator(params, keys[1:2], {name: value[1:2] for name, value in cond.items()})
        np.testing.assert_allclose(alone, images[1:2], rtol=1e-5, atol=1e-5)
        latents = generator.latents(params, keys, cond)
        expected = Drawn().decode(params["tokenizer"], latents, cond=cond, keys=decode_keys(keys), options=Steps(steps))
        np.testing.assert_allclose(images, expected, rtol=1e-5, atol=1e-5)
        assert np.abs(np.asarray(images[2])).max() < 1.0  # no token is used: noise alone
        made[steps] = np.asarray(images)
    assert np.abs(made[1] - made[2]).max() > 0.05
    run = RunConfig("t", models={"tokenizer": Model(Drawn())})
    loaded = Loaded(tmp_path, run, {"tokenizer": params["tokenizer"]}, "raw", 0)
    codes = np.zeros((3, 4, 1), np.float32)
    first, again = (loaded.decode(codes, seeds=seeds) for seeds in ([5, 6, 7], [7, 5, 6]))
    np.testing.assert_array_equal(first[[2, 0, 1]], again)
    assert (loaded.decode(codes, seeds=[5, 6, 7], options=Steps(2)) != first).any()


@pytest.mark.parametrize("kind", KINDS["generator"])
def test_generator(kind: str) -> None:
    """Sample i is a function of key i and condition i alone, and finite."""
    generator = examples.example(kind)
    params = {role: Network(network).init(jax.random.key(1)) for role, network in generator.networks.items()}
    keys = jax.vmap(jax.random.key)(jnp.arange(6))
    rows = jax.random.normal(jax.random.key(2), (6, 1000))  # of every condition but the label
    cond = {name: rows[:, : math.prod(c.shape)].reshape(6, *c.shape) for name, c in generator.conditions.items()}
    cond["label"] = jnp.arange(6, dtype=jnp.int32) % examples.CLASSES
    run = jax.jit(generator)
    images = run(params, keys, cond)
    assert images.shape == (6, *generator.shape)
    assert images.dtype == jnp.float32
    assert np.isfinite(images).all()
    assert generator.nfe is None or generator.nfe >= 1  # None: adaptive, measured by each call
    np.testing.assert_array_equal(run(params, keys, cond), images)
    order = np.array([4, 0, 2])
    some = run(params, keys[order], {name: value[order] for name, value in cond.items()})
    # an adaptive solver takes other steps where rounding differs, and is then as near as its own tolerance, 1e-5 a step
    close = 1e-5 if generator.nfe is not None else 1e-4
    np.testing.assert_allclose(some, np.asarray(images)[order], rtol=close, atol=close)
    assert (np.abs(np.asarray(run(params, keys[::-1], cond)) - np.asarray(images)) > 1e-3).any()
