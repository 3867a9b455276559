import numpy as np
import pytest

from gen.errors import GenError
from gen.metrics import neighbours as module
from gen.metrics.neighbours import authenticity, manifold, nearest, neighbours, radii_sq


def _sets(n=61, m=47, dim=5):
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(n, dim)), rng.normal(size=(m, dim)) * 0.8 + 0.3
    real[4] = real[9]
    fake[2] = real[4]
    return real.astype(np.float32), fake.astype(np.float32)


def _distances_sq(a, b):
    return np.square(a[:, None].astype(np.float64) - b[None]).sum(-1)


@pytest.fixture(params=[None, 100, 1], ids=["one block", "blocks with a tail", "one point at a time"])
def block(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(module, "_BLOCK_ELEMENTS", request.param)
    return request.param


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("k", [1, 3])
def test_against_the_definition(block, k, strict):
    real, fake = _sets()
    d, radii = _distances_sq(real, fake), [np.sort(_distances_sq(x, x), axis=1)[:, k] for x in (real, fake)]
    compare = np.less if strict else np.less_equal
    # a fake that is a copy meets the balls' rims exactly, where float32 and float64 may not agree
    rim = np.isclose(d, radii[0][:, None], rtol=1e-5)
    inside = compare(d, radii[0][:, None]) if strict else compare(d, radii[0][:, None]) | rim
    inside = inside & ~rim if strict else inside
    found = manifold(real, fake, k, strict=strict)
    assert found.precision == pytest.approx(inside.any(0).mean())
    assert found.density == pytest.approx(inside.sum() / k / len(fake))
    assert found.density_error == pytest.approx(inside.sum(0).std(ddof=1) / np.sqrt(len(fake)) / k)
    rim = np.isclose(d, radii[1][None], rtol=1e-5)
    inside = (compare(d, radii[1][None]) & ~rim) if strict else (compare(d, radii[1][None]) | rim)
    assert found.recall == pytest.approx(inside.any(1).mean())
    np.testing.assert_allclose(found.realism_sq, (radii[0][:, None] / (d + 1e-5)).max(0), rtol=1e-4)


def test_nearest_and_radii(block):
    real, fake = _sets()
    d = _distances_sq(fake, real)
    distance, index = nearest(fake, real)
    np.testing.assert_array_equal(index, d.argmin(1))
    np.testing.assert_allclose(distance, np.sqrt(d.min(1)), rtol=1e-5)
    np.testing.assert_allclose(radii_sq(real, 5), np.sort(_distances_sq(real, real), axis=1)[:, 5], rtol=1e-5)


def test_extremes():
    real, _ = _sets()
    same = manifold(real, real, 3)
    assert same.precision == same.recall == same.coverage == 1
    far = manifold(real, real + 1000, 3)
    assert far.precision == far.recall == far.density == far.coverage == 0
    assert authenticity(real, real + 1000) == 1
    assert authenticity(real, real) == 0
    one = manifold(real, np.repeat(real[:1], 10, axis=0), 3)  # a collapsed generator
    assert one.precision == 1
    assert one.recall < 0.05


def test_refuses():
    real, fake = _sets()
    for k in (0, len(real)):
        with pytest.raises(GenError, match="neighbours asked"):
            radii_sq(real, k)
    with pytest.raises(GenError, match="one feature network"):
        neighbours(fake[:, :3], real)
    with pytest.raises(GenError, match="expected features"):
        manifold(real[:0], fake, 3)
