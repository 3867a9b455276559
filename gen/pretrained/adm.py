"""Official ADM weights (openai/guided-diffusion) and those of its forerunner (openai/improved-diffusion).

Both are `DhariwalUNetConfig`s: guided-diffusion's published networks resample inside residual blocks and condition by
scale and shift; improved-diffusion's resample by convolutions, and its LSUN networks add the condition.

The order of q, k, v and heads in the attention's projection is told by no file: ImageNet-64 of guided-diffusion has the
new one (system adm-new-order), all others the old one (adm).
"""

import dataclasses
from typing import Any

import numpy as np

from gen.diffusion.backbones.edm_unet import DhariwalUNetConfig, Layer
from gen.diffusion.ddpm import DDPM
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.objectives import DDPMLoss
from gen.errors import GenError
from gen.pretrained.rules import SAME, Arrays, Importer, Rule, Rules, Transform, convolution, linear
from gen.sampling.generator import DiffusionGenerator, Sampler
from gen.sampling.grids import Respaced
from gen.sampling.guidance import Clip
from gen.sampling.solvers import Ancestral

__all__ = ["IMPORTER", "NEW_IMPORTER", "config", "generator", "rules"]

# image sizes of the published networks by the widths of their levels
_SIZES: dict[tuple[float, ...], int] = {
    (1, 2, 2, 2): 32,
    (1, 2, 3, 4): 64,
    (1, 1, 2, 3, 4): 128,
    (1, 1, 2, 2, 4, 4): 256,
    (0.5, 1, 1, 2, 2, 4, 4): 512,
}
_ATTENTION_1D = Transform(lambda a: a.transpose(2, 1, 0)[None], lambda a: (a[0].transpose(2, 1, 0),))
_ATTENTION_2D = Transform(lambda a: a.transpose(2, 3, 1, 0), lambda a: (a.transpose(3, 2, 0, 1),))


def rules(config: DhariwalUNetConfig, *, new_order: bool = False, planar: bool = False) -> Rules:
    """Gives the table of official names for a configuration; those of a second time are CTM's.

    Args:
      planar: the attention's projections are stored as convolutions over a plane instead of a line.
      new_order: the projection's channels are ordered by q, k, v before heads (``use_new_attention_order``) instead of
        heads before q, k, v.
    """
    table: list[Rule] = []
    for s in ("", "_s")[: config.times]:
        table += [*linear(f"time_embed{s}.0", f"map/layer0{s}"), *linear(f"time_embed{s}.2", f"map/layer1{s}")]
    form = _Form(new_order, planar)
    if config.num_classes:
        table.append(Rule("label_emb.weight", "map/label/kernel", SAME))
    encoder, decoder = config.plans
    for number, row in enumerate(encoder):
        name = f"input_blocks.{number}"
        if row.kind == "pool":
            continue
        if row.kind == "conv":
            table += convolution(f"{name}.0{'.op' if row.down else ''}", f"enc/{row.name}")
        else:
            table += _block(config, row, f"enc/{row.name}", f"{name}.0", f"{name}.1", form)
    number, place = -1, 0
    for row in decoder:
        ours = f"dec/{row.name}"
        if row.name.endswith("_in0"):
            table += _block(config, row, ours, "middle_block.0", "middle_block.1", form)
        elif row.name.endswith("_in1"):
            table += _block(config, row, ours, "middle_block.2", "", form)
        elif row.kind == "norm":
            table += _norm("out.0", ours)
        elif row.kind == "out":
            table += convolution("out.2", ours)
        elif row.kind == "pool":
            continue
        elif row.kind == "conv":  # the last part of the block before
            table += convolution(f"output_blocks.{number}.{place}.conv", ours)
        elif row.up:  # likewise
            table += _block(config, row, ours, f"output_blocks.{number}.{place}", "", form)
        else:
            number, place = number + 1, 2 if _heads(config, row) else 1
            name = f"output_blocks.{number}"
            table += _block(config, row, ours, f"{name}.0", f"{name}.1", form)
    return table


def _heads(config: DhariwalUNetConfig, row: Layer) -> int:
    return config.style.heads(row.outputs) if row.attention else 0


def _norm(official: str, ours: str) -> list[Rule]:
    return [Rule(f"{official}.weight", f"{ours}/scale"), Rule(f"{official}.bias", f"{ours}/bias")]


def _block(
    config: DhariwalUNetConfig, row: Layer, ours: str, residual: str, attention: str, form: "_Form"
) -> list[Rule]:
    table = [*_norm(f"{residual}.in_layers.0", f"{ours}/norm0"), *_norm(f"{residual}.out_layers.0", f"{ours}/norm1")]
    table += convolution(f"{residual}.in_layers.2", f"{ours}/conv0")
    for s in ("", "_s")[: config.times]:
        table += linear(f"{residual}.emb_layers{s}.1", f"{ours}/affine{s}")
    table += convolution(f"{residual}.out_layers.3", f"{ours}/conv1")
    if row.inputs != row.outputs:
        table += convolution(f"{residual}.skip_connection", f"{ours}/skip")
    heads = _heads(config, row)
    if heads:
        table += _norm(f"{attention}.norm", f"{ours}/norm2")
        table.append(Rule(f"{attention}.qkv.weight", f"{ours}/qkv/kernel", _qkv(heads, form, kernel=True)))
        table.append(Rule(f"{attention}.qkv.bias", f"{ours}/qkv/bias", _qkv(heads, form, kernel=False)))
        table.append(Rule(f"{attention}.proj_out.weight", f"{ours}/proj/kernel", form.projection))
        table.append(Rule(f"{attention}.proj_out.bias", f"{ours}/proj/bias"))
    return table


@dataclasses.dataclass(frozen=True)
class _Form:
    """How the attention's projections are stored; see `rules`."""

    new_order: bool
    planar: bool

    @property
    def projection(self) -> Transform:
        """Brings a kernel of size 1 into our layout."""
        return _ATTENTION_2D if self.planar else _ATTENTION_1D


def _qkv(heads: int, form: _Form, *, kernel: bool) -> Transform:
    """Official rows to ours, which are ordered by head, then channel, then q, k, v."""

    def load(a: np.ndarray) -> np.ndarray:
        parts = (3, heads, -1) if form.new_order else (heads, 3, -1)
        order = (1, 2, 0) if form.new_order else (0, 2, 1)
        a = a.reshape(*parts, *a.shape[1:])
        a = a.transpose(*order, *range(3, a.ndim)).reshape(-1, *a.shape[3:])
        return form.projection.load(a) if kernel else a

    def save(a: np.ndarray) -> tuple[np.ndarray, ...]:
        a = form.projection.save(a)[0] if kernel else a
        a = a.reshape(heads, -1, 3, *a.shape[1:])
        order = (2, 0, 1) if form.new_order else (0, 2, 1)
        return (a.transpose(*order, *range(3, a.ndim)).reshape(-1, *a.shape[3:]),)

    return Transform(load, save)


def config(
    weights: Arrays, *, size: int | None = None, head_width: int = 64, heads: int | None = None
) -> DhariwalUNetConfig:
    """Gives the configuration of a state dict, from its names and shapes.

    Args:
      size: of the image, which shapes do not tell; that of the published network with such levels by default.
      head_width: channels per attention head (``num_head_channels``).
      heads: attention heads of every block instead (``num_heads``); by default as in the published networks: 4 at
        128 px and in improved-diffusion's, 1 in its LSUN networks.
    Raises GenError when a needed array is missing or misshaped, or the size is not known.
    """
    try:
        return _config(weights, size, head_width, heads)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise GenError(f"this is not an ADM network: {error} is missing or misshaped; give an official file") from None


def _config(weights: Arrays, size: int | None, head_width: int, heads: int | None) -> DhariwalUNetConfig:
    emb, width = weights["time_embed.0.weight"].shape
    numbers = {int(name.split(".")[1]) for name in weights if name.startswith("input_blocks.")}
    inputs = max(numbers) + 1
    pooled = inputs - len(numbers)  # levels that end without weights
    # each level but the last ends in a convolution, or its decoder in a second residual block behind the first
    plain = sum(name.startswith("input_blocks.") and name.endswith(".op.weight") for name in weights)
    ups = [name for name in weights if name.startswith("output_blocks.") and name.endswith(".in_layers.0.weight")]
    levels = (pooled or plain or sum(name.split(".")[2] != "0" for name in ups)) + 1
    blocks = inputs // levels - 1
    first = [1 + level * (blocks + 1) for level in range(levels)]
    outputs = [weights[f"input_blocks.{n}.0.out_layers.3.weight"].shape[0] for n in first]
    mult = tuple(c // width if c % width == 0 else c / width for c in outputs)
    size = _SIZES.get(mult) if size is None else size
    if size is None:
        raise GenError(f"ADM networks with level widths {outputs} were not published; give the image size (size)")
    channels, out_channels = weights["input_blocks.0.0.weight"].shape[1], weights["out.2.weight"].shape[0]
    if channels == 6:
        raise GenError(
            "this network takes 6 channels: an upsampler, to which a small image is given beside x; no support"
        )
    adaptive = weights["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * outputs[0]
    if heads is None:
        older = bool(plain or pooled)
        heads = 4 if mult == (1, 1, 2, 3, 4) or (older and adaptive) else int(older)
    return DhariwalUNetConfig(
        size=size,
        channels=channels,
        out_channels=out_channels,
        num_classes=weights["label_emb.weight"].shape[0] if "label_emb.weight" in weights else 0,
        width=width,
        mult=mult,
        emb=emb // width,
        blocks=blocks,
        attention=tuple(size >> i for i, n in enumerate(first) if f"input_blocks.{n}.1.qkv.weight" in weights),
        head_width=head_width,
        heads=heads,
        groups=32,
        adaptive=adaptive,
        times=2 if "time_embed_s.0.weight" in weights else 1,
        resample="pooling" if pooled else "convolution" if plain else "blocks",
    )


def generator(network: DhariwalUNetConfig) -> DiffusionGenerator:
    """Gives the official sampler: 250 ancestral steps, learned variance; the cosine chain up to 64 px, else the linear
    one.

    Denoised images are clipped to [-1, 1] at every step, as the sampling scripts do (``clip_denoised``).
    improved-diffusion's cosine chains have 4000 steps, of which its unconditional networks see a quarter of the index.
    """
    learned, small = network.out_channels == 2 * network.channels, network.size <= 64
    older = small and network.resample != "blocks"
    chain = DDPM("cosine" if small else "linear", 4000 if older else 1000)
    scale = 0.25 if older and not network.num_classes else 1.0
    # both codes weigh the variational term by the length of the chain over 1000
    loss = DDPMLoss(variance="learned" if learned else "large", bound_weight=chain.steps / 1000)
    denoiser = Denoiser(network, chain, Predict("eps", clock="index", scale=scale, learned_variance=learned), loss)
    sampler = Sampler(Ancestral("learned" if learned else "large"), Respaced(), 250, Clip())
    return DiffusionGenerator(denoiser, sampler)


def _importer(name: str, new_order: bool) -> Importer:
    def table(network: Any) -> Rules:
        return rules(network, new_order=new_order)

    signature = ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.emb_layers.1.weight", "out.2.weight")
    # both orders have the same names and shapes: the new one must be asked for
    other = "adm" if new_order else "adm-new-order"
    return Importer(name, () if new_order else signature, config, table, generator, alike=(other,))


IMPORTER = _importer("adm", False)
NEW_IMPORTER = _importer("adm-new-order", True)
