"""ADM's centre crop: the very bytes."""

import numpy as np
import pytest
from PIL import Image

from gen.data.transforms import adm_center_crop
from tests.parity.conftest import Fixture, fixtures


@pytest.mark.parametrize("fx", fixtures("adm-center-crop*"), ids=str)
def test_crops_equal_the_official_ones(fx: Fixture) -> None:
    sizes = fx.config["sizes"]
    assert len(sizes) == sum(name.startswith("in_") for name in fx.io) > 0
    for i, size in enumerate(sizes):
        fx.close(np.asarray(adm_center_crop(Image.fromarray(fx.io[f"in_{i}"]), size)), f"out_{i}")
