"""What a token model has learned, on images that it has not seen: its loss there, and that of a guess by marginals.

    python -m benchmarks.token_toys captions TOKENS CAPTIONED
    python -m benchmarks.token_toys loss RUN HELDOUT [--rounds 4] [--unigram DRAWS.npz]

`captions` copies a cache with "prompt" and "pooled" beside its rows, for MaskGen: ten random vectors for each class in
the place of a text encoder's features, zeros for the empty caption. `loss` opens a run and a cache (for `mar-smoke` an
image archive) of other images and prints, of the averaged weights, with the conditions and `--rounds` fresh draws of
masks, times and noise for each image:

| model | its figure | what the marginals give |
|---|---|---|
| writes in one order | bits of an image | of each token, or bit, by itself |
| MaskGIT, MaskGen of tokens | bits of a masked token, masks as in training | the same |
| MAR, MaskGen of latents | squared error of the noise of a masked token | of a normal law for each token |
| diffusion over bits | bits of a bit, times as in training | of what its place and its noisy value say |

"shown no token" is the figure of the same network, of MAR's kind, where all tokens are masked.
Marginals are those of the training data at the same place of the image; "anywhere" are those without regard to it.
`--unigram` writes as many images as are held out, of tokens (not latents) that are each drawn by itself at its place.
"""

import argparse
import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.autoregressive.base import TokenModel, cross_entropy
from gen.autoregressive.binary_diffusion import BinaryDiffusion, bit_entropy
from gen.autoregressive.latent_tokens import LatentTokenModel, masked_first
from gen.autoregressive.likelihood import bits_of_rows
from gen.autoregressive.masked import MaskedModel, hidden
from gen.data.caches import Cache, seal, seal_tokens
from gen.data.loader import gathered
from gen.files import read_json
from gen.runs import load
from gen.tokenizers.encode import expect_maker
from gen.training.program import enable_compile_cache

BATCH = 250
LN2 = math.log(2.0)


def captioned(path: Path, out: Path) -> None:
    """Copies a cache of tokens or latents with captions' features beside its labels."""
    head = read_json(path / "cache.json")
    vectors = np.random.default_rng(0).normal(size=(10, 4, 8)).astype(np.float32)
    out.mkdir(parents=True)
    for name in head["arrays"]:
        shutil.copy(path / f"{name}.npy", out)
    label = np.load(out / "label.npy")
    np.save(out / "prompt.npy", vectors[label])
    np.save(out / "pooled.npy", vectors[label].mean(1))
    known = {name: head[name] for name in ("tokenizer", "data", "class_names")}
    if head["kind"] == "tokens":
        seal_tokens(out, vocabulary=head["vocabulary"], **known)
    else:
        seal(out, shift=head["shift"], scale=head["scale"], **known)
    np.savez(out / "empty.npz", prompt=0 * vectors[0], pooled=0 * vectors[0, 0])


def all_rows(source: Any, most: int = 10_000) -> dict[str, np.ndarray]:
    """The first rows of a source."""
    return dict(gathered(source, np.arange(min(len(source), most))))


def shares(tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    """How often each id stands at each place, (N, V); one more than it came."""
    counts = np.stack([np.bincount(column, minlength=vocabulary) for column in tokens.T])
    return (counts + 1.0) / (len(tokens) + vocabulary)


def of_tokens(model: TokenModel, known: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Bits of each token (B, N) by marginals of the training tokens `known`, at its place and anywhere."""
    by_place = shares(known, model.vocabulary)
    anywhere = np.bincount(known.reshape(-1), minlength=model.vocabulary) + 1.0
    return {
        "at their places": -np.log2(by_place[np.arange(rows.shape[1]), rows]),
        "anywhere": -np.log2(anywhere / anywhere.sum())[rows],
    }


def written(loaded: Any, model: TokenModel, source: Any, known: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """Bits of an image."""
    found = {"model": float(bits_of_rows(model, loaded.params, source, batch=BATCH).mean())}
    if model.kind == "tokens":
        return found | {name: float(bits.sum(-1).mean()) for name, bits in of_tokens(model, known, rows).items()}
    p = (known.sum(0) + 1.0) / (len(known) + 2.0)
    return found | {"at their places": float(-np.log2(np.where(rows > 0, p, 1 - p)).sum((1, 2)).mean())}


def masked(model: MaskedModel, params: Any, known: np.ndarray, rounds: Any) -> dict[str, float]:
    """Bits of a masked token."""

    @jax.jit
    def surprises(tokens: jax.Array, cond: Any, key: jax.Array) -> Any:
        draws = model.draw(key, tokens, {})
        mask = hidden(model.schedule, draws["ratio"], draws["order"])
        logits = model.logits(params["net"], jnp.where(mask, model.vocabulary, tokens), cond)
        return mask, cross_entropy(logits, tokens) / LN2

    found: dict[str, list[np.ndarray]] = {}
    for tokens, cond, key in rounds:
        mask, bits = (np.asarray(a) for a in surprises(tokens, cond, key))
        for name, values in {"model": bits, **of_tokens(model, known, np.asarray(tokens))}.items():
            found.setdefault(name, []).append(values[mask])
    return {name: float(np.concatenate(values).mean()) for name, values in found.items()}


def drawn(model: LatentTokenModel, params: Any, known: np.ndarray, rounds: Any) -> dict[str, float]:
    """Squared error of the noise of a masked token."""
    mean = known.mean(0)  # (L, C)
    covariance = np.einsum("nlc,nld->lcd", known - mean, known - mean) / len(known)
    variances, axes = (jnp.asarray(a, jnp.float32) for a in np.linalg.eigh(covariance))

    @jax.jit
    def errors(tokens: jax.Array, cond: Any, key: jax.Array) -> Any:
        draws = model.draw(key, tokens)
        mask = masked_first(draws["order"], draws["count"][:, None])
        t, eps = draws["t"], draws["eps"]
        a, s = (f(t)[..., None] for f in (model.process.alpha, model.process.sigma))
        x_t = a * tokens[:, None] + s * eps

        def said(known: jax.Array) -> jax.Array:
            z = model.z(params["net"], tokens, ~known, cond, model.room)
            z = jnp.broadcast_to(z[:, None], (*t.shape, z.shape[-1])).reshape(-1, z.shape[-1])
            flat = (x_t.reshape(-1, x_t.shape[-1]), t.reshape(-1), {"z": z})
            return model.denoiser(params["net"]["head"], *flat).eps.reshape(eps.shape)

        turned = jnp.einsum("bmlc,lcd->bmld", x_t - a * mean, axes) / (a**2 * variances + s**2)
        normal = s * jnp.einsum("bmld,lcd->bmlc", turned, axes)  # E[eps | x_t] of a normal x
        found = {"model": said(~mask), "shown no token": said(jnp.zeros_like(mask)), "at their places": normal}
        return mask, {name: jnp.square(guess - eps).mean((1, 3)) for name, guess in found.items()}

    found: dict[str, list[np.ndarray]] = {}
    for tokens, cond, key in rounds:
        mask, values = errors(tokens, cond, key)
        for name, error in values.items():
            found.setdefault(name, []).append(np.asarray(error)[np.asarray(mask)])
    return {name: float(np.concatenate(values).mean()) for name, values in found.items()}


def denoised(model: BinaryDiffusion, params: Any, known: np.ndarray, rounds: Any) -> dict[str, float]:
    """Bits of a bit, given noisy ones."""
    p = jnp.asarray((known.sum(0) + 1.0) / (len(known) + 2.0), jnp.float32)  # (N, K)

    @jax.jit
    def surprises(tokens: jax.Array, cond: Any, key: jax.Array) -> Any:
        draws, x = model.draw(key, tokens, {}), tokens.astype(jnp.float32)
        x_t = (draws["uniforms"] < model.process.chance(x, draws["t"])).astype(jnp.float32)
        one = model.process.chance(jnp.ones_like(x), draws["t"])  # P(x_t = 1 | x = 1)
        odds = jnp.where(x_t > 0, one / (1 - one), (1 - one) / one)
        found = {"model": model.logits(params["net"], x_t, {**cond, "time": draws["t"]})}
        found["at their places"] = jnp.log(p / (1 - p)) + jnp.log(odds)
        return {name: (bit_entropy(logits, x) / LN2).mean() for name, logits in found.items()}

    found: dict[str, list[float]] = {}
    for tokens, cond, key in rounds:
        for name, value in surprises(tokens, cond, key).items():
            found.setdefault(name, []).append(float(value))
    return {name: float(np.mean(values)) for name, values in found.items()}


def compared(path: str, heldout: str, repeats: int, unigram: str) -> dict[str, float]:
    """The figures of a run; see the module."""
    loaded = load(path)
    model, stage = loaded.generator.subject, loaded.config.stages[-1]
    data = dataclasses.replace(stage.data, path=heldout)
    if isinstance(data, Cache):  # held-out latents are normalised as those of the training set
        own, new = stage.data.normalizer(), data.normalizer()
    if "tokenizer" in loaded.params:
        expect_maker(data, loaded.tokenizer, loaded.params["tokenizer"])
    rows, trained = (all_rows(source) for source in (data.source(), stage.data.source()))
    if isinstance(data, Cache):
        rows["latent"] = (rows["latent"] * new["scale"] + new["shift"] - own["shift"]) / own["scale"]
    sequences, known = (np.asarray(model.sequence(stage.task.data(held))) for held in (rows, trained))
    if unigram:
        _unigram_images(loaded, model, known, len(sequences), unigram)
    if getattr(model, "exact", False):
        return written(loaded, model, data.source(), known, sequences)
    key, cond = jax.random.key(0), stage.task.cond(rows)
    rounds = (
        (
            jnp.asarray(sequences[first : first + BATCH]),
            {name: jnp.asarray(values[first : first + BATCH]) for name, values in cond.items()},
            jax.random.fold_in(key, repeat * len(sequences) + first),
        )
        for repeat in range(repeats)
        for first in range(0, len(sequences), BATCH)
    )
    measure = drawn if isinstance(model, LatentTokenModel) else masked if isinstance(model, MaskedModel) else denoised
    return measure(model, loaded.params, known, rounds)


def _unigram_images(loaded: Any, model: Any, known: np.ndarray, count: int, path: str) -> None:
    """Images of tokens that are each drawn by itself, at its place; of pixels, where there is no tokenizer."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(known), (count, known.shape[1]))  # a training image for each place
    tokens = known[picks, np.arange(known.shape[1])]

    @jax.jit
    def decode(tokens: jax.Array) -> jax.Array:
        images = model.stored(tokens)
        if "tokenizer" in loaded.params:
            params, tokenizer = loaded.params["tokenizer"], loaded.tokenizer
            images = tokenizer.decode(params, tokenizer.embed(params, images))
        return jnp.clip(jnp.round(127.5 * (images + 1)), 0, 255).astype(jnp.uint8)

    np.savez(path, arr_0=np.concatenate([decode(tokens[i : i + BATCH]) for i in range(0, count, BATCH)]))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    captions = commands.add_parser("captions")
    captions.add_argument("cache", type=Path)
    captions.add_argument("out", type=Path)
    loss = commands.add_parser("loss")
    loss.add_argument("run")
    loss.add_argument("heldout")
    loss.add_argument("--rounds", type=int, default=4)
    loss.add_argument("--unigram", default="")
    args = parser.parse_args()
    enable_compile_cache()
    if args.command == "captions":
        captioned(args.cache, args.out)
        return
    found = compared(args.run, args.heldout, args.rounds, args.unigram)
    for name in sorted(found, key="model".__ne__):  # the model's first
        print(f"{name:<16}{found[name]:9.4f}")


if __name__ == "__main__":
    main()
