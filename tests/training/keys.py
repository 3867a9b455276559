"""Which PRNG keys a function uses: a key that is drawn from or split twice gives numbers that are not independent."""

from collections import Counter
from typing import Any

import jax
import numpy as np
from jax.extend import random

__all__ = ["Uses"]


class Uses:
    """A PRNG like JAX's own that counts how often every key is drawn from or split.

    `fold_in` is not counted, for it is meant to be called many times on one key; that a key is both folded and split
    shows where the two give the same key: ``fold_in(key, i)`` is ``split(key, n)[i]``.
    """

    def __init__(self) -> None:
        self.counts: Counter[bytes] = Counter()
        own = random.threefry_prng_impl

        def split(key: Any, shape: Any) -> Any:
            jax.debug.callback(self._count, key)
            return own.split(key, shape)

        def random_bits(key: Any, width: int, shape: Any) -> Any:
            jax.debug.callback(self._count, key)
            return own.random_bits(key, width, shape)

        self.impl = random.define_prng_impl(
            key_shape=own.key_shape, seed=own.seed, split=split, random_bits=random_bits, fold_in=own.fold_in
        )

    def _count(self, key: Any) -> None:
        self.counts[np.asarray(key).tobytes()] += 1

    def key(self, seed: int) -> jax.Array:
        """A key whose uses, and those of all keys made from it, are counted here."""
        return jax.random.key(seed, impl=self.impl)

    def forget(self) -> None:
        """Counts from nothing again."""
        jax.effects_barrier()
        self.counts.clear()

    def repeated(self) -> int:
        """How many keys were used more than once; to be asked when the function's results are there."""
        jax.effects_barrier()
        return sum(count > 1 for count in self.counts.values())
