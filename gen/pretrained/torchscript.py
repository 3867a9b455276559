"""TorchScript archives: what torch.jit.save wrote, as state dicts. The code in them is not even read."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gen.pretrained.pickles import Tensor

__all__ = ["names", "state_dict"]

_PLAIN = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag")


@dataclasses.dataclass
class _Module:
    """A scripted module: its attributes by name."""

    attributes: Any = None

    def build(self, state: Any) -> None:
        self.attributes = state


def names(name: str) -> Callable[..., Any] | None:
    """Gives the names that such archives use besides torch's own; for `gen.pretrained.pickles.read_pickle`."""
    if name.startswith("__torch__"):
        return lambda *_: _Module()
    module, _, function = name.partition(" ")
    return _plain if module == "torch.jit._pickle" and function in _PLAIN else None


def _plain(value: Any = (), *_: Any) -> Any:
    """Lists and tagged values are what they hold."""
    return value


def state_dict(content: Any) -> Any:
    """Gives the arrays below a scripted module by their dotted names; anything else is given back as it is.

    Raises ValueError for modules that contain themselves.
    """
    if not isinstance(content, _Module):
        return content
    found: dict[str, Any] = {}
    _collect(content, "", (), found)
    return found


def _collect(module: _Module, prefix: str, above: tuple[int, ...], found: dict[str, Any]) -> None:
    if id(module) in above or len(above) > 100:
        raise ValueError("a module contains itself")
    if not isinstance(module.attributes, Mapping):
        return
    for name, value in module.attributes.items():
        if isinstance(value, _Module):
            _collect(value, f"{prefix}{name}.", (*above, id(module)), found)
        elif isinstance(value, Tensor | np.ndarray):
            found[f"{prefix}{name}"] = value
