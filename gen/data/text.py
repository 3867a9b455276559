"""Text features as sequences with their mask: "text" (N, T, D) float16 or float32 and "text_mask" (N, T) bool.

The sequences of a data set are padded with zeros to one length T; the mask is True where a position holds a token.
Features without a mask count in full, as those of encoders that always fill their length do. Vectors (N, D), one per
caption, need no mask.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gen.errors import GenError

__all__ = ["checked", "lengthened", "padded"]


def padded(sequences: Sequence[np.ndarray], title: Callable[[int], str]) -> tuple[np.ndarray, np.ndarray]:
    """Gives features of different lengths, N arrays (T_i, D), as one array (N, T, D) of the longest's length, with its
    mask.

    Raises:
      GenError: features of another shape or width, without a token, or NaN; it names the first such row.
    """
    first = sequences[0]
    for row, sequence in enumerate(sequences):
        if sequence.ndim != 2 or not len(sequence) or sequence.shape[1] != first.shape[-1]:
            raise GenError(
                f"{title(row)} has text features of shape {sequence.shape}; expected (tokens, {first.shape[-1]}) as "
                "the first has, with one token or more"
            )
        if sequence.dtype.kind != "f" or not np.isfinite(sequence).all():
            raise GenError(f"{title(row)} has text features that are NaN, infinite or no floating-point numbers")
    dtype = np.float16 if all(sequence.dtype == np.float16 for sequence in sequences) else np.float32
    text = np.zeros((len(sequences), max(map(len, sequences)), first.shape[1]), dtype)
    mask = np.zeros(text.shape[:2], bool)
    for row, sequence in enumerate(sequences):
        text[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = True
    return text, mask


def lengthened(sequence: np.ndarray, length: int) -> np.ndarray:
    """Gives one row of text (T, D) or of its mask (T,), padded with zeros (False) to `length` >= T positions."""
    more = length - len(sequence)
    return np.pad(sequence, [(0, more)] + [(0, 0)] * (sequence.ndim - 1)) if more else sequence


def checked(arrays: Mapping[str, np.ndarray], title: Callable[[int], str]) -> dict[str, np.ndarray]:
    """Gives `arrays` by name, with "text_mask" beside a "text" of sequences: every position counts where none is given.

    Raises:
      GenError: a "text" that is no floating-point (N, D) or (N, T, D); a mask that is no bool (N, T), has no text, or
        leaves a row without a token.
    """
    text, mask = arrays.get("text"), arrays.get("text_mask")
    if text is None and mask is None:
        return dict(arrays)
    if text is None or text.ndim not in (2, 3) or text.dtype.kind != "f" or (text.ndim == 2 and mask is not None):
        given = "no text" if text is None else f"text {text.dtype} {text.shape}"
        raise GenError(
            f"{title(0)} has {given}{'' if mask is None else ' with a mask'}; expected text as floating-point (N, D) "
            "vectors, or (N, T, D) sequences with text_mask (N, T)"
        )
    if text.ndim == 2:
        return dict(arrays)
    if mask is None:
        return dict(arrays) | {"text_mask": np.broadcast_to(np.True_, text.shape[:2])}
    if mask.dtype != np.bool_ or mask.shape != text.shape[:2]:
        raise GenError(
            f"{title(0)} has text_mask {mask.dtype} {mask.shape} for text {text.shape}; expected bool {text.shape[:2]}"
        )
    if not (some := mask.any(axis=1)).all():
        raise GenError(
            f"{title(int(np.argmin(some)))} has a text_mask without a token; expected one or more, encode the empty "
            "caption as the encoder does"
        )
    return dict(arrays)
