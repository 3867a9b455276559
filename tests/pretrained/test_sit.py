"""SiT, REPA and LightningDiT files: which system a file is, what is inferred, refusals, official samplers."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from gen.config import from_json, to_json
from gen.diffusion.backbones.aligned import AlignedConfig
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.backbones.lightningdit import LightningDiTConfig, lightningdit
from gen.errors import GenError
from gen.nn.network import param_shapes
from gen.pretrained import dit, sit
from gen.pretrained import lightningdit as lightning
from gen.pretrained.systems import locate, system

TINY = DiTConfig((4, 4), 3, 2, 16, 2, 2, num_classes=5)
ALIGNED = AlignedConfig(TINY, "block_1", (6, 7), 9)
LIGHTNING = LightningDiTConfig((4, 4), 3, 2, 16, 2, 2, num_classes=5)


def official(importer, config):
    rng = np.random.default_rng(0)
    return importer.save(config, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), param_shapes(config)))


def test_files_are_told_apart_where_their_names_differ():
    repa, light, plain = (
        official(sit.REPA, ALIGNED),
        official(lightning.IMPORTER, LIGHTNING),
        official(sit.IMPORTER, TINY),
    )
    assert locate(None, repa).importer is sit.REPA
    assert locate(None, light).importer is lightning.IMPORTER
    assert locate(None, plain).importer is dit.IMPORTER  # the same names
    assert system("sit") is sit.IMPORTER
    with pytest.raises(GenError, match="none of the known systems"):
        locate(None, {"a": np.zeros(1)})
    with pytest.raises(GenError, match=r"blocks.0.mlp.fc1.weight is missing"):
        dit.IMPORTER.infer(light)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"swiglu": False},
        {"rope": False, "qk_norm": True},
        {"rmsnorm": False, "qk_norm": True, "shift": False},
        {"mlp_ratio": 3.0, "learned_variance": True},
    ],
)
def test_lightningdit_is_inferred(changes):
    expected = dataclasses.replace(LIGHTNING, **changes)
    weights = official(lightning.IMPORTER, expected)
    found = lightning.IMPORTER.infer(weights)
    assert found.hidden == expected.hidden
    assert dataclasses.replace(found, mlp_ratio=expected.mlp_ratio) == expected
    _, params, report = lightning.IMPORTER.load(weights)
    assert len(report.matched) == len(weights)
    back = lightning.IMPORTER.save(found, params)
    assert all(np.array_equal(back[k], v) for k, v in weights.items())


def test_refusals():
    weights = official(lightning.IMPORTER, dataclasses.replace(LIGHTNING, rope=False))
    with pytest.raises(GenError, match="width 16 is not a published size; give its number of attention heads"):
        lightning.IMPORTER.infer(weights)
    del weights["blocks.0.mlp.w12.weight"]
    with pytest.raises(GenError, match=r"not a LightningDiT: blocks.0.mlp.fc1.weight is missing"):
        lightning.IMPORTER.infer(weights, heads=2)
    weights = official(sit.REPA, ALIGNED)
    assert sit.REPA.infer(weights, heads=2, encoder_depth=2) == ALIGNED
    with pytest.raises(GenError, match="encoder_depth is 8; this network has blocks 1 to 2"):
        sit.REPA.infer(weights, heads=2)
    with pytest.raises(GenError, match="not a REPA model"):
        sit.REPA.infer(official(sit.IMPORTER, TINY), heads=2)


def test_official_samplers():
    made = lightning.generator(lightningdit("XL/1"), guidance=lightning.guidance())
    assert made.nfe == 249
    assert made.shape == (16, 16, 32)
    assert from_json(json.loads(json.dumps(to_json(made)))) == made
    times = made.sampler.times(made.denoiser.process).times
    t = np.linspace(0.0, 1.0, 250)
    np.testing.assert_allclose(1.0 - times, 0.3 * t / (1.0 + (0.3 - 1.0) * t), atol=1e-12)
    interval = made.sampler.guidance
    assert interval.low <= np.float32(1.0 - 0.125) < interval.high
    assert interval.guidance.channels == 3
    for made in (sit.generator(TINY), sit.aligned_generator(ALIGNED)):
        assert made.nfe == 250
        assert made.sampler.times(made.denoiser.process).times[-2] == pytest.approx(0.04)
    assert sit.sampler("ode", 50).nfe(made.denoiser.process) == 99
