"""Encoding images once: an indexed job that fills a latent cache."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gen.arrays import digest, flatten
from gen.config import fingerprint
from gen.data.cache_rows import FLIP
from gen.data.caches import BitCache, Cache, TokenCache, seal, seal_bits, seal_tokens
from gen.data.loader import gathered
from gen.errors import GenError
from gen.nn.network import Params
from gen.tokenizers.base import Tokenizer
from gen.training.indexed import ArrayWriter, run_indexed, sample_keys

__all__ = ["encode_images", "expect_maker", "tokenizer_identity"]

_ARRAYS = {"continuous": "latent", "tokens": "tokens", "bits": "bits"}  # kind -> name of the array in the cache


def tokenizer_identity(tokenizer: Tokenizer, params: Params) -> str:
    """Gives the fingerprint of a tokenizer's configuration and weights."""
    return f"{fingerprint(tokenizer)} {_digest(params)}"


def expect_maker(cache: Any, tokenizer: Tokenizer, params: Params) -> None:
    """Raises GenError for a cache of `gen.data.caches` that another tokenizer, or other weights of it, encoded.

    Data that do not say what encoded them, such as published shards, are taken on trust.
    """
    own = tokenizer_identity(tokenizer, params)
    if cache.tokenizer and not cache.tokenizer.startswith(own):
        raise GenError(
            f"{cache.path} was encoded by another tokenizer or with other weights ({cache.tokenizer}) than the given "
            f"one ({own}), whose decoder cannot read it; give the tokenizer that made it, or encode the images again"
        )


def _digest(params: Params) -> str:
    # paths are spelled as in the caches that exist: ['encoder']['conv_in']
    leaves = flatten(jax.device_get(params)).items()
    return digest({"".join(f"['{key}']" for key in path.split("/")): leaf for path, leaf in leaves})


def encode_images(
    tokenizer: Tokenizer,
    params: Params,
    source: Any,
    path: str | Path,
    *,
    identity: str = "",
    batch: int = 256,
    mesh: Mesh | None = None,
    label: str = "encode",
    flip: bool = False,
    beside: Mapping[str, tuple[Params, Callable[[Params, jax.Array], jax.Array]]] | None = None,
) -> Cache | TokenCache | BitCache:
    """Gives the sealed cache at `path` of the latents, tokens or bits of all images of `source`, and its other arrays.

    Interrupted and called again, it goes on where it was; done, it returns at once.

    Args:
      tokenizer: its kind decides what is stored: the posterior's mode, token ids, or bits.
      params: its parameters.
      source: records "image" (H, W, C) uint8 and further arrays, such as "label", that are kept beside: a
        `gen.data.sources.ArraySource`, or what `gen.data.images.Images` reads, a batch at a time, in threads.
      path: the cache folder.
      identity: fingerprint of the source; by default that of its content, which an ArraySource computes.
      batch: global batch size; it does not change the latents beyond rounding.
      mesh: devices to share the work.
      label: text of the progress line.
      flip: keep the mirror images too, under the same names with "_flip" behind them; training takes half of them.
      beside: further arrays by name that are computed from the images: parameters, and a function of them and of the
        images (B, H, W, C) in [-1, 1] that gives (B, ...); the features of frozen encoders.

    Raises:
      GenError: images the tokenizer does not take; NaN latents; a cache of something else at `path`; a disk that is
        full or does not answer.
    """
    first, expected = gathered(source, np.arange(1)).get("image"), tuple(tokenizer.spec.image)
    if first is None or first.dtype != np.uint8 or first.shape[1:] != expected:
        given = "no images" if first is None else f"images {first.dtype} {first.shape[1:]}"
        raise GenError(f"{given} for a tokenizer that takes uint8 {expected}; convert them (gen data convert)")
    made_by, made_from = tokenizer_identity(tokenizer, params), identity or source.identity()
    functions = {name: function for name, (_, function) in (beside or {}).items()}
    others = {name: own for name, (own, _) in (beside or {}).items()}
    made_by = " ".join([made_by, *(f"{name} {_digest(own)}" for name, own in others.items())])
    wanted = {n for name, c in tokenizer.spec.conditions.items() for n in (name, c.mask)}

    def encoded(arguments: Any, x: jax.Array, cond: Any, keys: jax.Array) -> dict[str, jax.Array]:
        found = tokenizer.encode(arguments["params"], x, cond=cond, keys=keys)
        made = {name: function(arguments["others"][name], x) for name, function in functions.items()}
        return made | {_ARRAYS[tokenizer.spec.kind]: found.stored}

    def latents(arguments: Any, indices: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
        del weight
        arguments, rows = arguments
        x = rows["image"].astype(jnp.float32) / 127.5 - 1.0
        rows = {name: values for name, values in rows.items() if name != "image"}
        cond = {name: values for name, values in rows.items() if name in wanted}
        made = encoded(arguments, x, cond, sample_keys(0, indices))
        if flip:
            mirrored = encoded(arguments, x[:, :, ::-1], cond, sample_keys(1, indices))
            made |= {name + FLIP: values for name, values in mirrored.items()}
        return rows | made

    writer = ArrayWriter(path, len(source), f"{made_by} {made_from}{' and mirrored' if flip else ''}")
    run_indexed(
        latents,
        range(len(source)),
        batch=batch,
        writer=writer,
        arguments={"params": params, "others": others},
        mesh=mesh,
        label=label,
        read=lambda indices: gathered(source, indices),
        title=source.title,
    )
    named = {"tokenizer": made_by, "data": made_from, "class_names": source.class_names}
    match tokenizer.spec.kind:
        case "tokens":
            return seal_tokens(path, vocabulary=int(tokenizer.spec.vocabulary or 0), **named)
        case "bits":
            return seal_bits(path, **named)
    return seal(path, **named)
