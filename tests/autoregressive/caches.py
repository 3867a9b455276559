"""Small caches of tokens, sealed as those of a tokenizer of nothing."""

from pathlib import Path

import numpy as np

from gen.data.caches import seal_tokens

__all__ = ["token_cache"]


def token_cache(folder: Path, shape: tuple[int, ...] = (4, 4), vocabulary: int = 16, **others: np.ndarray) -> str:
    """A cache of eight rows of random tokens of three classes, and `others` beside them."""
    folder.mkdir(parents=True)
    tokens = np.random.default_rng(0).integers(0, vocabulary, (8, *shape)).astype(np.int32)
    for name, rows in {"tokens": tokens, "label": np.arange(8, dtype=np.int32) % 3, **others}.items():
        np.save(folder / f"{name}.npy", rows)
    return seal_tokens(folder, vocabulary=vocabulary, tokenizer="none", data="none").path
