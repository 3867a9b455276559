"""Likelihoods of tokens: bits per image of models that write in one order, and what tokens cost by themselves."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gen.autoregressive.base import TokenModel
from gen.data.loader import gathered
from gen.errors import GenError
from gen.nn.network import Cond, Params
from gen.training.sharding import batch_parts, batch_sharding, place, replicated

__all__ = ["bits_of_rows", "bits_per_image", "coin_bits", "unigram_bits"]


def bits_per_image(model: TokenModel, params: Mapping[str, Any], stored: jax.Array, cond: Cond) -> jax.Array:
    """Gives -log2 p(tokens given the condition) (B,) float32: surprises summed over the tokens.

    Args:
      model: a model that writes in one order.
      params: arrays by role: ``net``, and ``tokenizer`` for models that read codes.
      stored: (B, *shape), rows of a cache.
      cond: conditions by name.

    Raises GenError for a model whose logits belong to no single order, such as a masked one.
    """
    if not model.exact:
        raise GenError(
            f"{type(model).__name__} has no likelihood: it predicts tokens in any order at once; evaluate its images"
        )
    tokens = model.sequence(stored)
    logits = model.logits(params["net"], tokens, {**cond, **model.forced(params, tokens)})
    return model.surprise(logits, tokens).reshape(len(tokens), -1).sum(axis=-1) / math.log(2.0)


def bits_of_rows(
    model: TokenModel, params: Mapping[str, Params], source: Any, *, batch: int = 256, mesh: Mesh | None = None
) -> np.ndarray:
    """Gives `bits_per_image` (N,) float64 of all rows of a cache's source.

    Args:
      params: arrays by role.
      source: rows by index (`gen.data.caches.TokenCache.source`).
      batch: rows at a time; mesh: devices to share them.

    Raises GenError for rows that are not the model's.
    """
    names = [n for name, c in model.conditions.items() for n in (name, c.mask) if n]
    first = gathered(source, np.arange(1))
    missing = [name for name in (model.kind, *names) if name not in first]
    if missing:
        raise GenError(f"the rows have no '{missing[0]}' among {', '.join(first)}; give {model.kind} with it")
    call = jax.jit(lambda params, ids, cond: bits_per_image(model, params, ids, cond))
    if mesh is not None:
        batch += -batch % batch_parts(mesh.shape)
        params = place(params, replicated(mesh))
    found = []
    for start in range(0, len(source), batch):
        rows = np.minimum(np.arange(start, start + batch), len(source) - 1)
        values = gathered(source, rows)
        given: Any = {name: values[name] for name in (model.kind, *names)}
        if mesh is not None:
            given = place(given, batch_sharding(mesh))
        bits = call(params, given[model.kind], {name: given[name] for name in names})
        found.append(np.asarray(bits, np.float64)[: len(source) - start])
    return np.concatenate(found)


def unigram_bits(trained: np.ndarray, heldout: np.ndarray, vocabulary: int) -> np.ndarray:
    """Gives bits per image (N,) of tokens that are drawn each by itself, from how often each id was trained on.

    Every id is counted once more than it came (Laplace), so that none is impossible.

    Args:
      trained: ids of the training rows; heldout: (N, ...) ids; vocabulary: number of ids.
    """
    counts = np.bincount(np.asarray(trained).reshape(-1), minlength=vocabulary).astype(np.float64) + 1.0
    bits = -np.log2(counts / counts.sum())
    return np.asarray(bits[np.asarray(heldout).reshape(len(heldout), -1)].sum(axis=-1))


def coin_bits(trained: np.ndarray, heldout: np.ndarray) -> np.ndarray:
    """Gives bits per image (N,) of bits that are drawn each by itself, from how often its place was 1 in training.

    0 and 1 are each counted once more than they came (Laplace).

    Args:
      trained: (M, ...) of 0 and 1; heldout: (N, ...).
    """
    p = (np.asarray(trained).sum(axis=0, dtype=np.float64) + 1.0) / (len(trained) + 2.0)
    bits = -np.log2(np.where(np.asarray(heldout) > 0, p, 1.0 - p))
    return np.asarray(bits.reshape(len(bits), -1).sum(axis=-1))
