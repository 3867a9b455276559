"""The pixel-space U-Nets of EDM: SongUNet (DDPM++, NCSN++ and their skip variants) and DhariwalUNet (ADM).

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models"; the architectures are those of
Song et al. 2021 (score SDE) and Dhariwal & Nichol 2021. A configuration first writes down its layers as a plan of
`Layer` rows; the module is built, run and imported by that plan.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gen.diffusion.backbones.backbone import Call, Output, UNetBackbone, UNetConfig
from gen.diffusion.backbones.edm_blocks import BOX, Conv, GroupNorm, Style, UNetBlock, law_of
from gen.diffusion.backbones.edm_embeddings import DhariwalMapping, SongMapping
from gen.errors import GenError
from gen.training.sharding import constrain

__all__ = ["DhariwalUNetConfig", "Layer", "SongUNetConfig", "UNet"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One row of a network's plan.

    Attributes:
      name: its official name, such as "16x16_block0".
      kind: what it is and how it is wired in; see `_Walk.step`.
      inputs, outputs: channels; of a block that takes a skip, `inputs` counts it.
      takes_skip: the next skip is concatenated to the input.
    """

    name: str
    kind: Literal["conv", "block", "pool", "resample", "skip", "residual", "norm", "out"]
    inputs: int
    outputs: int
    up: bool = False
    down: bool = False
    attention: bool = False
    takes_skip: bool = False


@dataclasses.dataclass(frozen=True)
class _UNetConfig(UNetConfig):
    """What both families share.

    Attributes:
      size: height and width of the image; divisible by 2^(levels - 1). The network takes images of other sides that
        are, square or not; `attention` is counted from this size.
      channels, out_channels: of the image and of the output.
      num_classes: number of labels; the label num_classes stands for none of them (an all-zero class vector).
      augment: width of the augmentation vector; 0 for a network trained without.
      width: base number of channels.
      mult: factor on it at each level, finest first; a fraction where the product is whole (ADM's 1/2 at 512 px).
      emb: width of the conditioning vector, as a factor on `width`.
      blocks: residual blocks per level.
      attention: sizes of the feature maps that have self-attention.
      dropout: share of activations dropped in training (where PRNG keys are given as the condition "dropout").
      times: 1, or 2 for flow maps (CTM: own embedding layers, added in every block).
      dtype: compute type of the image path; parameters, norms and embeddings are float32.
      remat: what the backward pass recomputes: nothing, or every block.
    """

    size: int = 32
    channels: int = 3
    out_channels: int = 3
    num_classes: int = 0
    augment: int = 0
    width: int = 128
    mult: tuple[int | float, ...] = (2, 2, 2)
    emb: int = 4
    blocks: int = 4
    attention: tuple[int, ...] = (16,)
    dropout: float = 0.0
    times: Literal[1, 2] = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full"] = "none"

    def __post_init__(self) -> None:
        if not self.mult or min(self.size, self.width, self.blocks, *self.widths) < 1:
            raise GenError("a U-Net needs at least one level, block and channel; give positive numbers")
        if self.size % 2 ** (len(self.mult) - 1):
            raise GenError(
                f"image size {self.size} cannot be halved {len(self.mult) - 1} times; change the size or the levels"
            )
        if self.width % 2:
            raise GenError(f"U-Net width {self.width} is odd; its time embedding needs an even number")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(int(self.width * m) for m in self.mult)


# kind of a plan -> the layer that changes the resolution, where it is no residual block
_RESAMPLING: dict[str, Literal["conv", "pool"]] = {"convolution": "conv", "pooling": "pool"}


def _encoder(config: _UNetConfig, first: int, kind: str) -> tuple[Layer, ...]:
    """The plan from the image to the lowest resolution.

    Args:
      first: channels after the first convolution.
      kind: ``standard``, ``skip`` or ``residual`` (see `SongUNetConfig`), or ``convolution`` or ``pooling``: levels
        are halved and doubled by a convolution, or without weights, instead of by a residual block.
    """
    rows: list[Layer] = []
    width, aux = first, config.channels
    for level, outputs in enumerate(config.widths):
        size = config.size >> level
        name = f"{size}x{size}_"
        if level == 0:
            rows.append(Layer(name + "conv", "conv", config.channels, width))
        else:
            rows.append(Layer(name + "down", _RESAMPLING.get(kind, "block"), width, width, down=True))
            if kind == "skip":
                rows.append(Layer(name + "aux_down", "resample", aux, aux, down=True))
                rows.append(Layer(name + "aux_skip", "skip", aux, width))
            if kind == "residual":
                rows.append(Layer(name + "aux_residual", "residual", aux, width, down=True))
                aux = width
        for i in range(config.blocks):
            attention = size in config.attention
            rows.append(Layer(f"{name}block{i}", "block", width, outputs, attention=attention))
            width = outputs
    return tuple(rows)


def _decoder(config: _UNetConfig, skips: list[int], kind: str, every: bool) -> tuple[Layer, ...]:
    """The plan from the lowest resolution to the output.

    Args:
      skips: channels of the encoder's skips, in its order.
      every: attention in every block of a level that has it, not only in the last one.
    """
    rows: list[Layer] = []
    width, last = config.widths[-1], len(config.mult) - 1
    for level, outputs in reversed(list(enumerate(config.widths))):
        size = config.size >> level
        name = f"{size}x{size}_"
        if level == last:
            rows.append(Layer(name + "in0", "block", width, width, attention=True))
            rows.append(Layer(name + "in1", "block", width, width))
        else:
            rows.append(Layer(name + "up", _RESAMPLING.get(kind, "block"), width, width, up=True))
        for i in range(config.blocks + 1):
            attention = size in config.attention and (every or i == config.blocks)
            inputs, width = width + skips.pop(), outputs
            rows.append(Layer(f"{name}block{i}", "block", inputs, width, attention=attention, takes_skip=True))
        if kind == "skip" and level < last:
            rows.append(Layer(name + "aux_up", "resample", config.out_channels, config.out_channels, up=True))
        if kind == "skip" or level == 0:
            rows.append(Layer(name + "aux_norm", "norm", width, width))
            rows.append(Layer(name + "aux_conv", "out", width, config.out_channels))
    return tuple(rows)


def _skips(encoder: tuple[Layer, ...]) -> list[int]:
    """Channels of the skips: the outputs of the convolution and of every block."""
    return [row.outputs for row in encoder if row.kind in ("conv", "block", "pool")]


@dataclasses.dataclass(frozen=True)
class SongUNetConfig(_UNetConfig):
    """DDPM++ and NCSN++ of the score SDE paper, as EDM trains them. The defaults are CIFAR-10's DDPM++ (EDM's "vp").

    Further attributes:
      embedding: of the noise level: ``positional`` (DDPM++) or ``fourier`` with fixed random frequencies (NCSN++).
      noise: width of that embedding, as a factor on `width`.
      frequencies: standard deviation of the random frequencies; improved consistency training takes 0.02.
      encoder, decoder: ``standard``; ``residual`` (NCSN++) or ``skip`` feed the downsampled image into the encoder,
        ``skip`` sums an output of every level in the decoder.
      taps: resampling filter: (1, 1) for DDPM++, (1, 3, 3, 1) for NCSN++.
    """

    embedding: Literal["positional", "fourier"] = "positional"
    noise: int = 1
    frequencies: float = 16.0
    encoder: Literal["standard", "skip", "residual"] = "standard"
    decoder: Literal["standard", "skip"] = "standard"
    taps: tuple[int, ...] = BOX

    @property
    def style(self) -> Style:
        """Has additive conditioning, residual sums over sqrt(2), one attention head."""
        return Style(
            adaptive=False,
            skip_scale=math.sqrt(0.5),
            eps=1e-6,
            project=True,
            taps=self.taps,
            channels_per_head=0,
            dropout=self.dropout,
            law=("xavier-uniform", 1.0),
            zero=("xavier-uniform", 1e-5),
            qkv=("xavier-uniform", math.sqrt(0.2)),
            bias=0.0,
        )

    @property
    def plans(self) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
        """Gives the layers of encoder and decoder."""
        encoder = _encoder(self, self.width, self.encoder)
        return encoder, _decoder(self, _skips(encoder), self.decoder, every=False)

    def mapping(self, rngs: nnx.Rngs) -> nnx.Module:
        """Gives the embedding of time and conditions."""
        return SongMapping(self, rngs)

    def build(self, rngs: nnx.Rngs) -> "UNet":
        """Gives the module with freshly drawn parameters."""
        return UNet(self, rngs)


@dataclasses.dataclass(frozen=True)
class DhariwalUNetConfig(_UNetConfig):
    """ADM of Dhariwal & Nichol 2021, as EDM trains it. The defaults are ImageNet-64's.

    Levels with fewer channels than an attention head silently have no attention, as in the official code.

    Further attributes:
      head_width: channels per attention head.
      heads: attention heads of every block instead (ADM's at 128 px and improved-diffusion's have 4); 0 for none such.
      groups: of the group norms; 0 for EDM's min(32, C // 4), 32 for guided-diffusion's own networks.
      adaptive: conditioning scales and shifts, or is added (improved-diffusion's LSUN networks).
      resample: levels are halved and doubled by residual ``blocks``, by ``convolution`` (improved-diffusion), or by
        ``pooling``: means of 2 x 2 pixels, and their repetition (both codes without ``conv_resample``).
    """

    size: int = 64
    num_classes: int = 1000
    width: int = 192
    mult: tuple[int | float, ...] = (1, 2, 3, 4)
    blocks: int = 3
    attention: tuple[int, ...] = (32, 16, 8)
    head_width: int = 64
    heads: int = 0
    groups: int = 0
    adaptive: bool = True
    resample: Literal["blocks", "convolution", "pooling"] = "blocks"

    @property
    def style(self) -> Style:
        """Has scale-and-shift conditioning, plain residual sums, zero last layers."""
        return Style(
            adaptive=self.adaptive,
            groups=self.groups,
            channels_per_head=self.head_width,
            head_count=self.heads,
            dropout=self.dropout,
        )

    @property
    def plans(self) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
        """Gives the layers of encoder and decoder."""
        kind = "standard" if self.resample == "blocks" else self.resample
        encoder = _encoder(self, self.widths[0], kind)
        return encoder, _decoder(self, _skips(encoder), kind, every=True)

    def mapping(self, rngs: nnx.Rngs) -> nnx.Module:
        """Gives the embedding of time and conditions."""
        return DhariwalMapping(self, rngs)

    def build(self, rngs: nnx.Rngs) -> "UNet":
        """Gives the module with freshly drawn parameters."""
        return UNet(self, rngs)


class UNet(UNetBackbone):
    """The network of a `SongUNetConfig` or `DhariwalUNetConfig`: embedding of the conditions, encoder, decoder.

    Further conditions: ``augment`` (B, augment) float, optional; ``dropout`` (B,) PRNG keys, given in training only.
    Features: official layer names such as ``enc.16x16_block0`` and ``dec.8x8_in0``, their outputs (B, H, W, C) float32.
    Controls: ``skips`` (n,) factors on the n skips, in the order in which the decoder takes them (deepest first;
    Skip-Tuning); ``keep`` (m,) bool, which of the m residual branches and attentions run, numbered in the order of the
    layers, a block's branch before its attention (AutoDiffusion).
    """

    title = "U-Net"

    def __init__(self, config: Any, rngs: nnx.Rngs) -> None:
        self.config = config
        encoder, decoder = config.plans
        self.map = config.mapping(rngs)
        self.enc = nnx.Dict({row.name: self._layer(row, rngs) for row in encoder})
        self.dec = nnx.Dict({row.name: self._layer(row, rngs) for row in decoder})

    def _layer(self, row: Layer, rngs: nnx.Rngs) -> nnx.Module:
        config, style = self.config, self.config.style
        dtype = jnp.dtype(config.dtype)
        if row.kind == "norm":
            return GroupNorm(row.outputs, style)
        if row.kind == "block":
            heads = style.heads(row.outputs) if row.attention else 0
            options: dict[str, Any] = {"up": row.up, "down": row.down, "heads": heads, "times": config.times}
            return UNetBlock(
                row.inputs, row.outputs, config.width * config.emb, style, dtype=dtype, rngs=rngs, **options
            )
        kernel = {"conv": 3, "pool": 0, "resample": 0, "skip": 1, "residual": 3, "out": 3}[row.kind]
        strided = row.kind == "conv" and row.down
        return Conv(
            row.inputs,
            row.outputs,
            kernel,
            up=row.up,
            down=row.down and not strided,
            stride=2 if strided else 1,
            taps=style.taps,
            fused=row.kind == "residual",
            law=law_of(*(style.zero if row.kind == "out" else style.law)),
            bias=style.bias,
            dtype=dtype,
            rngs=rngs,
        )

    def features(self) -> list[str]:
        """Gives the layers of encoder and decoder."""
        return [
            f"{side}.{row.name}" for side, plan in zip(("enc", "dec"), self.config.plans, strict=True) for row in plan
        ]

    def controls(self) -> dict[str, tuple[int, ...]]:
        """Gives the controls ``skips`` and ``keep``."""
        encoder, decoder = self.config.plans
        blocks = [row for row in (*encoder, *decoder) if row.kind == "block"]
        attentions = sum(row.attention and self.config.style.heads(row.outputs) > 0 for row in blocks)
        return {"skips": (len(_skips(encoder)),), "keep": (len(blocks) + attentions,)}

    def forward(self, call: Call) -> Output:
        """Does what `Backbone.forward` says."""
        walk = _Walk(self, call)
        features: dict[str, jax.Array] = {}
        for side, plan in zip(("enc", "dec"), self.config.plans, strict=True):
            for row in plan:
                out = walk.step(row, getattr(self, side)[row.name])
                if f"{side}.{row.name}" in call.taps:
                    features[f"{side}.{row.name}"] = out.astype(jnp.float32)
                    if call.stop and len(features) == len(set(call.taps)):
                        return features[f"{side}.{row.name}"], features
            if side == "enc":
                walk.aux, walk.encoding = None, False
        return walk.aux.astype(jnp.float32), features


class _Walk:
    """The state of one pass: the running image, the skips, and the image or output beside them (`aux`)."""

    def __init__(self, net: UNet, call: Call) -> None:
        self.remat, self.keys = net.config.remat, call.cond.get("dropout")
        self.embs = jax.tree.map(constrain, net.map(call.times, call.cond))
        self.scales, self.keep = call.controls.get("skips"), call.controls.get("keep")
        self.x: Any = call.x
        self.aux: Any = call.x
        self.skips: list[jax.Array] = []
        self.taken = self.blocks = self.parts = 0
        self.encoding = True

    def step(self, row: Layer, layer: Any) -> jax.Array:
        """Runs one layer and wires its output in; returns the layer's own output."""
        match row.kind:
            case "conv" | "block" | "pool":
                self.x = out = self._block(row, layer) if row.kind == "block" else layer(self.x)
                if self.encoding:
                    self.skips.append(out)
            case "resample":
                self.aux = out = layer(self.aux)
            case "skip":
                out = layer(self.aux)
                self.x = self.skips[-1] = self.x + out
            case "residual":
                out = layer(self.aux)
                self.x = self.skips[-1] = self.aux = (self.x + out) * math.sqrt(0.5)
            case "norm":
                self.normed = out = layer(self.x)
            case "out":
                out = layer(jax.nn.silu(self.normed))
                self.aux = out if self.aux is None else self.aux + out
        return out

    def _block(self, row: Layer, layer: UNetBlock) -> jax.Array:
        x = self.x
        if row.takes_skip:
            skip = self.skips.pop()
            if self.scales is not None:
                skip = skip * self.scales[self.taken].astype(skip.dtype)
            x = jnp.concatenate([x, skip], axis=-1)
            self.taken += 1
        keys = self.keys if self.keys is None else jax.vmap(jax.random.fold_in, (0, None))(self.keys, self.blocks)
        self.blocks += 1
        keep = None if self.keep is None else (self.keep[self.parts], self.keep[self.parts + bool(layer.heads)])
        self.parts += 1 + bool(layer.heads)
        call = jax.checkpoint(layer.__call__) if self.remat == "full" else layer
        return constrain(call(x, self.embs, keys, keep))
