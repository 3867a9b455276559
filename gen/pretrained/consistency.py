"""Published consistency models: openai/consistency_models (ADM networks) and locuslab/ect (EDM networks).

The first are ADM state dicts (``cd_imagenet64_lpips.pt``, ``ct_bedroom256.pt``) whose attention is stored with q, k,
v before heads and as convolutions over the plane; their EDM teachers (``edm_imagenet64_ema.pt``) are as well. No array
tells what the network was trained for: the system is named on conversion. The second are EDM's networks, pickled as
ECMPrecond; those of NVlabs/TCM have the same arrays.
"""

import functools
from typing import Any

from gen.diffusion.backbones.edm_unet import DhariwalUNetConfig
from gen.diffusion.denoiser import Denoiser, EDMPrecondition
from gen.diffusion.flowmap import Consistency, FlowMap
from gen.diffusion.objectives import EDMLoss
from gen.diffusion.process import EDM
from gen.pretrained import adm, edm
from gen.pretrained.rules import Importer
from gen.sampling.edm_samplers import edm_sampler
from gen.sampling.flowmaps import FlowMapGenerator, FlowMapSampler
from gen.sampling.generator import DiffusionGenerator

__all__ = ["ECT_IMPORTER", "IMPORTER", "SCALE", "TEACHER_IMPORTER", "ect_generator", "generator", "teacher"]

SCALE = 1000.0  # the networks are made for a chain's indices: 1000 ln(sigma) / 4


def generator(network: DhariwalUNetConfig) -> FlowMapGenerator:
    """Gives the official sampler of one step: f(80 z, 80), clipped.

    Two steps go through the point of the grid that the authors found for a model (`FlowMapSampler.times`), gamma 1.
    """
    return FlowMapGenerator(FlowMap(network, EDM(), Consistency(SCALE)), FlowMapSampler(gamma=1.0, clip=True))


def teacher(network: DhariwalUNetConfig) -> DiffusionGenerator:
    """Gives the EDM teacher of those models, with EDM's sampler of 40 steps."""
    return DiffusionGenerator(Denoiser(network, EDM(), EDMPrecondition(SCALE), EDMLoss()), edm_sampler(40))


def ect_generator(network: Any) -> FlowMapGenerator:
    """Gives ECT's official sampler of two steps, at 80 and 0.821, with the scalings of evaluation: sigma_min 0.003."""
    process = EDM(sigma_min=0.003)
    return FlowMapGenerator(FlowMap(network, process, Consistency()), FlowMapSampler((80.0, 0.821, 0.003), gamma=1.0))


_RULES = functools.partial(adm.rules, new_order=True, planar=True)

IMPORTER = Importer("consistency-adm", (), adm.config, _RULES, generator, alike=("edm-adm",))
TEACHER_IMPORTER = Importer("edm-adm", (), adm.config, _RULES, teacher, alike=("consistency-adm",))
ECT_IMPORTER = Importer(
    "ect", (*edm.IMPORTER.signature, "class:ECMPrecond"), edm.config, edm.rules, ect_generator, alike=("edm",)
)
