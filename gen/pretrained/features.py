"""Feature networks of evaluation from their published files: ``gen convert NETWORK FILE``."""

import importlib
from pathlib import Path

from gen.config import suggest
from gen.errors import GenError

__all__ = ["NETWORKS", "convert_network"]

# network -> "module:function", a function (source file, out or None) -> one line on what was written where
NETWORKS: dict[str, str] = {
    "inception": "gen.pretrained.inception:convert",
    "dinov2": "gen.pretrained.dinov2:convert",
    "lpips": "gen.pretrained.lpips:convert",
    "clip": "gen.pretrained.clip:convert",
    "clip-vocabulary": "gen.pretrained.clip:convert_vocabulary",
}


def convert_network(name: str, source: Path, out: Path | None = None) -> str:
    """Converts the published file of a feature network; returns one line on it.

    Raises GenError for an unknown network, and for a file that is not that network's.
    """
    if name not in NETWORKS:
        raise GenError(f"unknown feature network '{name}'; {suggest(name, NETWORKS)}")
    module, _, function = NETWORKS[name].partition(":")
    line: str = getattr(importlib.import_module(module), function)(source, out)
    return line
