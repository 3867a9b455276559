"""Class labels where they enter: one check for every reader, and one for where a model meets the data.

Labels are whole numbers from 0. What libraries store besides (-1 for "unknown", fractions, one-hot rows, counting from
1) would train as the null class or as NaN; it is refused with the name of the first such row.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gen.errors import GenError

__all__ = ["MAX_LABEL", "check_classes", "checked", "class_count", "fits", "missing_classes"]

MAX_LABEL = 2**31 - 1


def checked(labels: Any, title: Callable[[int], str]) -> np.ndarray:
    """Class labels (N,) of any integer type, as int32.

    Args:
      labels: the labels; what is not integers is refused.
      title: how messages call row i.

    Raises:
      GenError: fractions, one-hot rows, negative numbers or numbers beyond 2^31 - 1; it names the first such row.
    """
    array = np.asarray(labels)
    if array.ndim != 1:
        raise GenError(
            f"{title(0)} has a label of shape {array.shape[1:]}; expected one class number for each, from 0 on: of "
            "one-hot rows take the argmax"
        )
    if array.dtype.kind not in "iu":
        row = int(np.argmax(array != np.floor(array))) if array.dtype.kind == "f" and len(array) else 0
        given = array[row] if len(array) else "none"
        raise GenError(
            f"{title(row)} has label {given} ({array.dtype}); expected class numbers as integers, from 0 on: store "
            "the labels as int32"
        )
    outside = (array < 0) | (array > MAX_LABEL)
    if outside.any():
        row = int(np.argmax(outside))
        raise GenError(f"{title(row)} has label {array[row]}; expected a class from 0 on, correct the labels")
    return array.astype(np.int32, copy=False)


def class_count(label: np.ndarray | None, names: Sequence[str] | None, title: Callable[[int], str]) -> int | None:
    """Tells how many classes checked labels (N,) are of: as many as there are names, else the largest + 1; None
    without.

    Raises GenError when a label is beyond the names; it names the first such row.
    """
    if label is None:
        return None
    if not names:
        return int(np.max(label, initial=-1)) + 1
    if (beyond := label >= len(names)).any():
        row = int(np.argmax(beyond))
        raise GenError(
            f"{title(row)} has label {label[row]}, but there are {len(names)} class names, of 0 to {len(names) - 1}; "
            "name every class, or none"
        )
    return len(names)


def fits(label: np.ndarray, classes: int, title: Callable[[int], str], flag: str = "") -> None:
    """Raises GenError when a label (N,) is beyond a model's `classes`; it names the first such row.

    Args:
      label: checked labels.
      classes: number of classes the model knows.
      title: how messages call row i.
      flag: the flag that gives the model more classes, without its value, such as
        ``--stages.0.task.denoiser.network.num_classes``; "" where there is none.
    """
    beyond = np.asarray(label) >= classes
    if not beyond.any():
        return
    row, largest = int(np.argmax(beyond)), int(np.max(label))
    advice = f"train with {flag} {largest + 1}" if flag else "use data of these classes, or a model of more"
    if largest == classes and int(np.min(label)) == 1:
        advice = f"the labels count from 1, subtract 1, or {advice}"
    raise GenError(
        f"{title(row)} has label {label[row]}; the model knows {classes} classes, 0 to {classes - 1}: {advice}"
    )


def check_classes(path: str, source: Any, classes: int, flag: str) -> None:
    """Raises GenError unless the labels of `source` suit a model of `classes` classes; to be called before step 1.

    Args:
      path: how messages call the data.
      source: a `gen.data.loader.Source`.
      classes: number of classes the model is conditioned on; 0 for an unconditional one, which takes anything.
      flag: the flag that sets the number, without its value; "" where there is none.
    """
    if not classes:
        return
    if source.label is None:
        without = ", or train a model without classes: gen train --unconditional" if flag else ""
        raise GenError(
            f"{path} has no class labels, and the model is conditioned on {classes} classes; put the images of each "
            f"class in a folder of its own{without}"
        )
    fits(source.label, classes, source.title, flag)


def missing_classes(path: str, source: Any, classes: int, flag: str) -> str | None:
    """Gives a sentence that says that the data have fewer classes than the model, and which flag helps; None when not.

    Such a model trains well on the classes that it sees; those beyond stay what they were at the start, and samples of
    them mean nothing. Takes the arguments of `check_classes`.
    """
    known = source.num_classes
    if known is None or known >= classes:
        return None
    return (
        f"{path} has {known} classes, the model {classes}: those from {known} on are never trained; {flag} {known} "
        "leaves them out"
    )
