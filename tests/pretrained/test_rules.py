"""The import table: exact both ways, and nothing missing, left over or misshapen goes unnoticed."""

import jax
import numpy as np
import pytest

from gen.errors import GenError
from gen.nn.network import param_shapes
from gen.pretrained.rules import (
    CONV,
    LINEAR,
    Computed,
    Importer,
    Rule,
    Rules,
    convolution,
    depth_of,
    joined,
    linear,
    load,
    patches,
    save,
)
from gen.pretrained.systems import SYSTEMS, locate, system
from gen.tokenizers.kl_vae import KLVAEConfig

RULES: Rules = [
    Computed("table", np.arange(3.0, dtype=np.float32)),
    *linear("blocks.{i}.fc", "blocks/fc"),
    Rule(("blocks.{i}.q.weight", "blocks.{i}.k.weight"), "blocks/qk", joined(2)),
    *convolution("conv", "conv", bias=False),
    Rule("patch.weight", "patch", patches(2)),
]
SHAPES = {
    "blocks": {
        "fc": {"kernel": (2, 4, 3), "bias": (2, 3)},
        "qk": (2, 4, 6),
    },
    "conv": {"kernel": (3, 3, 5, 6)},
    "patch": (20, 7),
}
OFFICIAL = {
    "table": (3,),
    **{f"blocks.{i}.fc.weight": (3, 4) for i in range(2)},
    **{f"blocks.{i}.fc.bias": (3,) for i in range(2)},
    **{f"blocks.{i}.{n}.weight": (3, 4) for i in range(2) for n in "qk"},
    "conv.weight": (6, 5, 3, 3),
    "patch.weight": (7, 5, 2, 2),
}


@pytest.fixture
def shapes():
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple))


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {k: rng.normal(size=s).astype(np.float32) for k, s in OFFICIAL.items()}
    return arrays | {"table": np.arange(3.0, dtype=np.float32)}


def test_round_trip_is_exact(weights, shapes) -> None:
    params, report = load(RULES, weights, shapes)
    assert sorted(report.matched) == sorted(weights)
    assert str(report) == f"{len(weights)} matched"
    assert jax.tree.map(np.shape, params) == SHAPES
    back = save(RULES, params)
    assert back.keys() == weights.keys()
    for name in weights:
        np.testing.assert_array_equal(back[name], weights[name], err_msg=name)


def test_layouts(weights, shapes) -> None:
    params, _ = load(RULES, weights, shapes)
    x = np.random.default_rng(1).normal(size=(4,)).astype(np.float32)
    np.testing.assert_allclose(x @ params["blocks"]["fc"]["kernel"][1], weights["blocks.1.fc.weight"] @ x, rtol=1e-5)
    both = np.concatenate([weights["blocks.0.q.weight"] @ x, weights["blocks.0.k.weight"] @ x])
    np.testing.assert_allclose(x @ params["blocks"]["qk"][0], both, rtol=1e-5)
    # one patch (rows, columns, channels), flattened, through the dense layer = the convolution at that place
    patch = np.random.default_rng(2).normal(size=(2, 2, 5)).astype(np.float32)
    expected = np.einsum("hwc,dchw->d", patch, weights["patch.weight"])
    np.testing.assert_allclose(patch.reshape(-1) @ params["patch"], expected, rtol=1e-4)
    image = np.random.default_rng(3).normal(size=(1, 3, 3, 5)).astype(np.float32)
    dims = ("NHWC", "HWIO", "NHWC")
    ours = jax.lax.conv_general_dilated(image, params["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=dims)
    np.testing.assert_allclose(ours.ravel(), np.einsum("nhwc,dchw->d", image, weights["conv.weight"]), rtol=1e-4)


@pytest.mark.parametrize(("transform", "shape"), [(LINEAR, (3, 4)), (CONV, (2, 3, 5, 7)), (patches(3), (4, 2, 3, 3))])
def test_transforms_are_bijections(transform, shape) -> None:
    array = np.random.default_rng(0).normal(size=shape)
    (back,) = transform.save(transform.load(array))
    np.testing.assert_array_equal(back, array)


def test_everything_that_does_not_fit_is_named(weights, shapes) -> None:
    del weights["blocks.1.fc.bias"]
    weights["extra.ema"] = np.zeros(1)
    weights["conv.weight"] = np.zeros((6, 5, 3, 1), np.float32)
    weights["patch.weight"] = np.zeros((7,), np.float32)
    weights["table"] = weights["table"] + 1e-3
    shapes = {**shapes, "head": jax.ShapeDtypeStruct((1,), np.float32)}
    with pytest.raises(GenError) as caught:
        load(RULES, weights, shapes)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "1 missing (blocks.1.fc.bias)",
        "1 unexpected (extra.ema)",
        "1 fresh (head)",
        "3 misshaped (table with other values",
        "conv.weight (6, 5, 3, 1) for ours (3, 3, 5, 6)",
        "patch.weight (7,)",
    ):
        assert part in message, message


def test_named_exceptions_pass(weights, shapes) -> None:
    weights["extra.ema"] = np.zeros(1)
    shapes = {**shapes, "head": {"bias": jax.ShapeDtypeStruct((2,), np.float32)}}
    params, report = load(RULES, weights, shapes, ignore=("extra.*",), fresh={"head/bias": np.ones(2)})
    assert report.ignored == ["extra.ema"]
    assert "1 ignored (extra.ema)" in str(report)
    np.testing.assert_array_equal(params["head"]["bias"], [1.0, 1.0])
    with pytest.raises(GenError, match="no place for head/bias"):
        save(RULES, params)


def test_wrong_depth_is_seen(weights, shapes) -> None:
    assert depth_of(weights, "blocks.{i}.fc.weight") == 2
    assert depth_of(weights, "layers.{i}.fc.weight") == 0
    longer = {k.replace("blocks.1", "blocks.2"): v for k, v in weights.items()} | weights
    with pytest.raises(GenError, match="4 unexpected"):
        load(RULES, longer, shapes)


def test_constants_may_be_optional(weights, shapes) -> None:
    del weights["table"]
    with pytest.raises(GenError, match="1 missing"):
        load(RULES, weights, shapes)
    optional = [Computed("table", np.arange(3.0), optional=True), *RULES[1:]]
    load(optional, weights, shapes)


def test_save_needs_every_parameter(weights, shapes) -> None:
    params, _ = load(RULES, weights, shapes)
    del params["patch"]
    with pytest.raises(GenError, match="lack 'patch'"):
        save(RULES, params)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_is_found_by_name(name: str) -> None:
    importer = system(name)
    assert isinstance(importer, Importer)
    assert importer.name == name
    if importer.signature:  # without one, files look like another system's
        assert locate(None, dict.fromkeys(importer.signature, np.zeros(1))).importer.name == name


@pytest.mark.parametrize("name", ["sd-vae", "kl-vae"])
@pytest.mark.parametrize("changes", [{"middle_attention": False}, {"quant_conv": False, "inner": 4}])
def test_autoencoders_without_optional_layers_are_found(name: str, changes: dict) -> None:
    config = KLVAEConfig((8, 8, 3), width=4, mult=(1, 2), blocks=1, channels=4, groups=2, **changes)
    weights = system(name).save(config, jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), param_shapes(config)))
    assert locate(None, weights).importer.name == name
    assert locate(None, weights).importer.infer(weights, size=8, groups=2) == config


def test_unknown_systems() -> None:
    with pytest.raises(GenError, match="did you mean 'dit'"):
        system("ditt")
    with pytest.raises(GenError, match="none of the known systems"):
        locate(None, {"a": np.zeros(1)})
