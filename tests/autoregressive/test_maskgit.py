"""MaskGIT's two networks: published sizes, initialisation, depth by scan, bad configurations; learning digits."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.autoregressive.maskgit import PUBLISHED, MaskGITConfig, MaskGITSkipConfig, maskgit
from gen.errors import GenError
from gen.nn.network import Network, count, param_shapes

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
    """Digits -> TiTok's tokens -> a MaskGIT that makes digits of the class that is asked for."""
    run, tokens = _digits(tmp_path)
    out = str(tmp_path / "maskgit")
    words = ["train", "maskgit-smoke", "--data", tokens, "--tokenizer", run, "--outdir", out, "--engine.quiet", "true"]
    _main(words)
    loaded = _load(out)
    images = loaded.sample(range(100), [i % 10 for i in range(100)])
    assert images.shape == (100, 8, 8, 1)
    assert _agreement(images) > 0.6


def _digits(folder: Path) -> tuple[str, str]:
    """A tokenizer's run, and the digits as its tokens."""
    run, tokens = str(folder / "titok"), str(folder / "tokens")
    _main(["train", "titok-smoke", "--outdir", run, "--engine.quiet", "true"])
    _main(["encode", run, "--data", "digits:train", "--out", tokens])
    return run, tokens


def _main(words: list[str]) -> None:
    from gen import cli

    assert cli.main(words) == 0


def _load(path: str) -> Any:
    import gen

    return gen.load(path)


def _agreement(images: np.ndarray) -> float:
    """The share of images (N, 8, 8, 1), of the classes 0 to 9 in turn, whose nearest digit is of their class."""
    from gen.data.sources import digits

    known = digits("all").arrays
    flat, real = (a.reshape(len(a), -1).astype(np.float32) for a in (images, known["image"]))
    nearest = np.square(flat[:, None] - real[None]).sum(-1).argmin(1)
    return float((known["label"][nearest] == np.arange(len(images)) % 10).mean())
