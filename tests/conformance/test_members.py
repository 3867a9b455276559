"""One suite over every registered task, source, tokenizer and generator; solvers have theirs in tests/sampling."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.config import KINDS, from_json, to_json
from gen.nn.network import Network, count, param_shapes
from tests.conformance import examples
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


@pytest.mark.parametrize("kind", KINDS["task"])
def test_task(kind: str, tmp_path: Path) -> None:
    check_task(examples.task(kind), examples.Rows(), examples.frozen(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS["task"])
def test_task_on_eight_devices(kind: str, tmp_path: Path) -> None:
    check_devices(f"tests.conformance.examples:build({kind})", tmp_path, steps=6)


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


@pytest.mark.parametrize("kind", KINDS["tokenizer"])
def test_tokenizer(kind: str) -> None:
    """What `spec` promises is what encode and decode give; checked on shapes alone, for defaults may be large."""
    tokenizer = examples.example(kind)
    spec, params = tokenizer.spec, param_shapes(tokenizer)
    assert count(params) > 0
    images = jax.ShapeDtypeStruct((2, *spec.image), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    posterior = jax.eval_shape(tokenizer.encode, params, images)
    for latents in (
        jax.eval_shape(lambda p: p.mode(), posterior),
        jax.eval_shape(lambda p, k: p.sample(k), posterior, keys),
    ):
        assert latents.shape == (2, *spec.shape)
        assert jnp.issubdtype(latents.dtype, jnp.floating if spec.kind == "continuous" else jnp.integer)
        decoded = jax.eval_shape(tokenizer.decode, params, latents)
        assert (decoded.shape, decoded.dtype) == ((2, *spec.image), jnp.float32)


@pytest.mark.parametrize("kind", KINDS["generator"])
def test_generator(kind: str) -> None:
    """Sample i is a function of key i and condition i alone, and finite."""
    generator = examples.example(kind)
    params = {"net": Network(examples.NETWORK).init(jax.random.key(1))}
    keys = jax.vmap(jax.random.key)(jnp.arange(6))
    label = jnp.arange(6, dtype=jnp.int32) % examples.CLASSES
    run = jax.jit(generator)
    images = run(params, keys, {"label": label})
    assert images.shape == (6, *examples.SHAPE)
    assert images.dtype == jnp.float32
    assert np.isfinite(images).all()
    assert generator.nfe is None or generator.nfe >= 1  # None: adaptive, measured by each call
    np.testing.assert_array_equal(run(params, keys, {"label": label}), images)
    order = np.array([4, 0, 2])
    some = run(params, keys[order], {"label": label[order]})
    np.testing.assert_allclose(some, np.asarray(images)[order], rtol=1e-5, atol=1e-5)
    assert (np.abs(np.asarray(run(params, keys[::-1], {"label": label})) - np.asarray(images)) > 1e-3).any()
