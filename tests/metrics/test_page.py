import base64
import io
import re

import numpy as np
from PIL import Image

from gen.metrics.frechet import frechet_of_features
from gen.metrics.page import class_rows, closest_real, distance_by_count, evaluation_page
from gen.metrics.protocol import Protocol, Result
from gen.metrics.reference import Reference
from gen.metrics.sources import from_arrays

RNG = np.random.default_rng(0)
REAL = RNG.normal(size=(90, 5)).astype(np.float32)
FAKE = RNG.normal(0.3, 1, size=(80, 5)).astype(np.float32)
P = Protocol("toy", "abc", 80, reference="toys")
REFERENCE = Reference("toys", REAL.mean(0).astype(float), np.cov(REAL.T), REAL, P, "real")
PICTURES = RNG.integers(0, 256, (20, 200, 100, 3), dtype=np.uint8)
FOUND = {"features": FAKE, "pictures": PICTURES}


def test_the_distance_of_all_kept_samples_ends_the_curve():
    sizes, distances = distance_by_count(FOUND, REFERENCE)
    assert sizes == [20, 40, 80]
    np.testing.assert_allclose(distances[-1], frechet_of_features(REAL, FAKE), rtol=1e-6)


def test_the_closest_real_image():
    _, indices = closest_real(FOUND, REFERENCE)
    expected = ((FAKE[:20, None] - REAL[None]) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(indices, expected)


def test_of_many_classes_the_extremes_are_shown():
    values = tuple(float(v) for v in RNG.permutation(50))
    rows, caption = class_rows(Result({"accuracy": 1.0}, P, per_class={"accuracy": (*values, None)}))
    assert [row[1] for row in rows] == [*range(10), *range(40, 50)]
    assert all(values[label] == value for label, value in rows)
    assert "of 50 classes by accuracy" in caption
    few = Result({"accuracy": 1.0}, P, per_class={"accuracy": (0.5, None, 1.0), "other": (1.0,)})
    assert class_rows(few) == ([[0, 0.5, 1.0], [2, 1.0, None]], "")


def test_large_pictures_are_shrunk():
    real = from_arrays(RNG.integers(0, 256, (90, 200, 100, 3), dtype=np.uint8))
    html = evaluation_page("toy", Result({"frechet_distance": 1.0}, P), FOUND, REFERENCE, real).html()
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", html)
    assert len(pictures) == 3
    with Image.open(io.BytesIO(base64.b64decode(pictures[0]))) as grid:
        assert grid.size == (12 * (64 + 2) - 2, 2 * (128 + 2) - 2)
    assert "By class" not in html
