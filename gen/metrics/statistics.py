"""Statistics gathered in one pass over samples: small accumulators, updated on device, merged on the host.

An accumulator is a flat dict of arrays. `update` runs inside the jitted evaluation step on float32 arrays; every few
thousand samples the accumulator is fetched and merged, in float64, into the host's. `merge` is associative
up to rounding, so partial results of several jobs merge the same way.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gen.errors import GenError
from gen.features.extractor import Extractor

__all__ = ["Accumulator", "Accuracy", "Features", "Moments", "Statistic", "basic_statistics", "finalised"]

Accumulator = dict[str, Any]  # arrays by name: jax on device, numpy (floats as float64) on the host
_MANY = 100  # classes from which on the first five are of interest
Shapes = Mapping[str, Any]  # name -> something with .shape, leading axis = batch


class Statistic(Protocol):
    """One quantity gathered over samples. Implementations are frozen dataclasses."""

    def init(self, shapes: Shapes, span: int) -> Accumulator:
        """Gives the accumulator of no samples on the device, for batches of these shapes.

        Args:
          span: how many samples, of consecutive indices, it takes at most before the host fetches it.
        """
        ...

    def update(
        self, accumulator: Accumulator, batch: Mapping[str, jax.Array], weight: jax.Array, index: jax.Array
    ) -> Accumulator:
        """Adds a batch; is pure and jittable.

        Args:
          batch: arrays (B, ...) by name: ``features`` (B, D), ``logits`` (B, K), ``label`` (B,) where there are any.
          weight: (B,) float32, 1 for a sample and 0 for padding.
          index: (B,) int32, global sample indices.
        """
        ...

    def merge(self, a: Accumulator, b: Accumulator) -> Accumulator:
        """Gives the accumulator of two disjoint sets of samples, on the host."""
        ...

    def finalise(self, accumulator: Accumulator) -> dict[str, Any]:
        """Gives what the samples amount to, by name (host arrays)."""
        ...


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and covariance of the features: count, mean, and the sum of centred outer products (Chan et al. 1979).

    Attributes:
      key: which of the extractor's outputs.
    """

    key: str = "features"

    @staticmethod
    def of(features: Any, weight: Any = None) -> Accumulator:
        """Gives the accumulator of one batch (B, D); centred on its own mean, so float32 loses nothing to
        cancellation.
        """
        np_ = jnp if isinstance(features, jax.Array) else np
        weight = np_.ones(len(features), features.dtype) if weight is None else weight
        count = weight.sum()
        # where, not a product: whatever stands in padded rows must not get through
        rows = np_.where(weight[:, None] > 0, features, 0)
        mean = rows.sum(0) / np_.maximum(count, 1)
        centred = (rows - mean) * weight[:, None]
        scatter = jnp.matmul(centred.T, centred, precision="highest") if np_ is jnp else centred.T @ centred
        return {"count": count, "mean": mean, "scatter": scatter}

    def init(self, shapes: Shapes, span: int) -> Accumulator:
        """Does what `Statistic.init` says."""
        dim = shapes[self.key].shape[-1]
        return {"count": jnp.zeros(()), "mean": jnp.zeros(dim), "scatter": jnp.zeros((dim, dim))}

    def update(
        self, accumulator: Accumulator, batch: Mapping[str, jax.Array], weight: jax.Array, index: jax.Array
    ) -> Accumulator:
        """Does what `Statistic.update` says."""
        return self.merge(accumulator, self.of(batch[self.key], weight))

    def merge(self, a: Accumulator, b: Accumulator) -> Accumulator:
        """Does what `Statistic.merge` says."""
        np_ = jnp if isinstance(a["count"], jax.Array) else np
        if np_ is np:
            a, b = ({name: np.asarray(array, np.float64) for name, array in side.items()} for side in (a, b))
        count = a["count"] + b["count"]
        share = b["count"] / np_.maximum(count, 1)
        delta = b["mean"] - a["mean"]
        return {
            "count": count,
            "mean": a["mean"] + delta * share,
            "scatter": a["scatter"] + b["scatter"] + np_.outer(delta, delta) * (a["count"] * share),
        }

    def finalise(self, accumulator: Accumulator) -> dict[str, Any]:
        """Gives ``count`` (), ``mean`` (D,), ``covariance`` (D, D) with count - 1 in the denominator.

        The names start with the key and an underscore for another key than "features".

        Raises GenError for fewer than two samples.
        """
        count = float(accumulator["count"])
        if count < 2:
            raise GenError(f"a covariance of {count:.0f} samples; expected at least 2; evaluate more samples")
        covariance = np.asarray(accumulator["scatter"], np.float64) / (count - 1)
        prefix = "" if self.key == "features" else f"{self.key}_"
        return {
            f"{prefix}count": np.float64(count),
            f"{prefix}mean": np.asarray(accumulator["mean"], np.float64),
            f"{prefix}covariance": (covariance + covariance.T) / 2,
        }


@dataclasses.dataclass(frozen=True)
class Features:
    """The features of the samples with index below `limit`, whole, for the measures that need neighbours.

    Chosen by index, so the set depends on neither batch size nor number of devices. On the device only the rows of one
    span are held, each in the slot of its index modulo the span; the host strings them together.

    Attributes:
      limit: how many.
      key: which of the arrays by sample: an output of the extractor, "label", or "levels" for the images.
      dtype: that the rows are kept in.
      name: what the rows are called when finished; the key by default.
    """

    limit: int
    key: str = "features"
    dtype: str = "float32"
    name: str = ""

    def init(self, shapes: Shapes, span: int) -> Accumulator:
        """Does what `Statistic.init` says."""
        held = min(self.limit, span)
        rows = jnp.zeros((held, *shapes[self.key].shape[1:]), self.dtype)
        return {"rows": rows, "index": jnp.full(held, -1, jnp.int32)}

    def update(
        self, accumulator: Accumulator, batch: Mapping[str, jax.Array], weight: jax.Array, index: jax.Array
    ) -> Accumulator:
        """Does what `Statistic.update` says."""
        held = len(accumulator["index"])
        where = jnp.where((weight > 0) & (index < self.limit), index % held, held)  # the rest falls off the end
        rows = batch[self.key]
        if self.dtype == "uint8":  # a cubic filter overshoots
            rows = jnp.clip(jnp.round(rows), 0, 255)
        return {
            "rows": accumulator["rows"].at[where].set(rows.astype(self.dtype), mode="drop"),
            "index": accumulator["index"].at[where].set(index, mode="drop"),
        }

    def merge(self, a: Accumulator, b: Accumulator) -> Accumulator:
        """Does what `Statistic.merge` says."""
        there = [np.asarray(side["index"]) >= 0 for side in (a, b)]
        if there[0].all() and not there[1].any():  # past the limit: nothing to copy
            return a
        return {k: np.concatenate([np.asarray(s[k])[t] for s, t in zip((a, b), there, strict=True)]) for k in a}

    def finalise(self, accumulator: Accumulator) -> dict[str, Any]:
        """Gives the rows by `name`, (min(N, limit), ...) in index order."""
        index = np.asarray(accumulator["index"])
        order = np.argsort(index, kind="stable")[(index < 0).sum() :]
        return {self.name or self.key: np.asarray(accumulator["rows"])[order]}


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How often the classifier of the extractor reads the label a sample was made for, and nearly does.

    Nearly is among the five classes it holds most likely, and of interest where there are many classes.
    """

    def init(self, shapes: Shapes, span: int) -> Accumulator:
        """Does what `Statistic.init` says."""
        classes = shapes["logits"].shape[-1]
        names = ("right", "seen") if classes < _MANY else ("right", "seen", "near")
        return {name: jnp.zeros(classes) for name in names}

    def update(
        self, accumulator: Accumulator, batch: Mapping[str, jax.Array], weight: jax.Array, index: jax.Array
    ) -> Accumulator:
        """Does what `Statistic.update` says."""
        logits, label = batch["logits"], batch["label"]
        counts = {"right": logits.argmax(-1) == label, "seen": jnp.ones(len(label), bool)}
        if "near" in accumulator:
            counts["near"] = (jax.lax.top_k(logits, 5)[1] == label[:, None]).any(-1)
        return {name: accumulator[name].at[label].add(counts[name] * weight) for name in accumulator}

    def merge(self, a: Accumulator, b: Accumulator) -> Accumulator:
        """Does what `Statistic.merge` says."""
        return {name: np.asarray(array, np.float64) + b[name] for name, array in a.items()}

    def finalise(self, accumulator: Accumulator) -> dict[str, Any]:
        """Gives ``accuracy`` () in [0, 1], and ``top5_accuracy`` () of 100 classes or more; ``class_accuracy`` (K,),
        NaN for a class without samples; ``class_count`` (K,).
        """
        counts = {name: np.asarray(array, np.float64) for name, array in accumulator.items()}
        seen = counts["seen"]
        with np.errstate(invalid="ignore"):
            per_class = counts["right"] / seen
        shares = {name: np.float64(array.sum() / max(seen.sum(), 1)) for name, array in counts.items()}
        found = {"accuracy": shares["right"], "class_accuracy": per_class, "class_count": seen}
        return found | ({"top5_accuracy": shares["near"]} if "near" in shares else {})


def basic_statistics(extractor: Extractor, labelled: bool, limit: int) -> dict[str, Statistic]:
    """Gives what references and samples both need: moments, the first `limit` samples' features, and their labels."""
    statistics: dict[str, Statistic] = {"moments": Moments(), "features": Features(limit)}
    if "spatial" in extractor.outputs:
        statistics["spatial"] = Moments("spatial")
    if labelled:
        statistics["labels"] = Features(limit, "label")
    return statistics


def finalised(statistics: Mapping[str, Statistic], accumulators: Mapping[str, Accumulator]) -> dict[str, Any]:
    """Gives what all statistics amount to, by the names they give."""
    return {k: v for name, s in statistics.items() for k, v in s.finalise(accumulators[name]).items()}
