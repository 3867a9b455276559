"""Scores taken apart: steps in order, a residual of nothing, weights of classes, the general square root."""

from pathlib import Path

import numpy as np
import pytest

from gen import cli
from gen.errors import GenError
from gen.metrics.explain import STEPS, Pipeline, explained, shares, weighted_moments, with_square_root
from gen.metrics.frechet import frechet_distance

A = Pipeline("round", "clean", "inception x", "train")
B = Pipeline("truncate", "clean", "inception x", "val", balance=True, root="sqrtm")
RNG = np.random.default_rng(0)


def test_one_step_at_a_time() -> None:
    asked: list[Pipeline] = []

    def distance(pipeline: Pipeline) -> float:
        asked.append(pipeline)
        return float(len(asked) ** 2)

    found = explained(distance, A, B)
    assert list(found) == ["start", "rounding", "reference", "balance", "root"]
    assert asked[0] == A
    assert asked[-1] == B
    rows = shares(found, 1.0, 25.01)
    assert [change for _, _, change in rows[1:-1]] == [3.0, 5.0, 7.0, 9.0]
    assert rows[-1][0] == "residual"
    assert rows[-1][2] == pytest.approx(0.01)
    assert set(found) - {"start"} <= set(STEPS)
    with pytest.raises(GenError, match="have one pipeline"):
        explained(distance, A, A)


def test_classes_count_equally() -> None:
    x = RNG.normal(size=(300, 3))
    labels = np.repeat([0, 1], [250, 50])
    x[labels == 1] += 4.0
    mean, _ = weighted_moments(x, labels)
    np.testing.assert_allclose(mean, (x[labels == 0].mean(0) + x[labels == 1].mean(0)) / 2)
    even = np.arange(300) % 2
    for weighted, plain in zip(weighted_moments(x, even), weighted_moments(x), strict=True):
        np.testing.assert_allclose(weighted, plain, rtol=1e-10)


def test_roots_agree_where_covariances_are_regular() -> None:
    pair = [weighted_moments(RNG.normal(size=(200, 5)) * scale) for scale in (1.0, 2.0)]
    assert with_square_root("sqrtm", *pair) == pytest.approx(frechet_distance(*pair[0], *pair[1]), rel=1e-8)


def test_digits_by_two_references(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Held-out digits against the training digits and against all of them: the reference explains it all."""
    from gen.data.sources import digits

    held = digits("test").arrays
    np.savez(tmp_path / "images.npz", arr_0=held["image"], arr_1=held["label"])
    scores = []
    for name, reference in (("a", "digits:train"), ("b", "digits:all")):
        scores.append(str(tmp_path / f"{name}.json"))
        assert cli.main(["evaluate", str(tmp_path / "images.npz"), "--reference", reference, "--out", scores[-1]]) == 0
    capsys.readouterr()
    assert cli.main(["explain", *scores, "--real", "digits:train", "digits:all"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line[:1].isalpha()}
    assert abs(float(rows["residual"][1])) < 0.02
    assert float(rows["reference"][1]) != 0.0
    assert cli.main(["explain", scores[0], scores[0], "--real", "digits:train"]) == 2
    assert "have one pipeline" in capsys.readouterr().err
    assert cli.main(["explain", *scores, "--real", "digits:train", "digits:all", "digits:test"]) == 2
    assert "--real names 3 sets" in capsys.readouterr().err
