"""Official weight names <-> our parameter paths, as a table of rules per published system.

A rule says how one of our arrays is made from official ones and back; both directions are exact, so that
``save(load(w)) == w``. ``{i}`` in a name runs over the blocks of a stack: ours carries the block on axis 0. A system
joins the project as a module with an `Importer` and a row in `gen.pretrained.systems.SYSTEMS`.
"""

import dataclasses
import fnmatch
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np

from gen.arrays import flatten, unflatten
from gen.config import from_json, suggest
from gen.errors import GenError
from gen.nn.network import param_shapes
from gen.pretrained.containers import some
from gen.tokenizers.base import Affine

__all__ = [
    "CONV",
    "LINEAR",
    "SAME",
    "Computed",
    "Importer",
    "LoadReport",
    "Rule",
    "Transform",
    "convolution",
    "joined",
    "linear",
    "load",
    "parted",
    "patches",
    "save",
]

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Transform:
    """A bijection between the official layout of an array and ours.

    Attributes:
      load: one array per official name -> ours; a tuple where one official array makes several of ours.
      save: ours -> the official arrays, in the same order.
    """

    load: Callable[..., Any]
    save: Callable[..., tuple[np.ndarray, ...]]


SAME = Transform(lambda a: a, lambda a: (a,))
LINEAR = Transform(lambda a: a.T, lambda a: (a.T,))  # (out, in) <-> (in, out)
# convolution kernels OIHW <-> HWIO
CONV = Transform(lambda a: a.transpose(2, 3, 1, 0), lambda a: (a.transpose(3, 2, 0, 1),))


def patches(patch: int) -> Transform:
    """Gives a patch convolution (D, C, p, p) as the dense layer (p p C, D) on `gen.nn.layers.patchify`'s tokens."""

    def back(a: np.ndarray) -> tuple[np.ndarray, ...]:
        return (a.reshape(patch, patch, -1, a.shape[1]).transpose(3, 2, 0, 1),)

    return Transform(lambda a: a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]), back)


def joined(count: int, inner: Transform = LINEAR) -> Transform:
    """Gives `count` official arrays of equal shape side by side on our last axis (separate q, k and v as one qkv)."""

    def back(a: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(inner.save(part)[0] for part in np.split(a, count, axis=-1))

    return Transform(lambda *parts: np.concatenate([inner.load(p) for p in parts], axis=-1), back)


def parted(count: int, inner: Transform = LINEAR) -> Transform:
    """Gives an official array whose first axis holds `count` equal parts, each one of our arrays (qkv as q, k and
    v).
    """

    def back(*parts: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.concatenate([inner.save(part)[0] for part in parts]),)

    return Transform(lambda a: tuple(inner.load(part) for part in np.split(a, count)), back)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Our array and the official ones it is made of, or our arrays and the official one that holds them.

    Attributes:
      official: name, or names where several official arrays make one of ours; ``{i}`` for the block.
      ours: "/"-joined path in our parameters, or paths.
    """

    official: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    transform: Transform = SAME

    @property
    def names(self) -> tuple[str, ...]:
        """Gives the official names, in order."""
        return (self.official,) if isinstance(self.official, str) else self.official

    @property
    def paths(self) -> tuple[str, ...]:
        """Gives our paths, in order."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def stacked(self) -> bool:
        """Tells whether the rule runs over blocks."""
        return "{i}" in self.names[0]


@dataclasses.dataclass(frozen=True)
class Computed:
    """An array that official files store and we compute: compared on load, written again on save.

    Attributes:
      atol: largest difference that is accepted on load.
      optional: whether a file may lack it.
    """

    official: str
    value: Any
    atol: float = 1e-6
    optional: bool = False


Rules = Sequence[Rule | Computed]


def linear(official: str, ours: str, bias: bool = True) -> list[Rule]:
    """Gives the rules of a dense layer: ``.weight`` -> ``/kernel`` and ``.bias`` -> ``/bias``."""
    return _layer(official, ours, LINEAR, bias)


def convolution(official: str, ours: str, bias: bool = True) -> list[Rule]:
    """Gives the rules of a 2-D convolution."""
    return _layer(official, ours, CONV, bias)


def _layer(official: str, ours: str, transform: Transform, bias: bool) -> list[Rule]:
    rules = [Rule(f"{official}.weight", f"{ours}/kernel", transform)]
    return [*rules, Rule(f"{official}.bias", f"{ours}/bias")] if bias else rules


@dataclasses.dataclass
class LoadReport:
    """How the names of a file match those that its system has. Names are official ones, except `fresh`: our paths.

    Attributes:
      matched: official arrays that were taken.
      missing: expected and not there.
      unexpected: there and not expected.
      misshaped: there in another shape, or with other values where a constant is expected; as text.
      fresh: our parameters that no official array fills.
      ignored: unexpected ones that were named as such.
    """

    matched: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    misshaped: list[str] = dataclasses.field(default_factory=list)
    fresh: list[str] = dataclasses.field(default_factory=list)
    ignored: list[str] = dataclasses.field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Tells whether nothing is in the way of the import."""
        return not (self.missing or self.unexpected or self.misshaped or self.fresh)

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} matched"]
        for what in ("missing", "unexpected", "misshaped", "fresh", "ignored"):
            names = getattr(self, what)
            if names:
                more = f", and {len(names) - 3} more" if len(names) > 3 else ""
                parts.append(f"{len(names)} {what} ({', '.join(names[:3])}{more})")
        return "; ".join(parts)


def load(
    rules: Rules, weights: Arrays, shapes: Any, *, ignore: Sequence[str] = (), fresh: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], LoadReport]:
    """Gives our parameters from an official state dict.

    Args:
      rules: the system's table.
      weights: official name -> array.
      shapes: our parameters as shapes (`gen.nn.network.param_shapes`); arrays are cast to their dtypes.
      ignore: patterns of official names that may be left over.
      fresh: values, by our "/"-joined path, for parameters that the file does not have (new heads).

    Returns:
      the nested parameters and what was found.

    Raises GenError with the report in one line when anything is missing, unexpected, misshaped or new and not named.
    """
    report = LoadReport()
    targets = flatten(shapes)
    params: dict[str, Any] = {}
    taken: set[str] = set()
    for rule in rules:
        if isinstance(rule, Computed):
            _check_computed(rule, weights, report)
            taken.add(rule.official)
            continue
        unknown = [path for path in rule.paths if path not in targets]
        if unknown:
            raise GenError(f"the import table names '{unknown[0]}', which the network lacks; correct the table")
        into = {path: targets[path] for path in rule.paths}
        groups = _names(rule, into[rule.paths[0]].shape[0]) if rule.stacked else [rule.names]
        taken.update(name for group in groups for name in group)
        absent = [name for group in groups for name in group if name not in weights]
        report.missing += absent
        if not absent:
            _take(rule, groups, weights, into, params, report)
    # a pickled module's class (`gen.pretrained.nvidia_pickle`) is no array of it
    left = [name for name in weights if name not in taken and not name.startswith("class:")]
    report.ignored = [name for name in left if any(fnmatch.fnmatchcase(name, p) for p in ignore)]
    report.unexpected = [name for name in left if name not in report.ignored]
    filled = {path for rule in rules if isinstance(rule, Rule) for path in rule.paths}
    for path in targets:
        if path not in filled:
            if fresh is not None and path in fresh:
                params[path] = np.asarray(fresh[path], targets[path].dtype)
            else:
                report.fresh.append(path)
    if not report.clean:
        raise GenError(
            f"the weights do not fit: {report}; the file has {some(weights)}; give the file that this configuration "
            "was made for"
        )
    return unflatten(params), report


def _names(rule: Rule, depth: int) -> list[tuple[str, ...]]:
    return [tuple(name.replace("{i}", str(i)) for name in rule.names) for i in range(depth)]


def _check_computed(rule: Computed, weights: Arrays, report: LoadReport) -> None:
    value = np.asarray(rule.value)
    if rule.official not in weights:
        if not rule.optional:
            report.missing.append(rule.official)
    elif weights[rule.official].shape != value.shape:
        report.misshaped.append(f"{rule.official} {weights[rule.official].shape} for {value.shape}")
    elif not _equal(weights[rule.official], value, rule.atol):
        report.misshaped.append(f"{rule.official} with other values than this configuration computes")
    else:
        report.matched.append(rule.official)


def _equal(stored: np.ndarray, value: np.ndarray, atol: float) -> bool:
    """Whether a file's array has these values, up to `atol` and to the rounding of the type that it is stored in."""
    rtol = 0.0
    if stored.dtype.itemsize < 4 and not np.issubdtype(stored.dtype, np.integer) and stored.dtype != bool:
        value, rtol = value.astype(stored.dtype), float(ml_dtypes.finfo(stored.dtype).eps)
    return np.allclose(stored.astype(np.float64), value.astype(np.float64), rtol=rtol, atol=atol)


def _take(
    rule: Rule,
    groups: list[tuple[str, ...]],
    weights: Arrays,
    targets: Mapping[str, Any],
    params: dict[str, Any],
    report: LoadReport,
) -> None:
    """Transforms the arrays of one rule into `params`, or notes why not."""
    shapes = [tuple(t.shape[1:] if rule.stacked else t.shape) for t in targets.values()]
    results = [np.empty(target.shape, target.dtype) for target in targets.values()]
    for i, group in enumerate(groups):
        try:
            made = rule.transform.load(*(np.asarray(weights[name]) for name in group))
        except (ValueError, IndexError, TypeError):
            made = ()
        arrays = made if isinstance(made, tuple) else (made,)
        if [array.shape for array in arrays] != shapes:
            found = ", ".join(str(weights[name].shape) for name in group)
            report.misshaped.append(f"{group[0]} {found} for ours {', '.join(map(str, shapes))}")
            return
        for result, array in zip(results, arrays, strict=True):
            result[(i,) if rule.stacked else ()] = array
    params.update(zip(targets, results, strict=True))
    report.matched += [name for group in groups for name in group]


def save(rules: Rules, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Gives the official state dict of our parameters: the inverse of `load`.

    Raises GenError for parameters that the official format has no place for, or that are missing.
    """
    ours = flatten(params)
    weights: dict[str, np.ndarray] = {}
    for rule in rules:
        if isinstance(rule, Computed):
            weights[rule.official] = np.asarray(rule.value)
            continue
        lacking = [path for path in rule.paths if path not in ours]
        if lacking:
            raise GenError(
                f"the parameters lack '{lacking[0]}'; export parameters of the same system and configuration"
            )
        arrays = [np.asarray(ours.pop(path)) for path in rule.paths]
        groups = _names(rule, len(arrays[0])) if rule.stacked else [rule.names]
        for i, group in enumerate(groups):
            parts = rule.transform.save(*(array[i] if rule.stacked else array for array in arrays))
            weights |= {name: np.asarray(part, order="C") for name, part in zip(group, parts, strict=True)}
    if ours:
        raise GenError(f"the official format has no place for {', '.join(sorted(ours)[:4])}; export without them")
    return weights


def depth_of(weights: Arrays, pattern: str) -> int:
    """Tells how many blocks a state dict has, from a name with ``{i}``; 0 for none. For `Importer.config`."""
    expression = re.compile(re.escape(pattern).replace(r"\{i\}", r"(\d+)"))
    found = [int(match[1]) for match in map(expression.fullmatch, weights) if match]
    return max(found, default=-1) + 1


@dataclasses.dataclass(frozen=True)
class Importer:
    """A published system.

    Attributes:
      name: its key in `gen.pretrained.systems.SYSTEMS`.
      signature: official names that only this system has together; a file with all of them is taken for one (for
        the system that asks for more, where one's names are among another's). Empty where names do not tell it from
        another system: the user then says which it is.
      config: the network configuration, inferred from a state dict; options that shapes do not tell (heads) may be
        given by keyword.
      rules: the table for a configuration.
      generator: the Generator with the system's official sampler, from the network configuration; None for systems
        that make no images by themselves.
      ignore: patterns of official names without a place in our network (buffers).
      role: what the parameters are in a run folder.
      normalizer: the published one of the latents that the network works on (`gen.tokenizers.base.Affine`); None for
        pixels, and where it comes in a file of its own.
      alike: systems whose files have the same names and shapes, so that nothing in a file tells them apart.
    """

    name: str
    signature: tuple[str, ...]
    config: Callable[..., Any]
    rules: Callable[[Any], Rules]
    generator: Callable[[Any], Any] | None
    ignore: tuple[str, ...] = ()
    role: Literal["net", "tokenizer"] = "net"
    normalizer: Affine | None = None
    alike: tuple[str, ...] = ()

    @property
    def network(self) -> Any:
        """Gives the type of the network configurations that it makes."""
        return typing.get_type_hints(self.config)["return"]

    def infer(self, weights: Arrays, **options: Any) -> Any:
        """Gives the network configuration of a state dict; raises GenError for an option that this system does not
        have.
        """
        hints = typing.get_type_hints(self.config)
        known = [k for k, v in inspect.signature(self.config).parameters.items() if v.kind is v.KEYWORD_ONLY]
        for name, value in options.items():
            if name not in known:
                raise GenError(f"{self.name} weights have no option '{name}'; {suggest(name, known)}")
            options[name] = from_json(value, hints[name], name)
        return self.config(weights, **options)

    def load(self, weights: Arrays, config: Any = None) -> tuple[Any, dict[str, Any], LoadReport]:
        """Gives (network configuration, parameters, report); the configuration is inferred when not given."""
        config = self.infer(weights) if config is None else config
        params, report = load(self.rules(config), weights, param_shapes(config), ignore=self.ignore)
        return config, params, report

    def save(self, config: Any, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Gives the official state dict; exact inverse of `load`."""
        return save(self.rules(config), jax.device_get(params))
