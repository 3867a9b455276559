import numpy as np
import pytest

from gen.errors import GenError
from gen.metrics.evaluate import Settings, evaluate
from gen.metrics.frechet import frechet_distance, frechet_infinity, frechet_of_features
from gen.metrics.inception_score import InceptionScore
from gen.metrics.intervals import kernel_error
from gen.metrics.kernels import cmmd, cubic, kid, mind, mmd2, rbf
from gen.metrics.reference import make_reference
from gen.metrics.sources import balanced_labels, from_arrays
from tests.metrics.toy import Toy, features, images

X, Y = (np.random.default_rng(i).normal(i / 2, 1, (90, 7)) for i in (0, 1))


def test_mmd_by_its_definition():
    for kernel in (cubic, rbf(2.0)):
        within = [np.mean([kernel(a[i : i + 1], np.delete(a, i, 0)).mean() for i in range(90)]) for a in (X, Y)]
        assert mmd2(X, Y, kernel) == pytest.approx(sum(within) - 2 * kernel(X, Y).mean(), rel=1e-9)
        assert mmd2(X, X, kernel, unbiased=False) == pytest.approx(0, abs=1e-12)
    assert cmmd(X, Y, sigma=2.0) == pytest.approx(1000 * mmd2(X, Y, rbf(2.0), unbiased=False))


def test_subsets_and_seeds():
    assert kid(X, Y, subsets=7, size=30) == kid(X, Y, subsets=7, size=30) != kid(X, Y, subsets=7, size=30, seed=1)
    whole = kid(X, Y, subsets=3)
    assert whole.mean == pytest.approx(mmd2(X, Y))
    assert whole.std == pytest.approx(0, abs=1e-12)
    assert mind(X, X[::-1]) == pytest.approx((0, 0), abs=1e-20)
    shifted, error = mind(X, X + np.eye(7)[0] * 2, directions=20_000)  # 3 D |shift|^2 / D on average
    assert shifted == pytest.approx(12, abs=4 * error)
    drawn = [mind(X, Y, directions=50, seed=seed) for seed in range(40)]
    assert np.std([value for value, _ in drawn]) == pytest.approx(np.mean([error for _, error in drawn]), rel=0.3)


def test_distances_from_features():
    moments = [(a.mean(0), np.cov(a.T)) for a in (X, Y)]
    assert frechet_of_features(X, Y) == pytest.approx(frechet_distance(*moments[0], *moments[1]))
    few = [(a[:5].mean(0), np.cov(a[:5].T)) for a in (X, Y)]
    assert frechet_of_features(X[:5], Y[:5]) == pytest.approx(frechet_distance(*few[0], *few[1]), abs=1e-6)
    line, error = frechet_infinity(np.tile(Y, (40, 1)), *moments[1], points=5)
    assert abs(line) < 0.1
    assert error > 0


def test_refuses():
    for call, message in (
        (lambda: mmd2(X, Y[:, :3]), "one feature network"),
        (lambda: mmd2(X[:1], Y), "needs 2 of each"),
        (lambda: frechet_of_features(X[:1], Y), "at least 2 of each"),
        (lambda: frechet_of_features(X[:5] * np.nan, Y[:5]), "expected finite"),
        (lambda: frechet_infinity(X[:9], X.mean(0), np.cov(X.T)), "evaluate more samples"),
        (lambda: InceptionScore(3, splits=4).init({"unbiased_logits": X}, 8), "use fewer"),
    ):
        with pytest.raises(GenError, match=message):
            call()


def test_evaluation_gives_them_when_asked():
    labels = balanced_labels(60, 3)
    real, fake = images(60), images(60, seed=1) // 2
    reference = make_reference("toys", from_arrays(real, labels), Toy())
    found = evaluate(from_arrays(fake, labels), reference, Toy(), Settings(extra=("kid", "mind", "class_frechet")))
    a, b = features(real).astype(np.float32), features(fake).astype(np.float32)
    assert found.values["kid"] == pytest.approx(kid(a, b).mean, rel=1e-4)
    assert found.values["mind"] == pytest.approx(mind(a, b)[0], rel=1e-4)
    assert found.within["mind"] == pytest.approx(mind(a, b)[1], rel=1e-3)
    expected = [frechet_of_features(a[labels == k], b[labels == k]) for k in range(3)]
    assert found.per_class["class_frechet"] == pytest.approx(expected, rel=1e-3)
    assert found.values["class_frechet"] == pytest.approx(np.mean(expected), rel=1e-3)
    assert found.within["class_frechet"] == pytest.approx(np.std(expected), rel=1e-3)
    assert found.within["kid"] == pytest.approx(kernel_error(a, b, cubic), rel=1e-3)  # no subsets of so few
    source = from_arrays(fake)
    with pytest.raises(GenError, match="needs labels"):
        evaluate(source, reference, Toy(), Settings(extra=("class_frechet",)))
    with pytest.raises(GenError, match="unknown measure 'kit'"):
        evaluate(source, reference, Toy(), Settings(extra=("kit",)))
    few = from_arrays(fake[labels != 2], labels[labels != 2])
    with pytest.raises(GenError, match="class 2 has 0 samples and 20 real images"):
        evaluate(few, reference, Toy(), Settings(extra=("class_frechet",)))
    forced = evaluate(source, reference, Toy(shift=1.0), Settings(force=True))
    assert forced.protocol.reference == "toys (forced)"
