"""Feature networks of evaluation from their published files: ``gen convert NETWORK FILE``."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gen.config import suggest
from gen.errors import GenError

__all__ = ["NETWORKS", "convert_installed", "convert_network"]

# network -> "module:function", a function (source file, out or None) -> one line on what was written where
NETWORKS: dict[str, str] = {
    "inception": "gen.pretrained.inception:convert",
    "dinov2": "gen.pretrained.dinov2:convert",
    "mae": "gen.pretrained.mae:convert",
    "lite": "gen.pretrained.efficientnet_lite:convert",
    "lpips": "gen.pretrained.lpips:convert",
    "convnext": "gen.pretrained.convnext:convert",
    "resnet": "gen.pretrained.resnet:convert",
    "clip": "gen.pretrained.clip:convert",
    "clip-vocabulary": "gen.pretrained.clip:convert_vocabulary",
}

# network -> "module:function" that gives the file in an installed package, or None where that is not installed
INSTALLED: dict[str, str] = {"lite": "gen.pretrained.efficientnet_lite:installed"}


def _function(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def convert_installed(name: str) -> str | None:
    """Converts a network whose published file is part of an installed package; returns one line on it.

    None for other networks, and where the package is not installed.
    """
    source = _function(INSTALLED[name])() if name in INSTALLED else None
    return None if source is None else convert_network(name, source)


def convert_network(name: str, source: Path, out: Path | None = None) -> str:
    """Converts the published file of a feature network; returns one line on it.

    Raises GenError for an unknown network, and for a file that is not that network's.
    """
    if name not in NETWORKS:
        raise GenError(f"unknown feature network '{name}'; {suggest(name, NETWORKS)}")
    line: str = _function(NETWORKS[name])(source, out)
    return line
