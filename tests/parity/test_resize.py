"""`gen.features.resize` against Pillow, torch and clean-fid."""

import re

import numpy as np
import pytest

from gen.features.inception import SIZE, fid_input
from gen.features.resize import resize, resize_uint8
from tests.parity.conftest import fixtures

FIXTURES = fixtures("cleanfid-resize*")
METHOD = {"PIL": "pil", "PyTorch": "torch"}


@pytest.mark.parametrize("fx", FIXTURES, ids=str)
@pytest.mark.parametrize("mode", ["clean", "legacy_pytorch"])
def test_to_inception(fx, mode):
    rows, columns = (slice(*(int(n) if n else None for n in fx.config[k].split(":"))) for k in ("sub_rows", "sub_cols"))
    for case in fx.config["cases"]:
        name = case["name"]
        image = np.asarray(fx.io[name])
        assert image.shape == (case["h"], case["w"], 3)
        out = np.asarray(fid_input(image[None].astype(np.float32), mode))[0]
        assert out.shape == (SIZE, SIZE, 3)
        parts = {"sub": out[rows, columns], "row0": out[0], f"row{SIZE - 1}": out[-1], "col0": out[:, 0]}
        for part, actual in (parts | {f"col{SIZE - 1}": out[:, -1]}).items():
            fx.close(actual, f"{name}_{mode}_{part}")
        wide = out.astype(np.float64)
        moments = wide.mean(), (wide**2).mean(), wide.min(), wide.max()
        np.testing.assert_allclose(moments, fx.io[f"{name}_{mode}_moments"], rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("fx", FIXTURES, ids=str)
def test_filters(fx):
    found = [m for name in fx.io if (m := re.fullmatch(r"(in\d+)_(PIL|PyTorch)_(\w+)_(f32|u8)", name))]
    assert found
    for match in found:
        source, library, filter_, kind = match.groups()
        image, expected = np.asarray(fx.io[source])[None], np.asarray(fx.io[match[0]])
        method = f"{METHOD[library]}-{filter_}"
        if kind == "f32":
            actual = np.asarray(resize(image.astype(np.float32), expected.shape[:2], method))[0]
            if expected.min() >= 0 and expected.max() <= 255:
                actual = actual.clip(0, 255)
            fx.close(actual, match[0])
            continue
        actual = np.asarray(resize_uint8(image, expected.shape[:2], method))[0].astype(int)
        off = np.abs(actual - expected)
        assert off.max() <= 1, match[0]
        assert (off == 0).mean() > 0.99, (match[0], (off == 0).mean())
