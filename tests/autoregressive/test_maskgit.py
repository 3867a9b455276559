"""MaskGIT's two networks: published sizes, initialisation, depth by scan, bad configurations; learning digits."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gen
from gen import cli
from gen.autoregressive.maskgit import PUBLISHED, MaskGITConfig, MaskGITSkipConfig, maskgit
from gen.errors import GenError
from gen.nn.network import Network, count, param_shapes
from tests.autoregressive.learned import agreement, patch_tokenizer

SKIPS = MaskGITSkipConfig(
    shape=(2, 3), vocabulary=8, num_classes=0, cond_dropout=0.0, width=16, depth=4, heads=2, hidden=32
)
COUNTS = {"l32": 177_202_432, "b64": 177_227_008, "s128": 294_990_848}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    assert count(param_shapes(maskgit(name))) == COUNTS[name]


@pytest.mark.slow
def test_scan_equals_loop_and_no_class_is_needed() -> None:
    params, tokens = Network(SKIPS).init(jax.random.key(0)), jnp.arange(12).reshape(2, 6) % 9
    looped = dataclasses.replace(SKIPS, scan=False, remat="dots")
    found = [jax.jit(lambda p, c=config: c.logits(p, tokens, {}))(params) for config in (SKIPS, looped)]
    assert found[0].shape == (2, 6, 8)
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)
    assert 0.015 < float(params["down"]["attn"]["qkv"]["kernel"].std()) < 0.025


def test_refusals() -> None:
    assert SKIPS.sequence(np.zeros((2, 2, 3), np.int32)).shape == (2, 6)
    with pytest.raises(GenError, match="unknown MaskGIT 'l23'; did you mean 'l32'"):
        maskgit("l23")
    with pytest.raises(GenError, match="even depth"):
        dataclasses.replace(SKIPS, depth=3)
    with pytest.raises(GenError, match="no multiple of its 5 heads"):
        MaskGITConfig(heads=5)
    with pytest.raises(GenError, match="sample it without guidance"):
        Network(SKIPS).apply(param_shapes(SKIPS), {}, method="null")


@pytest.mark.slow
def test_smoke_preset_learns_digits(tmp_path: Path) -> None:
    """Digits -> tokens of patches -> a MaskGIT that makes digits of the class that is asked for."""
    run, tokens, out = patch_tokenizer(tmp_path / "patches"), str(tmp_path / "tokens"), str(tmp_path / "maskgit")
    assert cli.main(["encode", run, "--data", "digits:train", "--out", tokens]) == 0
    words = ["train", "maskgit-smoke", "--data", tokens, "--tokenizer", run, "--outdir", out, "--engine.quiet", "true"]
    assert cli.main([*words, "--stages.0.steps", "700"]) == 0
    images = gen.load(out).sample(range(100), [i % 10 for i in range(100)])
    assert images.shape == (100, 8, 8, 1)
    assert agreement(images) > 0.6
