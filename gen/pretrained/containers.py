"""Which state dict of a file is meant: entries of training checkpoints, averages beside raw weights, wrapped names.

Libraries store an average beside the raw weights as an entry of its own ({"model", "ema"}), or under names of their
own in one state dict ("ema_model.*", the LitEma of latent diffusion). The average is what papers report: it is taken
where there is one, the raw weights where they are asked for, and nothing where the file leaves two readings open.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gen.errors import GenError
from gen.pretrained.pickles import Tensor

__all__ = ["choose", "some"]

# entries in which libraries keep the network that is trained, most telling first
_RAW = ("state_dict", "model", "module", "params", "model_state_dict", "net", "network", "weights", "generator")
_AVERAGED = re.compile(r"(^|[^a-z])(emas?|averaged?|averaging|avg|swa|polyak|shadow)($|[^a-z])")
# entries that are no network
_BESIDE = re.compile(
    r"(^|[^a-z])(opt|optim|optimi[sz]ers?|(lr_)?schedulers?|scaler|rng|callbacks?|loops|args?|config)($|[^a-z])"
)
# parts of names that wrappers add: data-parallel training, compilation, sharding, recomputation
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_COUNTERS = {"n_averaged", "num_updates", "decay", "initted", "step", "steps"}

State = dict[str, np.ndarray]


def choose(content: Any, key: str | None, path: Path) -> tuple[State, str]:
    """Gives the state dict in what a file holds, and where it stood there ("" for the file itself).

    Args:
      content: what was read: a state dict, or a training checkpoint of several.
      key: where the wanted one stands (ema, model, state_dict ...); the averaged weights by default.
      path: the file, for messages.

    Raises GenError where there is no state dict, none of that name, or more than one that could be meant.
    """
    if not isinstance(content, dict):
        raise GenError(f"{path} holds a {type(content).__name__}, not a state dict; save model.state_dict() instead")
    entries = _entries(content)
    if key is None and (zipped := _zipped(entries, content, path)) is not None:
        return zipped
    entry = key if key in entries else _default(entries, content, key, path)
    state = _plain(_arrays(entries[entry] if entry else _tensors(content), path), path)
    averages = sorted({part for name in state if (part := _averaged_part(name))})
    if key is None or key == entry:
        if len(averages) > 1:
            raise GenError(f"{path} holds averages under {_listed(averages)}; say which with --key")
        if averages:
            return _averaged(state, averages[0], path), averages[0]
        return state, entry
    if key in averages:
        return _averaged(state, key, path), key
    if averages and any(name.startswith(f"{key}.") for name in state):
        return {name: array for name, array in state.items() if not _averaged_part(name)}, key
    known = [*entries, *averages, *({name.partition(".")[0] for name in state} - set(averages) if averages else ())]
    raise GenError(f"{path} has no weights under '{key[:60]}'; it has {_listed(sorted(known)) or 'one state dict'}")


def some(names: Any, count: int = 4) -> str:
    """Gives some of the names of a file, for messages about the others."""
    found = sorted(name for name in names if not name.startswith("class:"))
    more = f" and {len(found) - count} more" if len(found) > count else ""
    return f"{', '.join(name[:80] for name in found[:count])}{more}" if found else "no arrays"


def _listed(names: list[str]) -> str:
    return ", ".join(name[:60] for name in names[:8])


def _tensors(entry: Any) -> dict[str, Any]:
    """The tensors of a state dict by name; what is not a tensor (counters, nested dicts) is left out."""
    if not isinstance(entry, dict):
        return {}
    return {k: v for k, v in entry.items() if isinstance(k, str) and (isinstance(v, np.ndarray | Tensor) or _late(v))}


def _late(value: Any) -> bool:
    return callable(getattr(value, "array", None))


def _entries(content: dict[Any, Any], place: str = "", depth: int = 3) -> dict[str, dict[str, Any]]:
    """Dotted place -> tensors, of every state dict inside; optimisers and settings are left out."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, dict) or _BESIDE.search(name.lower()):
            continue
        tensors = _tensors(value)
        if set(tensors) - _COUNTERS:
            found[f"{place}{name}"] = tensors
        elif depth > 1:
            found |= _entries(value, f"{place}{name}.", depth - 1)
    return found


def _is_average(place: str) -> bool:
    return bool(_AVERAGED.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", place).lower()))


def _default(entries: Mapping[str, Any], content: dict[Any, Any], key: str | None, path: Path) -> str:
    """The place of the averaged weights, else of the raw ones; "" for the file itself."""
    averaged = [place for place in entries if _is_average(place)]
    if len(averaged) > 1 and key is None:
        raise GenError(f"{path} holds averages under {_listed(averaged)}; say which with --key")
    unnamed = [name for name, value in content.items() if _is_average(str(name)) and _unnamed(value)]
    if unnamed and not averaged and key is None:
        raise GenError(
            f"{path} keeps its averages under '{unnamed[0]}' as a list without names; save them as a state dict, "
            f"or take the raw weights with --key ({_listed(sorted(entries))})"
        )
    if averaged and key is None:
        return averaged[0]
    if _tensors(content) and not any(place in entries for place in _RAW):
        return ""
    raw = [place for place in _RAW if place in entries] or [place for place in entries if not _is_average(place)]
    if not raw:
        if not entries:
            raise GenError(f"{path} holds no weights; save model.state_dict() there")
        return averaged[0]
    if len(raw) > 1:
        raise GenError(f"{path} holds weights under {_listed(sorted(raw))}; say which with --key")
    return raw[0]


def _zipped(entries: Mapping[str, Any], content: dict[Any, Any], path: Path) -> tuple[State, str] | None:
    """The raw weights with an average in place that is a list in the order of the parameters, and where that stood.

    Buffers are not averaged and are passed over, by their shapes. None where there is no such list, or where it could
    be laid over the weights in more than one way.
    """
    lists = [(str(name), value) for name, value in content.items() if _is_average(str(name)) and _unnamed(value)]
    raw = [place for place in _RAW if place in entries]
    if len(lists) != 1 or len(raw) != 1 or any(_is_average(place) for place in entries):
        return None
    name, value = lists[0]
    averages, weights = _listed_tensors(value), _plain(_arrays(entries[raw[0]], path), path)
    shapes, names = [tuple(item.shape) for item in averages], list(weights)
    forwards, backwards = _matched(names, weights, shapes), _matched(names[::-1], weights, shapes[::-1])
    if forwards is None or backwards is None or forwards != backwards[::-1]:
        return None
    return weights | _arrays(dict(zip(forwards, averages, strict=True)), path), name


def _matched(names: list[str], weights: State, shapes: list[tuple[int, ...]]) -> list[str] | None:
    """The names whose arrays have these shapes, in this order; None where they do not follow one another so."""
    found: list[str] = []
    for name in names:
        if len(found) < len(shapes) and weights[name].shape == shapes[len(found)]:
            found.append(name)
    return found if len(found) == len(shapes) else None


def _listed_tensors(value: Any) -> list[Any]:
    """The first list of tensors in an entry for which `_unnamed` holds."""
    if isinstance(value, dict):
        return next(found for inner in value.values() if (found := _listed_tensors(inner)))
    return list(value) if _unnamed(value) else []


def _unnamed(value: Any) -> bool:
    """Whether tensors stand here in a list, as in the moving averages of torch_ema and diffusers."""
    if isinstance(value, dict):
        return any(_unnamed(inner) for inner in value.values())
    return isinstance(value, list | tuple) and any(isinstance(item, Tensor) or _late(item) for item in value)


def _arrays(tensors: Mapping[str, Any], path: Path) -> State:
    try:
        return {k: v if isinstance(v, np.ndarray) else v.array() for k, v in tensors.items()}
    except (ValueError, TypeError, AttributeError) as error:
        what = " ".join(str(error).split())[:100]
        raise GenError(f"{path} is damaged ({what}); download or write it again") from None


def _plain(state: State, path: Path) -> State:
    """Under the names of the network alone: without the parts that wrappers add, and without their counters."""
    plain: State = {}
    for name, array in state.items():
        own = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if name in _COUNTERS and array.size <= 1:
            continue
        if own in plain:
            raise GenError(f"{path} has '{own}' twice, with and without a wrapper's name; save the bare model")
        plain[own] = array
    return plain


def _averaged_part(name: str) -> str:
    """The first part of a name where it says that the array is an average, else ""."""
    part, dot, _ = name.partition(".")
    return part if dot and _is_average(part) else ""


def _averaged(state: State, part: str, path: Path) -> State:
    """The state dict with the averages under `part` in the place of their raw weights.

    LitEma of latent diffusion writes names without dots; arrays that have no average (buffers, other networks) stay.
    """
    inside = {name.removeprefix(f"{part}."): array for name, array in state.items() if _averaged_part(name) == part}
    inside = {name: array for name, array in inside.items() if name not in _COUNTERS or array.size > 1}
    rest = {name: array for name, array in state.items() if not _averaged_part(name)}
    if not rest:
        return inside
    prefixes = {"", *(f"{name.partition('.')[0]}." for name in rest)}
    for prefix in sorted(prefixes):
        for dots in (True, False):
            raw: dict[str, str] = {}
            for name in rest:
                if name.startswith(prefix):
                    own = name.removeprefix(prefix)
                    raw[own if dots else own.replace(".", "")] = name
            if all(name in raw and rest[raw[name]].shape == array.shape for name, array in inside.items()):
                return rest | {raw[name]: array for name, array in inside.items()}
    lost = some(inside, 2)
    raise GenError(
        f"{path} holds averages under '{part}' ({lost}) that do not match its other arrays ({some(rest, 2)}); save the "
        "averaged model alone, or take the raw weights with --key"
    )
