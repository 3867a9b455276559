"""The published systems by name, and which of them a file holds."""

import dataclasses
import importlib
from typing import cast

from gen.config import suggest
from gen.errors import GenError
from gen.pretrained.containers import some
from gen.pretrained.rules import Arrays, Importer

__all__ = ["SYSTEMS", "Located", "locate", "system"]

# system -> where its Importer lives
SYSTEMS: dict[str, str] = {
    "dit": "gen.pretrained.dit:IMPORTER",
    "dit-diffusers": "gen.pretrained.diffusers:IMPORTER",
    "sit": "gen.pretrained.sit:IMPORTER",
    "repa": "gen.pretrained.sit:REPA",
    "lightningdit": "gen.pretrained.lightningdit:IMPORTER",
    "rae-v2": "gen.pretrained.rae_v2:IMPORTER",
    "lamamba": "gen.pretrained.lamamba:IMPORTER",
    "edm2": "gen.pretrained.edm2:IMPORTER",
    "sd-vae": "gen.pretrained.sdvae:DIFFUSERS",
    "sd-vae-old": "gen.pretrained.sdvae:DIFFUSERS_OLD",
    "kl-vae": "gen.pretrained.sdvae:COMPVIS",
    "vitok": "gen.pretrained.vitok:IMPORTER",
    "detok": "gen.pretrained.detok:IMPORTER",
    "rae": "gen.pretrained.rae:IMPORTER",
    "maskgit-vqgan": "gen.pretrained.maskgit:IMPORTER",
    "maskgit": "gen.pretrained.maskgit_generators:BERT",
    "maskgit-uvit": "gen.pretrained.maskgit_generators:SKIPS",
    "maskgen": "gen.pretrained.maskgen:IMPORTER",
    "mar": "gen.pretrained.mar:IMPORTER",
    "llamagen": "gen.pretrained.llamagen:IMPORTER",
    "rar": "gen.pretrained.rar:IMPORTER",
    "llamagen-vq": "gen.pretrained.llamagen:VQ_IMPORTER",
    "var": "gen.pretrained.var:IMPORTER",
    "llamagen-dd": "gen.pretrained.distilled_decoding:GPT_IMPORTER",
    "var-dd": "gen.pretrained.distilled_decoding:VAR_IMPORTER",
    "binary-diffusion": "gen.pretrained.binary_diffusion:IMPORTER",
    "instella-diffusion": "gen.pretrained.instella:DIFFUSION_IMPORTER",
    "instella-ar": "gen.pretrained.instella:AR_IMPORTER",
    "binary-autoencoder": "gen.pretrained.binary_latents:AUTOENCODER_IMPORTER",
    "instella-tokenizer": "gen.pretrained.instella:TOKENIZER_IMPORTER",
    "var-vqvae": "gen.pretrained.var:VQVAE_IMPORTER",
    "flowtok": "gen.pretrained.flowtok:IMPORTER",
    "titok": "gen.pretrained.titok:IMPORTER",
    "flextok": "gen.pretrained.flextok:IMPORTER",
    "edm": "gen.pretrained.edm:IMPORTER",
    "edm-vp": "gen.pretrained.edm:VP_IMPORTER",
    "edm-ve": "gen.pretrained.edm:VE_IMPORTER",
    "edm-iddpm": "gen.pretrained.edm:IDDPM_IMPORTER",
    "rfpp": "gen.pretrained.rfpp:IMPORTER",
    "slimflow": "gen.pretrained.slimflow:IMPORTER",
    "dmd2": "gen.pretrained.dmd2:IMPORTER",
    "adm": "gen.pretrained.adm:IMPORTER",
    "adm-new-order": "gen.pretrained.adm:NEW_IMPORTER",
    "consistency-adm": "gen.pretrained.consistency:IMPORTER",
    "edm-adm": "gen.pretrained.consistency:TEACHER_IMPORTER",
    "ect": "gen.pretrained.consistency:ECT_IMPORTER",
    "ctm": "gen.pretrained.ctm:IMPORTER",
    "ctm-cifar10": "gen.pretrained.ctm:CIFAR_IMPORTER",
}


@dataclasses.dataclass(frozen=True)
class Located:
    """A published network within a file.

    Attributes:
      importer: of its system.
      weights: its arrays under official names.
      prefix: what stood before each of these names ("first_stage_model.", or "").
      outside: how many arrays of the file do not begin with it.
    """

    importer: Importer
    weights: Arrays
    prefix: str
    outside: int


def system(name: str) -> Importer:
    """Gives the importer called `name`. Raises GenError for an unknown name."""
    if name not in SYSTEMS:
        raise GenError(f"unknown system '{name}'; {suggest(name, SYSTEMS)}")
    module, _, attribute = SYSTEMS[name].partition(":")
    return cast(Importer, getattr(importlib.import_module(module), attribute))


def locate(name: str | None, weights: Arrays, role: str | None = None) -> Located:
    """Finds the network in a file: under its official names, or inside a larger model, where a prefix stands before
    them.

    Args:
      name: the system; by default the one whose signature the names carry.
      role: only systems of this role ("tokenizer") are meant.

    Raises GenError for an unknown name, and when no system, or more than one, fits.
    """
    if name is not None:
        importer = system(name)
        signature = importer.signature or next((system(a).signature for a in importer.alike), ())
        prefixes = _prefixes(weights, signature)
        if not signature or "" in prefixes or len(prefixes) != 1:
            return Located(importer, weights, "", 0)
        return _inside(importer, weights, prefixes[0])
    importers = [i for i in map(system, SYSTEMS) if i.signature and role in (None, i.role)]
    found = [(prefix, i) for i in importers for prefix in _prefixes(weights, i.signature)]
    # the whole file before a part of it
    found = [(prefix, i) for prefix, i in found if not prefix or all(p for p, _ in found)]
    # the most telling one: a signature that says all that another says, and more
    found = [
        (prefix, i)
        for prefix, i in found
        if not any(p == prefix and set(i.signature) < set(o.signature) for p, o in found)
    ]
    if len(found) != 1:
        fits = ", ".join(f"{i.name}{f' under {prefix}' if prefix else ''}" for prefix, i in found)
        raise GenError(
            f"the names in the file ({some(weights)}) fit {fits or 'none of the known systems'}; say which system it "
            f"is with --system (known: {', '.join(SYSTEMS)})"
        )
    return _inside(found[0][1], weights, found[0][0])


def _inside(importer: Importer, weights: Arrays, prefix: str) -> Located:
    own = {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}
    return Located(importer, own, prefix, len(weights) - len(own))


def _prefixes(weights: Arrays, signature: tuple[str, ...]) -> list[str]:
    """What stands before the names of a signature in a file: "" for the names as they are, or "model." and the like."""
    if not signature:
        return []
    ends = [name.removesuffix(signature[0]) for name in weights if name.endswith(signature[0])]
    fits = [prefix for prefix in ends if not prefix or prefix.endswith(".")]
    return [prefix for prefix in fits if all(prefix + name in weights for name in signature)]
