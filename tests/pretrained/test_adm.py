"""ADM's and improved-diffusion's networks: the published sizes, their names, and a forward pass driven by the names."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.backbones.edm_unet import DhariwalUNetConfig
from gen.errors import GenError
from gen.nn.network import Network, count, param_shapes
from gen.pretrained import adm
from gen.pretrained.systems import locate

# ADM's of guided-diffusion, and those of improved-diffusion's readme
GUIDED = DhariwalUNetConfig(out_channels=6, width=256, blocks=2, groups=32)
IMPROVED = DhariwalUNetConfig(
    out_channels=6, num_classes=0, width=128, blocks=3, attention=(16, 8), heads=4, groups=32, resample="convolution"
)
PUBLISHED = {
    "64": dataclasses.replace(GUIDED, width=192, blocks=3),
    "128": dataclasses.replace(GUIDED, size=128, mult=(1, 1, 2, 3, 4), heads=4),
    "256": dataclasses.replace(GUIDED, size=256, mult=(1, 1, 2, 2, 4, 4)),
    "256-uncond": dataclasses.replace(GUIDED, size=256, mult=(1, 1, 2, 2, 4, 4), num_classes=0),
    "512": dataclasses.replace(GUIDED, size=512, mult=(0.5, 1, 1, 2, 2, 4, 4)),
    "improved-64-cond": dataclasses.replace(IMPROVED, num_classes=1000, width=192),
    "improved-64": IMPROVED,
    "improved-cifar10": dataclasses.replace(IMPROVED, size=32, mult=(1, 2, 2, 2), dropout=0.3),
    "improved-lsun": dataclasses.replace(
        IMPROVED, size=256, mult=(1, 1, 2, 2, 4, 4), blocks=2, attention=(16,), heads=1, adaptive=False
    ),
    "improved-pooled": dataclasses.replace(IMPROVED, resample="pooling"),
}
# parameters as stated in tables 4 and 5 of Dhariwal & Nichol 2021 and in the readme of improved-diffusion
STATED = {"64": "2.96e+08", "128": "4.22e+08", "256": "5.54e+08", "512": "5.59e+08", "improved-64-cond": "2.7e+08"}
FEW = ("64", "128", "512", "improved-cifar10", "improved-lsun", "improved-pooled")  # every option once
NAMES = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]


@pytest.mark.parametrize("name", NAMES)
def test_published_sizes(name: str) -> None:
    """Their parameter counts, and a name for every parameter."""
    config = PUBLISHED[name]
    shapes = param_shapes(config)
    if name in STATED:
        assert f"{count(shapes):.{STATED[name].index('e') - 1}g}" == STATED[name]
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    paths = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}
    assert {rule.ours for rule in adm.rules(config)} == paths
    made = adm.generator(config)
    assert made.nfe == 250
    assert made.denoiser.process.steps == (4000 if name.startswith("improved") and config.size <= 64 else 1000)
    quarter = ("improved-64", "improved-cifar10", "improved-pooled")
    assert made.denoiser.parameterization.scale == (0.25 if name in quarter else 1.0)


def official(config: DhariwalUNetConfig, new_order: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda s: (0.2 * rng.standard_normal(s.shape)).astype(s.dtype), param_shapes(config))
    return (adm.NEW_IMPORTER if new_order else adm.IMPORTER).save(config, drawn)


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_tell_the_configuration(name: str) -> None:
    """At a quarter of the width; what comes back is what was read."""
    config = dataclasses.replace(PUBLISHED[name], width=64, blocks=1, dropout=0.0)
    weights = official(config, name == "64")
    assert locate(None, weights).importer is adm.IMPORTER
    importer = adm.NEW_IMPORTER if name == "64" else adm.IMPORTER
    found, params, report = importer.load(weights)
    assert found == config
    assert report.clean
    back = importer.save(found, params)
    assert back.keys() == weights.keys()
    for key, array in weights.items():
        np.testing.assert_array_equal(back[key], array, err_msg=key)


def test_unknown_levels_need_a_size() -> None:
    weights = official(DhariwalUNetConfig(32, out_channels=3, width=32, mult=(1, 1), blocks=1, groups=32), False)
    with pytest.raises(GenError, match=r"level widths \[32, 32\] were not published; give the image size"):
        adm.IMPORTER.infer(weights)


class Reference:
    """The U-Net as its state dict spells it: each part of a block is known by the names it has. NCHW."""

    def __init__(self, weights: dict[str, np.ndarray], heads: int, new_order: bool) -> None:
        self.weights = {name: jnp.asarray(array) for name, array in weights.items()}
        self.heads, self.new_order = heads, new_order

    def __call__(self, x: jax.Array, t: jax.Array, label: jax.Array | None) -> jax.Array:
        width = self.weights["time_embed.0.weight"].shape[1]
        angles = t[:, None] * np.exp(-np.log(10000.0) * np.arange(width // 2) / (width // 2))
        e = self.dense("time_embed.0", jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1))
        e = self.dense("time_embed.2", jax.nn.silu(e))
        self.emb = e if label is None else e + self.weights["label_emb.weight"][label]
        skips = []
        for i in range(self.number("input_blocks")):
            x = self.block(f"input_blocks.{i}", x)
            skips.append(x)
        x = self.block("middle_block", x)
        for i in range(self.number("output_blocks")):
            x = self.block(f"output_blocks.{i}", jnp.concatenate([x, skips.pop()], axis=1))
            if not self.has(f"input_blocks.{len(skips)}"):  # a level that ends without weights
                x = x.repeat(2, 2).repeat(2, 3)
        return self.conv("out.2", jax.nn.silu(self.norm("out.0", x)), 1)

    def has(self, prefix: str) -> bool:
        return any(n.startswith(f"{prefix}.") for n in self.weights)

    def number(self, prefix: str) -> int:
        """How many numbers follow a prefix."""
        return 1 + max(int(n[len(prefix) + 1 :].split(".")[0]) for n in self.weights if n.startswith(f"{prefix}."))

    def block(self, name: str, x: jax.Array) -> jax.Array:
        if not self.has(name):
            return x.reshape(*x.shape[:2], x.shape[2] // 2, 2, x.shape[3] // 2, 2).mean((3, 5))
        decoder, last = name.startswith("output"), self.number(name) - 1
        for i in range(last + 1):
            part = f"{name}.{i}"
            if f"{part}.op.weight" in self.weights:
                x = self.conv(f"{part}.op", x, 2)
            elif f"{part}.conv.weight" in self.weights:
                x = self.conv(f"{part}.conv", x.repeat(2, 2).repeat(2, 3), 1)
            elif f"{part}.qkv.weight" in self.weights:
                x = self.attention(part, x)
            elif f"{part}.in_layers.0.weight" in self.weights:
                x = self.residual(part, x, up=decoder and i == last > 0)
            else:
                x = self.conv(part, x, 1)
        return x

    def residual(self, name: str, x: jax.Array, up: bool) -> jax.Array:
        h = jax.nn.silu(self.norm(f"{name}.in_layers.0", x))
        if up:
            h, x = (a.repeat(2, 2).repeat(2, 3) for a in (h, x))
        h = self.conv(f"{name}.in_layers.2", h, 1)
        e = self.dense(f"{name}.emb_layers.1", jax.nn.silu(self.emb))[:, :, None, None]
        if e.shape[1] == h.shape[1]:
            h = self.norm(f"{name}.out_layers.0", h + e)
        else:
            scale, shift = jnp.split(e, 2, axis=1)
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        skip = self.conv(f"{name}.skip_connection", x, 1) if f"{name}.skip_connection.weight" in self.weights else x
        return skip + self.conv(f"{name}.out_layers.3", jax.nn.silu(h), 1)

    def attention(self, name: str, x: jax.Array) -> jax.Array:
        b, c, h, w = x.shape
        kernel, bias = self.weights[f"{name}.qkv.weight"][..., 0], self.weights[f"{name}.qkv.bias"]
        qkv = jnp.einsum("oc,bcn->bon", kernel, self.norm(f"{name}.norm", x).reshape(b, c, h * w)) + bias[:, None]
        if self.new_order:
            q, k, v = (part.reshape(b, self.heads, -1, h * w) for part in jnp.split(qkv, 3, axis=1))
        else:
            q, k, v = jnp.split(qkv.reshape(b, self.heads, -1, h * w), 3, axis=2)
        weight = jax.nn.softmax(jnp.einsum("bhcn,bhcm->bhnm", q, k) / np.sqrt(q.shape[2]))
        a = jnp.einsum("bhnm,bhcm->bhcn", weight, v).reshape(b, c, h * w)
        kernel, bias = self.weights[f"{name}.proj_out.weight"][..., 0], self.weights[f"{name}.proj_out.bias"]
        return x + (jnp.einsum("oc,bcn->bon", kernel, a) + bias[:, None]).reshape(x.shape)

    def dense(self, name: str, x: jax.Array) -> jax.Array:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def conv(self, name: str, x: jax.Array, stride: int) -> jax.Array:
        kernel, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        pad = kernel.shape[-1] // 2
        return (
            jax.lax.conv(jnp.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad))), kernel, (stride,) * 2, "VALID")
            + (bias[:, None, None])
        )

    def norm(self, name: str, x: jax.Array) -> jax.Array:
        grouped = x.reshape(x.shape[0], 32, -1)
        centred = grouped - grouped.mean(2, keepdims=True)
        x = (centred / jnp.sqrt(jnp.square(centred).mean(2, keepdims=True) + 1e-5)).reshape(x.shape)
        return x * self.weights[f"{name}.weight"][:, None, None] + self.weights[f"{name}.bias"][:, None, None]


TINY = DhariwalUNetConfig(8, out_channels=6, num_classes=3, width=32, mult=(1, 2), blocks=1, attention=(4,), groups=32)


@pytest.mark.parametrize(
    ("changes", "new_order"),
    [
        ({"resample": "convolution", "heads": 4}, False),
        ({"resample": "convolution", "heads": 1, "adaptive": False, "num_classes": 0, "out_channels": 3}, False),
        ({"resample": "convolution", "head_width": 16}, True),
        ({"resample": "pooling", "heads": 4}, False),
    ],
)
def test_forward_follows_the_names(changes: dict[str, object], new_order: bool) -> None:
    config = dataclasses.replace(TINY, **changes)
    weights = official(config, new_order)
    importer = adm.NEW_IMPORTER if new_order else adm.IMPORTER
    options = {"size": 8, "head_width": config.head_width, "heads": config.heads}
    found, params, _ = importer.load(weights, importer.infer(weights, **options))
    assert found == config
    x, t = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), jnp.array([3.0, 700.0])
    label = jnp.array([0, 2]) if config.num_classes else None
    cond = {} if label is None else {"label": label}
    ours = jax.jit(lambda p: Network(config)(p, x, (t,), cond)[0])(params)
    heads = config.heads or 64 // config.head_width
    expected = jax.jit(Reference(weights, heads, new_order))(x.transpose(0, 3, 1, 2), t, label)
    np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
