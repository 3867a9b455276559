"""Conditions: what a model is conditioned on, and how previews, sampling and evaluation make it.

A network's configuration declares its conditions by name. Everything that makes images asks that declaration alone:
which arrays are needed, of which shape and type, and what an image gets when the user says nothing.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gen.errors import GenError

__all__ = ["Condition", "Conditions", "class_count", "empty_conditions", "has_defaults", "label", "make_conditions"]


@dataclasses.dataclass(frozen=True)
class Condition:
    """One input that a model is conditioned on.

    What "unconditional" means is the network's own business (its ``null``), because it may be learned.

    Attributes:
      shape: shape of one sample's array; () for a label, (T, D) for a sequence of features.
      dtype: NumPy name of its type.
      classes: number of classes of a label, whose values are 0 to classes - 1; 0 for every other condition.
      mask: name of the bool array (T,) that says which entries of a sequence are real; "" where there is none.
      default: the value of every entry where nothing is given; None for conditions that must be given. A label's
        default is the seed mod its classes.
    """

    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    classes: int = 0
    mask: str = ""
    default: float | None = None


Conditions = Mapping[str, Condition]  # by name: label, text, pooled, guidance ...


def label(classes: int) -> dict[str, Condition]:
    """Gives the conditions of a class-conditional network; none where `classes` is 0."""
    return {"label": Condition((), "int32", classes)} if classes else {}


def class_count(conditions: Conditions) -> int | None:
    """Gives the number of classes of the condition "label"; None for models without one."""
    return conditions["label"].classes if "label" in conditions else None


def has_defaults(conditions: Conditions) -> bool:
    """Tells whether `make_conditions` needs nothing to be given."""
    return all(condition.classes or condition.default is not None for condition in conditions.values())


def empty_conditions(conditions: Conditions, count: int) -> dict[str, np.ndarray]:
    """Zeros in place of every condition, and masks of nothing: for tracing, where values do not matter."""
    made = {name: np.zeros((count, *c.shape), c.dtype) for name, c in conditions.items()}
    return made | {c.mask: np.zeros((count, *c.shape[:1]), bool) for c in conditions.values() if c.mask}


def make_conditions(
    conditions: Conditions, seeds: Sequence[int] | np.ndarray, given: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """Gives the arrays that samples with these seeds are made with.

    Args:
      conditions: what the model declares.
      seeds: (N,) integers; a label that is not given is seed mod classes.
      given: arrays by name: one value for all samples, or one each (leading axis N). A sequence that is given without
        its mask is real from end to end.

    Returns:
      Arrays by name with leading axis N, each mask beside its sequence.

    Raises:
      GenError: a condition that the model does not know or that is missing; a label out of range; a wrong shape.
    """
    numbers, given = np.asarray(seeds), {k: v for k, v in (given or {}).items() if v is not None}
    masks = {c.mask: name for name, c in conditions.items() if c.mask}
    for name in given:
        if name == "label" and "label" not in conditions:
            raise GenError("this model is not class-conditional; leave the label out")
        if name not in conditions and name not in masks:
            known = ", ".join(conditions) or "nothing"
            raise GenError(f"this model is not conditioned on '{name}'; it takes {known}")
    made: dict[str, np.ndarray] = {}
    for name, condition in conditions.items():
        if name in given:
            made[name] = _rows(name, condition, np.asarray(given[name]), len(numbers))
        elif condition.classes:
            made[name] = (numbers % condition.classes).astype(np.int32)
        elif condition.default is not None:
            made[name] = np.full((len(numbers), *condition.shape), condition.default, condition.dtype)
        else:
            raise GenError(
                f"this model is conditioned on '{name}' {condition.shape}, which has no default; give an array of it"
            )
        if condition.mask:
            mask = Condition(condition.shape[:1], "bool")
            real = given.get(condition.mask, np.ones(condition.shape[:1], bool))
            made[condition.mask] = _rows(condition.mask, mask, np.asarray(real), len(numbers))
    return made


def _rows(name: str, condition: Condition, value: np.ndarray, count: int) -> np.ndarray:
    """`value` with one row for each of `count` samples."""
    if value.shape == condition.shape:
        value = np.broadcast_to(value, (count, *condition.shape))
    if value.shape[1:] != condition.shape:
        raise GenError(f"'{name}' is {value.shape}; expected {condition.shape}, or as many of them as there are seeds")
    if len(value) != count:
        raise GenError(f"{len(value)} {name}s for {count} seeds; give one {name}, or one per seed")
    if condition.classes:
        bad = value[(value < 0) | (value >= condition.classes)]
        if bad.size:
            raise GenError(f"label {bad[0]} is out of range; this model has classes 0 to {condition.classes - 1}")
    return value.astype(condition.dtype)
