"""The names that published files give to the blocks of `gen.tokenizers.towers`, as a table of rules per naming."""

import dataclasses
from collections.abc import Iterator

from gen.errors import GenError
from gen.pretrained.rules import CONV, SAME, Arrays, Rule, Transform, convolution, depth_of, parted
from gen.tokenizers.towers import TowerConfig

__all__ = ["COMPVIS", "DIFFUSERS", "DIFFUSERS_OLD", "LLAMAGEN", "VAR", "Naming", "norm", "tower_mult", "tower_rules"]

# a dense layer (O, I) as our 1x1 convolution (1, 1, I, O)
_DENSE = Transform(lambda a: a.T[None, None], lambda a: (a[0, 0].T,))


@dataclasses.dataclass(frozen=True)
class Naming:
    """How a family of files calls the parts of a tower.

    Attributes:
      down, up: a level of the encoder and of the decoder, ``{}`` for its number.
      as_run: whether the decoder's levels are numbered as they run, from the coarsest; else from the finest.
      block, attention: within a level, before their number.
      downsample, upsample: the resampling convolutions within a level.
      middle: the block, attention and block at the lowest resolution.
      norm_out: the last norm.
      shortcut: within a block whose channels change.
      layers: of an attention: its norm, q, k, v and output, or its norm, q with k and v as one, and output.
      kernel: layout of an attention's weights.
    """

    down: str = "down.{}"
    up: str = "up.{}"
    as_run: bool = False
    block: str = "block"
    attention: str = "attn"
    downsample: str = "downsample.conv"
    upsample: str = "upsample.conv"
    middle: tuple[str, str, str] = ("mid.block_1", "mid.attn_1", "mid.block_2")
    norm_out: str = "norm_out"
    shortcut: str = "nin_shortcut"
    layers: tuple[str, ...] = ("norm", "q", "k", "v", "proj_out")
    kernel: Transform = CONV

    def level(self, side: str, i: int, levels: int) -> str:
        """Gives the official name of level i (0 = finest) of ``encoder`` or ``decoder``."""
        name = self.down if side == "encoder" else self.up
        return f"{side}.{name.format(levels - 1 - i if side == 'decoder' and self.as_run else i)}"


COMPVIS = Naming()
DIFFUSERS = Naming(
    down="down_blocks.{}",
    up="up_blocks.{}",
    as_run=True,
    block="resnets",
    attention="attentions",
    downsample="downsamplers.0.conv",
    upsample="upsamplers.0.conv",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    norm_out="conv_norm_out",
    shortcut="conv_shortcut",
    layers=("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
    kernel=_DENSE,
)
DIFFUSERS_OLD = dataclasses.replace(DIFFUSERS, layers=("group_norm", "query", "key", "value", "proj_attn"))
LLAMAGEN = Naming(
    down="conv_blocks.{}", up="conv_blocks.{}", as_run=True, block="res", middle=("mid.0", "mid.1", "mid.2")
)
VAR = Naming(layers=("norm", "qkv", "proj_out"))


def tower_rules(config: TowerConfig, side: str, naming: Naming) -> list[Rule]:
    """Gives the rules of one tower, "encoder" or "decoder", which stands under that name on both sides."""
    rows = convolution(f"{side}.conv_in", f"{side}/conv_in")
    for kind, official, ours in _parts(config, side, naming):
        rows += _part(kind, official, ours, naming)
    rows += norm(f"{side}.{naming.norm_out}", f"{side}/norm_out")
    return rows + convolution(f"{side}.conv_out", f"{side}/conv_out")


def _parts(config: TowerConfig, side: str, naming: Naming) -> Iterator[tuple[str, str, str]]:
    """(kind, official name, our path) of every residual block, attention and resampling of one tower."""
    encoder, levels = side == "encoder", len(config.widths)
    tower, attended = ("down", config.attention) if encoder else ("up", config.decoder_attention)
    for i in range(levels):
        place, ours = naming.level(side, i, levels), f"{side}/{tower}/level{i}"
        before = config.widths[max(i - 1, 0) if encoder else min(i + 1, levels - 1)]
        before = config.width if encoder and i == 0 else before
        for j in range(config.blocks + (not encoder)):
            changes = j == 0 and before != config.widths[i]
            yield "changing" if changes else "residual", f"{place}.{naming.block}.{j}", f"{ours}/res/block{j}"
            if i in attended:
                yield "attention", f"{place}.{naming.attention}.{j}", f"{ours}/attn/block{j}"
        if i < levels - 1 if encoder else i > 0:
            yield "convolution", f"{place}.{naming.downsample if encoder else naming.upsample}", f"{ours}/conv"
    first, attention, second = (f"{side}.{name}" for name in naming.middle)
    yield "residual", first, f"{side}/mid/block_1"
    if config.middle_attention:
        yield "attention", attention, f"{side}/mid/attn_1"
    yield "residual", second, f"{side}/mid/block_2"


def _part(kind: str, official: str, ours: str, naming: Naming) -> list[Rule]:
    if kind == "convolution":
        return convolution(official, ours)
    rows: list[Rule] = []
    if kind == "attention":
        first, *layers, out = naming.layers
        own = [f"{ours}/{name}" for name in ("q", "k", "v")]
        rows += norm(f"{official}.{first}", f"{ours}/norm")
        if len(layers) == 1:
            for what, leaf, transform in (("weight", "kernel", naming.kernel), ("bias", "bias", SAME)):
                paths = tuple(f"{path}/{leaf}" for path in own)
                rows.append(Rule(f"{official}.{layers[0]}.{what}", paths, parted(3, transform)))
            layers, own = [], []
        for name, path in zip((*layers, out), (*own, f"{ours}/proj"), strict=True):
            rows.append(Rule(f"{official}.{name}.weight", f"{path}/kernel", naming.kernel))
            rows.append(Rule(f"{official}.{name}.bias", f"{path}/bias"))
        return rows
    for i in (1, 2):
        rows += norm(f"{official}.norm{i}", f"{ours}/norm{i}")
        rows += convolution(f"{official}.conv{i}", f"{ours}/conv{i}")
    if kind == "changing":
        rows += convolution(f"{official}.{naming.shortcut}", f"{ours}/shortcut")
    return rows


def norm(official: str, ours: str) -> list[Rule]:
    """Gives the rules of a norm with weight and bias."""
    return [Rule(f"{official}.weight", f"{ours}/scale"), Rule(f"{official}.bias", f"{ours}/bias")]


def tower_mult(weights: Arrays, side: str, naming: Naming, *, width: int, what: str) -> tuple[int, ...]:
    """Gives the factors of a tower's levels on `width`, finest first, from the shapes of its blocks.

    Raises GenError, naming `what` the file should be, for level widths that are no multiples of it.
    """
    last = f".{naming.block}.0.conv1.weight"
    levels = depth_of(weights, f"{side}.{(naming.down if side == 'encoder' else naming.up).format('{i}')}{last}")
    found = [weights[naming.level(side, i, levels) + last].shape[0] for i in range(levels)]
    if levels == 0 or any(w % width for w in found):
        raise GenError(f"this {what} has level widths {found} over {width}; expected multiples of it")
    return tuple(w // width for w in found)
