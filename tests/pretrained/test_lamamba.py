"""What the shapes of LaMamba-Diff's weights tell of its configuration."""

import jax
import numpy as np
import pytest

from gen.diffusion.backbones.lamamba import LaMambaConfig
from gen.nn.network import param_shapes
from gen.pretrained.lamamba import IMPORTER

TINY = {"size": (8, 8), "width": 8, "depths": (1, 1, 1, 1), "middle": 1, "heads": (1, 1, 1, 1), "window": 4}


@pytest.mark.parametrize(
    ("changes", "rank"),
    [
        ({}, None),
        ({"rank": 1}, 1),  # the rule's number in the narrow stages only
        ({"rank": 3}, 3),
        ({"expand": 1.3, "mlp_ratio": 2.7}, None),  # rounded down in the narrow stages
        ({"width": 20, "expand": 1.69, "mlp_ratio": 0.43}, None),
    ],
)
def test_rank_and_ratios_from_shapes(changes, rank) -> None:
    config = LaMambaConfig(**(TINY | changes))
    shapes = param_shapes(config)
    found = IMPORTER.infer(IMPORTER.save(config, jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)))
    assert found.rank == rank
    assert param_shapes(found) == shapes
