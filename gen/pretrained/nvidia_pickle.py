"""The pickles of NVIDIA's research code (EDM, EDM2): whole torch modules, saved with their source text.

Unpickling such a file the usual way runs the source in it. Here a module is a record of its attributes: its parameters
and buffers are gathered under the names its state dict would have, and nothing in the file is called.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

from gen.errors import GenError
from gen.pretrained.pickles import Storage, Tensor, read_pickle

__all__ = ["CLASS", "read_modules"]

CLASS = "class:"  # before a module's class name, which stands among its arrays as an empty one
# what a wrapper of EDM or EDM2 was made with, where it is not in the arrays: the published values, which we assume
_PUBLISHED: dict[str, float] = {
    "sigma_data": 0.5,
    "beta_d": 19.9,
    "beta_min": 0.1,
    "epsilon_t": 1e-5,
    "M": 1000,
    "C_1": 0.001,
    "C_2": 0.008,
    "label_balance": 0.5,
    "concat_balance": 0.5,
    "res_balance": 0.3,
    "attn_balance": 0.3,
    "clip_act": 256,
}
_LIMIT = 100_000  # arrays of one module; the largest published ones have some thousands


@dataclasses.dataclass
class _Module:
    """A torch module, or another object with attributes."""

    name: str
    state: Any = None

    def build(self, state: Any) -> None:
        self.state = state


class _EasyDict(dict[Any, Any]):
    """dnnlib's dictionary with attribute access."""

    def build(self, state: Any) -> None:
        """It has no attributes besides its entries."""


def read_modules(stream: IO[bytes], where: str, storage: Callable[[bytes], Any]) -> Any:
    """Gives the object of a pickle, each module in a dictionary as its state dict.

    A module's class is kept as an empty array called ``class:NAME``, so that importers can tell wrappers apart whose
    arrays have the same names.

    Args:
      where: names the file in error messages.
      storage: reads torch's own format, in which every tensor's bytes are nested.
    Raises GenError for anything that such files never hold, for a damaged stream, and for a wrapper that was made with
    other settings than the published ones.
    """

    def load(data: Any) -> Storage:
        content = storage(data) if isinstance(data, bytes) else None
        if not isinstance(content, Storage):
            raise ValueError("a tensor's bytes are no torch storage")
        return content

    def more(name: str) -> Callable[..., Any] | None:
        if name == "torch.storage _load_from_bytes":
            return load
        if name.startswith("torch.nn.modules."):
            return lambda *_: _Module(name.rpartition(" ")[2])
        return _OBJECTS.get(name)

    def refuse(_: Any) -> Any:
        raise ValueError("it refers to data outside of itself")

    content = read_pickle(stream, refuse, where, more)
    try:
        if isinstance(content, _Module):
            return _state_dict(content, where)
        if isinstance(content, dict):
            return {
                key: _state_dict(value, where) if isinstance(value, _Module) else value
                for key, value in content.items()
            }
    except (ValueError, TypeError, AttributeError) as error:
        raise GenError(f"{where} is damaged ({' '.join(str(error).split())[:100]}); download it again") from None
    return content


def _persistent(meta: Any) -> _Module:
    """What a persistent object's description says; its source text is left where it is."""
    if not isinstance(meta, dict) or meta.get("type") != "class":
        raise ValueError("a pickled object is described in an unknown way")
    name = meta["class_name"]
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError("a pickled object's class has no name")
    return _Module(name, meta["state"])


_OBJECTS: dict[str, Callable[..., Any]] = {
    "torch_utils.persistence _reconstruct_persistent_obj": _persistent,
    "dnnlib.util EasyDict": lambda *_: _EasyDict(),
}


def _state_dict(module: _Module, where: str) -> dict[str, Any]:
    """The arrays below a module by their dotted names."""
    found: dict[str, Any] = {}
    _collect(module, "", (), found)
    if module.name.endswith("Precond") and isinstance(module.state, Mapping):
        made = dict(_entries(module.state, "_init_kwargs"))
        for name, published in _PUBLISHED.items():
            if made.get(name, published) != published:
                raise GenError(
                    f"{where}: its {module.name} was made with {name} {str(made[name])[:20]}, published ones with "
                    f"{published:g}: that variant is not supported"
                )
    return {**found, CLASS + module.name: np.zeros(0, np.uint8)} if found else found


def _collect(module: Any, prefix: str, above: tuple[int, ...], found: dict[str, Any]) -> None:
    if id(module) in above or len(above) > 100:
        raise ValueError("a module contains itself")
    state = module.state if isinstance(module, _Module) else None
    if not isinstance(state, Mapping):
        return
    for kind in ("_parameters", "_buffers"):
        for name, value in _entries(state, kind):
            if isinstance(value, Tensor | np.ndarray):
                found[prefix + name] = value
    for name, value in _entries(state, "_modules"):
        _collect(value, f"{prefix}{name}.", (*above, id(module)), found)
    if len(found) > _LIMIT:
        raise ValueError(f"a module has more than {_LIMIT} arrays")


def _entries(state: Mapping[str, Any], kind: str) -> list[tuple[str, Any]]:
    entries = state.get(kind) or {}
    if not isinstance(entries, Mapping) or not all(isinstance(name, str) for name in entries):
        raise ValueError(f"a module's {kind} are not named")
    return list(entries.items())
