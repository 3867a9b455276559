"""Small caches of tokens and of bits, sealed as those of a tokenizer of nothing."""

from pathlib import Path

import numpy as np

from gen.data.caches import seal_bits, seal_tokens

__all__ = ["bit_cache", "token_cache"]


def token_cache(folder: Path, shape: tuple[int, ...] = (4, 4), vocabulary: int = 16, **others: np.ndarray) -> str:
    """A cache of eight rows of random tokens of three classes, and `others` beside them."""
    folder.mkdir(parents=True)
    tokens = np.random.default_rng(0).integers(0, vocabulary, (8, *shape)).astype(np.int32)
    for name, rows in {"tokens": tokens, "label": np.arange(8, dtype=np.int32) % 3, **others}.items():
        np.save(folder / f"{name}.npy", rows)
    return seal_tokens(folder, vocabulary=vocabulary, tokenizer="none", data="none").path


def bit_cache(folder: Path, shape: tuple[int, ...] = (8, 6)) -> str:
    """A cache of eight rows of random bits of three classes."""
    folder.mkdir(parents=True)
    np.save(folder / "bits.npy", np.random.default_rng(0).integers(0, 2, (8, *shape)).astype(np.uint8))
    np.save(folder / "label.npy", np.arange(8, dtype=np.int32) % 3)
    return seal_bits(folder, tokenizer="none", data="none").path
