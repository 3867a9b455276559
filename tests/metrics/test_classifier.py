import numpy as np
import pytest

from gen.data.sources import digits
from gen.errors import GenError
from gen.metrics.classifier import Classifier, _Network, _program, classification_accuracy
from gen.training.sharding import make_mesh

QUICK = Classifier(size=8, width=8, blocks=1, steps=25, batch=32, rate=1e-2, runs=2)


def _stripes(count, seed):
    """16x16 images of upright (0) and level (2) stripes in noise; there is no class 1."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    waves = np.where(np.arange(8) % 4 < 2, 60, 190)
    images = np.where(labels[:, None, None] == 0, waves[None, None, :], waves[None, :, None])
    noisy = np.clip(images[..., None] + rng.normal(0, 40, (count, 8, 8, 1)), 0, 255)
    return noisy.astype(np.uint8).repeat(2, 1).repeat(2, 2), 2 * labels


def test_learns_what_the_samples_show():
    train, test = _stripes(200, 0), _stripes(100, 1)
    found = classification_accuracy(*train, *test, classifier=QUICK, mesh=make_mesh())
    assert found.accuracy > 0.9
    assert found.spread >= 0
    assert found.per_class[1] is None
    upright, level = (test[1] == 0).sum(), (test[1] == 2).sum()
    assert (found.per_class[0] * upright + found.per_class[2] * level) / 100 == pytest.approx(found.accuracy)
    swapped = classification_accuracy(train[0], 2 - train[1], *test, classifier=QUICK, mesh=make_mesh())
    assert swapped.accuracy < 0.1
    start, step = _program(QUICK, _Network((8, 8), 1, 8, 1, 3), make_mesh())
    assert (start._cache_size(), step._cache_size()) == (1, 1)  # for all runs and data


@pytest.mark.slow
def test_learns_the_digits_as_well_as_a_linear_classifier():
    from sklearn.linear_model import LogisticRegression

    train, test = digits("train").arrays, digits("test").arrays
    linear = LogisticRegression(max_iter=200).fit(train["image"].reshape(-1, 64) / 255, train["label"])
    goal = linear.score(test["image"].reshape(-1, 64) / 255, test["label"])
    found = classification_accuracy(
        train["image"],
        train["label"],
        test["image"],
        test["label"],
        classifier=Classifier(width=16, blocks=1, steps=600, batch=64, rate=3e-3, runs=2),
    )
    assert found.accuracy > goal
    assert found.spread < 0.05


def test_refuses():
    image, label = _stripes(20, 0)
    for arguments, message in (
        ((image, label[:-1], image, label), "one label each"),
        ((image / 255, label, image, label), "takes uint8"),
        ((image, label - 1, image, label), "label -1"),
        ((image[:, :4], label, image, label), "expected one size"),
        ((image[label > 0], label[label > 0], image, label), "no sample of class 0"),
    ):
        with pytest.raises(GenError, match=message):
            classification_accuracy(*arguments)
    with pytest.raises(GenError, match="8 divides the width"):
        Classifier(width=12)
