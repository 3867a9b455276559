"""ResNet-50: its published size, and batch norms folded as they are defined."""

import jax
import numpy as np
import pytest

from gen.errors import GenError
from gen.features.resnet import ResNet, conv_shapes, resnet
from gen.pretrained.resnet import _official, fold


def test_published_size() -> None:
    folded = sum(int(np.prod(shape)) for shape in ResNet().shapes().values())
    norms = sum(shape[-1] for shape in conv_shapes().values())  # a bias of ours is a gain and a bias of theirs
    assert folded + norms == 25_557_032


def test_batch_norms_are_folded() -> None:
    rng, depths = np.random.default_rng(0), (1,)
    weights = {"fc.weight": rng.normal(size=(5, 256)), "fc.bias": np.zeros(5)}
    for layer, (h, w, inputs, outputs) in conv_shapes(depths).items():
        conv, norm = _official(layer)
        weights[f"{conv}.weight"] = rng.normal(size=(outputs, inputs, h, w)) / np.sqrt(h * w * inputs)
        for part in ("weight", "bias", "running_mean", "running_var"):
            weights[f"{norm}.{part}"] = rng.uniform(0.5, 1.5, outputs)
        weights[f"{norm}.num_batches_tracked"] = np.zeros(())
    weights = {name: np.asarray(array, np.float32) for name, array in weights.items()}
    params = fold(weights, depths)
    x = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
    found = jax.jit(resnet)(params, x)

    def layer(name: str, x: np.ndarray, stride: int = 1) -> np.ndarray:
        conv, norm = _official(name)
        kernel = weights[f"{conv}.weight"]
        pad = kernel.shape[2] // 2
        y = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), ((pad, pad),) * 2, dimension_numbers=("NHWC", "OIHW", "NHWC")
        )
        gain, bias, mean, var = (weights[f"{norm}.{p}"] for p in ("weight", "bias", "running_mean", "running_var"))
        return np.asarray((y - mean) / np.sqrt(var + 1e-5) * gain + bias)

    y = np.maximum(layer("stem", x, 2), 0)
    padded = np.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    y = np.max([padded[:, i : i + 7 : 2, j : j + 7 : 2] for i in range(3) for j in range(3)], axis=0)
    inner = np.maximum(layer("stage0/block0/conv1", y), 0)
    inner = layer("stage0/block0/conv3", np.maximum(layer("stage0/block0/conv2", inner), 0))
    expected = np.maximum(inner + layer("stage0/block0/skip", y), 0).mean((1, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(GenError, match=r"not ResNet-50: fc\.bias is missing"):
        fold({name: array for name, array in weights.items() if name != "fc.bias"}, depths)
