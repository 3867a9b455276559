"""ConvNeXt: the second version's golden numbers, and the first one's names, sizes and block."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from gen.errors import GenError
from gen.features.convnext import SMALL, ConvNeXt, convnext
from gen.pretrained.convnext import convert, fold
from tests.parity.conftest import Fixture, present

GOLDEN = [Fixture(path) for path in present() if path.name.startswith("pmf-perceptual")]


@pytest.mark.parametrize("fx", GOLDEN, ids=str)
def test_second_version(fx: Fixture) -> None:
    params = fold(fx.weights)
    with jax.default_matmul_precision("highest"):
        (a, maps), (b, _) = (jax.jit(convnext)(params, fx.io[name]) for name in ("crop_a", "crop_b"))
    fx.close(maps[0], "after_stage_0", rtol=5e-5, atol=0.0)
    fx.close(a, "feat_a", rtol=5e-5, atol=0.0)
    fx.close(b, "feat_b", rtol=5e-5, atol=0.0)
    fx.close(jnp.square(a - b).sum(-1), "distance", rtol=5e-5, atol=0.0)


def official(depths: tuple[int, ...], widths: tuple[int, ...], classes: int) -> dict[str, np.ndarray]:
    """A state dict of torchvision's names with random arrays."""
    rng = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}

    def layer(name: str, *shape: int) -> None:
        found[f"{name}.weight"] = rng.normal(size=shape).astype(np.float32) / np.sqrt(np.prod(shape[1:]) or 1)
        found[f"{name}.bias"] = rng.normal(size=shape[:1]).astype(np.float32)

    layer("features.0.0", widths[0], 3, 4, 4)
    layer("features.0.1", widths[0])
    for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        if i:
            layer(f"features.{2 * i}.0", widths[i - 1])
            layer(f"features.{2 * i}.1", width, widths[i - 1], 2, 2)
        for j in range(depth):
            block = f"features.{2 * i + 1}.{j}"
            layer(f"{block}.block.0", width, 1, 7, 7)
            layer(f"{block}.block.2", width)
            layer(f"{block}.block.3", 4 * width, width)
            layer(f"{block}.block.5", width, 4 * width)
            found[f"{block}.layer_scale"] = rng.normal(size=(width, 1, 1)).astype(np.float32)
    layer("classifier.0", widths[-1])
    layer("classifier.2", classes, widths[-1])
    return found


def test_published_size_and_names() -> None:
    weights = official(*SMALL, 1000)
    assert sum(array.size for array in weights.values()) == 50_223_688
    assert sum(int(np.prod(shape)) for shape in ConvNeXt().shapes().values()) == 50_223_688


def test_names_of_the_first_version(tmp_path: Path) -> None:
    weights = official((1, 2), (4, 8), 5)
    params = fold(weights)
    assert set(params) == {"stem", "stem_norm", "stage0", "down1", "stage1", "norm", "classes"}
    whole = fold(weights)
    for block in (params["stage0"]["block0"], *params["stage1"].values()):
        block["scale"] = np.zeros_like(block["scale"])
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    _, (first, _) = convnext(params, x)  # blocks of scale 0 change nothing
    _, (other, _) = convnext(whole, x)
    assert np.abs(np.asarray(other) - np.asarray(first)).max() > 0.1
    stem = jnp.einsum("bhiwjc,ijcd->bhwd", x.reshape(2, 2, 4, 2, 4, 3), params["stem"]["kernel"])
    stem = stem + params["stem"]["bias"]
    centred = stem - stem.mean(-1, keepdims=True)
    normed = centred / jnp.sqrt(stem.var(-1, keepdims=True) + 1e-6)
    expected = normed * params["stem_norm"]["scale"] + params["stem_norm"]["bias"]
    np.testing.assert_allclose(first, expected, rtol=1e-4, atol=1e-5)
    save_file(weights, tmp_path / "small.safetensors")
    with pytest.raises(GenError, match="does not hold the convnext-small network"):
        convert(tmp_path / "small.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    with pytest.raises(GenError, match="no ConvNeXt: 'heads"):
        fold({"heads.weight": np.zeros((2, 2))})
