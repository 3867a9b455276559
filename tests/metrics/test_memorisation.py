import numpy as np
import pytest

from gen.errors import GenError
from gen.metrics.memorisation import memorisation, show_memorisation
from gen.metrics.report import Report


def test_copies_are_found_and_held_against_heldout_images():
    rng = np.random.default_rng(0)
    training, heldout, fresh = (rng.integers(0, 256, (n, 4, 4, 1), dtype=np.uint8) for n in (50, 30, 8))
    near = np.clip(training[[7, 3]].astype(int) + 1, 0, 255).astype(np.uint8)
    samples = np.concatenate([fresh, near])
    found = memorisation(samples, training, heldout)
    assert found.index[8:].tolist() == [7, 3]
    assert found.share == pytest.approx(0.2)
    assert found.heldout_share == 0
    assert found.threshold == pytest.approx(np.median(found.heldout) / 2)
    assert found.error == pytest.approx(np.sqrt(0.2 * 0.8 / 10))
    exact = np.linalg.norm(samples[0].astype(float).ravel() - training.reshape(50, -1), axis=1)
    assert found.distance[0] == pytest.approx(exact.min())
    with pytest.raises(GenError, match="0 samples, 50 training and 30"):
        memorisation(samples[:0], training, heldout)

    page = show_memorisation(Report("copies"), samples, training, {"pixels": found}, count=4).html()
    assert "20.00 %" in page
    assert "threshold" in page
    assert page.count("data:image/png") == 2
    shown = show_memorisation(Report(""), samples, training, {"x": found}, count=2).blocks
    assert [b["kind"] for b in shown] == ["section", "table", "pictures", "curves"]
