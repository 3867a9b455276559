"""The Inception Score (Salimans et al. 2016), streamed: exact without any logits being kept."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.errors import GenError
from gen.metrics.statistics import Accumulator, Shapes

__all__ = ["InceptionScore", "inception_score"]


@dataclasses.dataclass(frozen=True)
class InceptionScore:
    """exp of the mean divergence of p(y|x) from its mean, over all 1008 classes without the output bias.

    The samples are split, scored split by split, and the mean and spread (over N) of the splits reported.

    Attributes:
      count: number of samples in all: it decides which split a sample is in.
      splits: number of contiguous parts, with boundaries at i N // splits.
      shuffle: permute the samples first, by a fixed permutation: for samples in order of class.
      seed: of that permutation, numpy's legacy one; by default torch-fidelity's.
      chunk: instead of `splits`, parts of so many samples, the last one shorter (ADM: 5000).
    """

    count: int
    splits: int = 10
    shuffle: bool = False
    chunk: int = 0
    seed: int = 2020

    def parts(self) -> np.ndarray:
        """Gives the split of every sample, (count,) int32."""
        position = np.arange(self.count)
        if self.chunk:
            return (position // self.chunk).astype(np.int32)
        bounds = np.arange(1, self.splits) * self.count // self.splits
        split = np.searchsorted(bounds, position, side="right").astype(np.int32)
        if not self.shuffle:
            return split
        shuffled = np.empty_like(split)
        shuffled[np.random.RandomState(self.seed).permutation(self.count)] = split
        return shuffled

    def init(self, shapes: Shapes, span: int) -> Accumulator:
        """Does what `Statistic.init` says. Raises GenError for more splits than samples."""
        number = -(-self.count // self.chunk) if self.chunk else self.splits
        if not 1 <= number <= self.count:
            raise GenError(f"{number} splits of {self.count} samples; expected at least one sample in each; use fewer")
        classes = shapes["unbiased_logits"].shape[-1]
        return {
            "seen": jnp.zeros(number),
            "negentropy": jnp.zeros(number),
            "probabilities": jnp.zeros((number, classes)),
        }

    def update(
        self, accumulator: Accumulator, batch: Mapping[str, jax.Array], weight: jax.Array, index: jax.Array
    ) -> Accumulator:
        """Does what `Statistic.update` says."""
        split = jnp.asarray(self.parts())[jnp.minimum(index, self.count - 1)]
        # where, not a product: whatever stands in padded rows must not get through
        logp = jax.nn.log_softmax(jnp.where(weight[:, None] > 0, batch["unbiased_logits"], 0))
        p = jnp.exp(logp) * weight[:, None]
        return {
            "seen": accumulator["seen"].at[split].add(weight),
            "negentropy": accumulator["negentropy"].at[split].add((p * logp).sum(-1)),
            "probabilities": accumulator["probabilities"].at[split].add(p),
        }

    def merge(self, a: Accumulator, b: Accumulator) -> Accumulator:
        """Does what `Statistic.merge` says."""
        return {name: np.asarray(array, np.float64) + b[name] for name, array in a.items()}

    def finalise(self, accumulator: Accumulator) -> dict[str, Any]:
        """Gives ``inception_score``, and ``inception_score_spread``: standard deviation over the splits.

        Raises GenError when a split is empty (fewer samples than `count`).
        """
        seen, negentropy, total = (
            np.asarray(accumulator[name], np.float64) for name in ("seen", "negentropy", "probabilities")
        )
        if (seen == 0).any():
            raise GenError(f"{seen.sum():.0f} of {self.count} samples were seen; expected all; evaluate the rest")
        mean = total / seen[:, None]
        marginal = (mean * np.log(np.where(mean > 0, mean, 1))).sum(1)
        scores = np.exp(negentropy / seen - marginal)
        return {"inception_score": np.float64(scores.mean()), "inception_score_spread": np.float64(scores.std())}


def inception_score(logits: np.ndarray, statistic: InceptionScore) -> dict[str, Any]:
    """Gives the score of given logits (N, K), in float64 on the host; see `InceptionScore`."""
    rows = logits.astype(np.float64)
    rows = rows - rows.max(1, keepdims=True)
    logp = rows - np.log(np.exp(rows).sum(1, keepdims=True))
    p, split = np.exp(logp), statistic.parts()
    number = int(split.max()) + 1
    total = np.zeros((number, rows.shape[1]))
    np.add.at(total, split, p)
    sums = {
        "seen": np.bincount(split, minlength=number),
        "negentropy": np.bincount(split, (p * logp).sum(1), minlength=number),
        "probabilities": total,
    }
    return statistic.finalise(sums)
