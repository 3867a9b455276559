"""KL autoencoder weights: diffusers' names, today's and those before its 0.15 (SD-VAE), and CompVis's (LDM, VA-VAE).

The tables give raw latents: stable diffusion's factor 0.18215 and VA-VAE's statistics are the normaliser's.
"""

import functools
from typing import Any

import numpy as np

from gen.errors import GenError
from gen.pretrained import towers
from gen.pretrained.rules import Arrays, Importer, Rules, convolution, depth_of
from gen.pretrained.towers import Naming, tower_mult, tower_rules
from gen.tokenizers.base import Affine
from gen.tokenizers.kl_vae import KLVAEConfig

__all__ = ["COMPVIS", "DIFFUSERS", "DIFFUSERS_OLD", "SCALED", "config", "rules"]

# the normaliser of stable diffusion and DiT: latents times 0.18215
SCALED = Affine(np.zeros(4, np.float32), np.full(4, 1.0 / 0.18215, np.float32))


def rules(config: KLVAEConfig, naming: Naming) -> Rules:
    """Gives the table of official names for a configuration under one of the three namings."""
    rows = [*tower_rules(config, "encoder", naming), *tower_rules(config, "decoder", naming)]
    if config.quant_conv:
        rows += [*convolution("quant_conv", "quant"), *convolution("post_quant_conv", "post_quant")]
    return rows


def config(naming: Naming, weights: Arrays, *, size: int = 256, groups: int = 32) -> KLVAEConfig:
    """Gives the configuration of a state dict, from its names and shapes.

    Args:
      size: height and width of the images it is to be used on; the network takes any.
      groups: of its group norms; shapes do not tell, 32 in all published networks.

    Raises GenError when a needed array is missing or not shaped as in a KL autoencoder.
    """
    norm = naming.layers[0]
    try:
        width, image_channels = weights["encoder.conv_in.weight"].shape[:2]
        mult = tower_mult(weights, "encoder", naming, width=width, what="KL autoencoder")
        inner = weights["encoder.conv_out.weight"].shape[0] // 2
        channels = weights["quant_conv.weight"].shape[0] // 2 if "quant_conv.weight" in weights else inner
    except (KeyError, IndexError, ValueError) as error:
        raise GenError(
            f"this is not a KL autoencoder: {error} is missing or misshaped; give an official file"
        ) from None

    def attended(side: str) -> tuple[int, ...]:
        names = [f"{naming.level(side, i, len(mult))}.{naming.attention}.0.{norm}.weight" for i in range(len(mult))]
        return tuple(i for i, name in enumerate(names) if name in weights)

    return KLVAEConfig(
        image=(size, size, image_channels),
        width=width,
        mult=mult,
        blocks=depth_of(weights, f"{naming.level('encoder', 0, len(mult))}.{naming.block}.{{i}}.conv1.weight"),
        channels=channels,
        inner=inner,
        attention=attended("encoder"),
        decoder_attention=attended("decoder"),
        middle_attention=f"encoder.{naming.middle[1]}.{norm}.weight" in weights,
        quant_conv="quant_conv.weight" in weights,
        groups=groups,
    )


def _importer(name: str, naming: Naming, signature: tuple[str, ...], ignore: tuple[str, ...] = ()) -> Importer:
    def infer(weights: Arrays, *, size: int = 256, groups: int = 32) -> KLVAEConfig:
        return config(naming, weights, size=size, groups=groups)

    table: Any = functools.partial(rules, naming=naming)
    return Importer(name, signature, infer, table, None, ignore, role="tokenizer")


# attention and quant_conv are not in every file
_DIFFUSERS = ("encoder.conv_norm_out.weight", "encoder.mid_block.resnets.0.conv1.weight")
DIFFUSERS = _importer("sd-vae", towers.DIFFUSERS, _DIFFUSERS)
DIFFUSERS_OLD = _importer(
    "sd-vae-old", towers.DIFFUSERS_OLD, (*_DIFFUSERS, "encoder.mid_block.attentions.0.query.weight")
)
# training files also hold the loss's networks and VA-VAE's frozen foundation model
COMPVIS = _importer(
    "kl-vae",
    towers.COMPVIS,
    ("encoder.norm_out.weight", "encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight"),
    ("loss.*", "foundation_model.*", "linear_proj.*"),
)
