"""Published consistency trajectory models: sony/ctm (an ADM network) and Kim-Dongjun/ctm-cifar10 (EDM's DDPM++).

Both have a second path for the time where a jump ends, by whose names they are known: ``time_embed_s`` and
``emb_layers_s`` in the first, ``map_layer0_s`` and ``affine_s`` in the second.
"""

import functools
from typing import Any

from gen.diffusion.backbones.edm_unet import DhariwalUNetConfig
from gen.diffusion.denoiser import EDMPrecondition
from gen.diffusion.flowmap import FlowMap, Jump
from gen.diffusion.process import EDM
from gen.pretrained import adm, edm
from gen.pretrained.consistency import SCALE
from gen.pretrained.rules import Importer
from gen.sampling.flowmaps import FlowMapGenerator, FlowMapSampler

__all__ = ["CIFAR_IMPORTER", "IMPORTER", "cifar_generator", "generator"]


def generator(network: DhariwalUNetConfig) -> FlowMapGenerator:
    """Gives the official sampler of one jump, from 80 to 0.002."""
    return FlowMapGenerator(FlowMap(network, EDM(), Jump(EDMPrecondition(SCALE))), FlowMapSampler())


def cifar_generator(network: Any) -> FlowMapGenerator:
    """Gives the official sampler of one jump, from 80 to 0.002, for the networks of CIFAR-10.

    They are told ln(sigma) / 4, as they are in EDM.
    """
    return FlowMapGenerator(FlowMap(network, EDM(), Jump()), FlowMapSampler())


IMPORTER = Importer(
    "ctm",
    (*adm.IMPORTER.signature, "time_embed_s.0.weight"),
    adm.config,
    functools.partial(adm.rules, new_order=True, planar=True),
    generator,
)
CIFAR_IMPORTER = Importer(
    "ctm-cifar10", (*edm.IMPORTER.signature, "model.map_layer0_s.weight"), edm.config, edm.rules, cifar_generator
)
