import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.errors import GenError
from gen.metrics.statistics import Accuracy, Features, Moments

X = np.random.default_rng(0).normal(size=(1000, 6)) * [1, 2, 3, 4, 5, 6] + 50
SPAN = 1024
SHAPES = {"features": jax.ShapeDtypeStruct((8, 6), jnp.float32), "logits": jax.ShapeDtypeStruct((8, 3), jnp.float32)}


def _stream(statistic, batch, rows=X, host=None):
    """Accumulates on device in padded batches of garbage-filled tails; merges on the host after each `host` batches."""
    accumulator, total = statistic.init(SHAPES, SPAN), None
    update = jax.jit(statistic.update)
    firsts = range(0, len(rows), batch)
    for number, first in enumerate(firsts, 1):
        part = rows[first : first + batch]
        pad = batch - len(part)
        full = np.concatenate([part, np.full((pad, rows.shape[1]), np.nan)]).astype(np.float32)
        weight = np.r_[np.ones(len(part)), np.zeros(pad)].astype(np.float32)
        index = np.minimum(np.arange(first, first + batch), len(rows) - 1).astype(np.int32)
        label = (index % 3).astype(np.int32)
        accumulator = update(accumulator, {"features": full, "logits": full[:, :3], "label": label}, weight, index)
        if number == len(firsts) or (host and number % host == 0):
            fetched = jax.device_get(accumulator)
            total = fetched if total is None else statistic.merge(total, fetched)
            accumulator = statistic.init(SHAPES, SPAN)
    return statistic.finalise(total)


@pytest.mark.parametrize(("batch", "host"), [(7, 3), (64, 1), (1000, None), (1024, None)])
def test_streamed_moments_equal_those_of_the_whole(batch, host):
    found = _stream(Moments(), batch, host=host)
    assert found["count"] == 1000
    np.testing.assert_allclose(found["mean"], X.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["covariance"], np.cov(X.T), rtol=1e-5, atol=1e-5)


def test_merging_is_associative_and_exact_in_float64():
    a, b, c = (Moments.of(X[s]) for s in (slice(0, 3), slice(3, 500), slice(500, None)))
    merge = Moments().merge
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol=1e-12)
    np.testing.assert_allclose(left["scatter"] / 999, np.cov(X.T), rtol=1e-11, atol=1e-11)
    none = {"count": np.float64(0), "mean": np.zeros(6), "scatter": np.zeros((6, 6))}
    for name, value in merge(none, a).items():
        np.testing.assert_array_equal(value, a[name])


def test_one_sample_has_no_covariance():
    with pytest.raises(GenError, match="covariance of 1 samples"):
        Moments().finalise(Moments.of(X[:1]))


@pytest.mark.parametrize(("batch", "host"), [(7, 3), (64, 1), (1024, None)])
def test_features_are_chosen_by_index(batch, host):
    found = _stream(Features(100), batch, host=host)["features"]
    np.testing.assert_array_equal(found, X[:100].astype(np.float32))
    np.testing.assert_array_equal(_stream(Features(2000), batch, host=host)["features"], X.astype(np.float32))


def test_levels_beyond_the_range_are_kept_as_black_and_white():
    rows = np.array([[-7.2], [3.6], [254.5], [300.0]])
    found = _stream(Features(4, dtype="uint8", name="pictures"), 4, rows)["pictures"]
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[:, 0], [0, 4, 254, 255])


@pytest.mark.parametrize(("batch", "host"), [(7, 3), (1024, None)])
def test_accuracy(batch, host):
    rows = X[:200].astype(np.float32)
    right = rows[:, :3].argmax(1) == np.arange(200) % 3
    found = _stream(Accuracy(), batch, rows, host=host)
    assert found["accuracy"] == pytest.approx(right.mean())
    for label in range(3):
        assert found["class_accuracy"][label] == pytest.approx(right[label::3].mean())
    np.testing.assert_array_equal(found["class_count"], [67, 67, 66])


def test_accuracy_among_many_classes_counts_the_first_five():
    """Sample i's own class has the i-th largest logit, i from 0 to 9; the padding's garbage does not count."""
    label, logits = np.arange(10) * 7, np.tile(np.linspace(0, -1, 100, dtype=np.float32), (12, 1))
    for i in range(10):
        logits[i, [i, label[i]]] = logits[i, [label[i], i]]
    batch = {"logits": logits, "label": np.r_[label, 3, 3]}
    statistic, weight = Accuracy(), np.r_[np.ones(10), 0, 0].astype(np.float32)
    found = statistic.finalise(statistic.update(statistic.init(batch, SPAN), batch, weight, np.arange(12)))
    assert (found["accuracy"], found["top5_accuracy"]) == (0.1, 0.5)
    assert found["class_count"].sum() == 10
    assert "top5_accuracy" not in _stream(statistic, 64)
