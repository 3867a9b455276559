"""Time per token of cached decoding against length, beside full recomputation and a plain PyTorch decode.

    python benchmarks/decode.py [--width 256] [--depth 6] [--batch 4] [--lengths 16 64 256] [--repeats 5]

Writes whole sequences with a LlamaGen of random weights, unguided and greedily, and prints milliseconds per token for
each length; those of a decoder that reads everything again for each token, up to 64 tokens; and, where PyTorch is
installed, those of the same network with the same weights and a cache of keys and values, written in plain eager
PyTorch, whose tokens are compared with ours first. All run on one thread of one core, in turns; the figures are
the best of the repeats in CPU time, the ratio is PyTorch's seconds over ours (above 1 ours is faster): median, lowest
and highest over the turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from backbones import tie_to_cores

from gen.arrays import flatten
from gen.autoregressive.gpt import GPTConfig, rotation
from gen.autoregressive.sampler import TokenSampler

RECOMPUTED = 64  # longest sequence that is read again for each token
VOCABULARY = 1024


def seconds(call: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    began = time.process_time()
    call()
    return time.process_time() - began


def cached(model: GPTConfig, params: Any, batch: int) -> Callable[[], Any]:
    """Writes `batch` sequences by the project's sampler."""
    keys, cond = jax.random.split(jax.random.key(0), batch), {"label": jnp.arange(batch) % model.num_classes}
    run = jax.jit(lambda params: TokenSampler(top_k=1).tokens(model, {"net": params}, keys, cond, None))
    return lambda: jax.block_until_ready(run(params))


def recomputed(model: GPTConfig, params: Any, batch: int) -> Callable[[], Any]:
    """The same, reading all positions for each token."""
    cond = {"label": jnp.arange(batch) % model.num_classes}

    def step(tokens: jax.Array, at: jax.Array) -> tuple[jax.Array, None]:
        logits = model.logits(params, tokens, cond)[:, at]
        return tokens.at[:, at].set(jnp.argmax(logits, axis=-1)), None

    start = jnp.zeros((batch, model.length), jnp.int32)
    run = jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(model.length))[0])
    return lambda: jax.block_until_ready(run())


def torch_decode(model: GPTConfig, params: Any, batch: int) -> Callable[[], Any] | None:
    """The same network in plain PyTorch with a cache of keys and values; None where PyTorch is not installed."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(1)
    width, heads, functional = model.width, model.heads, torch.nn.functional
    size, rows = width // heads, model.prefix + model.length - 1
    given = {name: torch.from_numpy(np.array(value)) for name, value in flatten(params).items()}
    stacked = ("norm1/scale", "norm2/scale", "attn/qkv/kernel", "attn/proj/kernel", "mlp/fc1/kernel", "mlp/fc2/kernel")
    layers: list[Mapping[str, Any]] = [
        {name: (part.T.contiguous() if part.ndim == 2 else part) for name, part in own.items()}
        for own in ({name: given[f"blocks/{name}"][i] for name in stacked} for i in range(model.depth))
    ]
    head = given["head/kernel"].T.contiguous()
    cos, sin = (torch.from_numpy(table[:, None]) for table in rotation(model))

    def norm(x: Any, scale: Any) -> Any:
        return functional.rms_norm(x, (width,), scale, model.eps)

    def turned(x: Any, at: int) -> Any:
        other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * cos[at] + other * sin[at]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def write() -> Any:
        caches = [torch.empty(2, batch, heads, rows, size) for _ in layers]
        x, written = given["label/embedding"][torch.arange(batch) % model.num_classes], []
        for at in range(rows):
            for layer, cache in zip(layers, caches, strict=True):
                qkv = functional.linear(norm(x, layer["norm1/scale"]), layer["attn/qkv/kernel"])
                q, k, v = qkv.reshape(batch, 3, heads, size).unbind(1)
                q, cache[0, :, :, at], cache[1, :, :, at] = turned(q, at), turned(k, at), v
                seen = cache[:, :, :, : at + 1]
                out = functional.scaled_dot_product_attention(q[:, :, None], seen[0], seen[1])
                x = x + functional.linear(out.reshape(batch, width), layer["attn/proj/kernel"])
                gate, value = functional.linear(norm(x, layer["norm2/scale"]), layer["mlp/fc1/kernel"]).chunk(2, -1)
                x = x + functional.linear(functional.silu(gate) * value, layer["mlp/fc2/kernel"])
            ids = functional.linear(norm(x, given["norm/scale"]), head).argmax(-1)
            written.append(ids)
            x = given["tokens/embedding"][ids]
        return torch.stack(written, 1)

    return write


def weights(model: GPTConfig) -> Any:
    """Random weights; the last layer's, which starts at zero, too."""
    params = jax.device_get(model.net.init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    return {**params, "head": {"kernel": rng.standard_normal((model.width, VOCABULARY)).astype(np.float32)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 256), ("depth", 6), ("heads", 4), ("batch", 4), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--scan", action="store_true", help="depth as one scan")
    given = parser.parse_args()
    tie_to_cores(1)
    print(
        f"{'tokens':>8}{'cached':>10}{'again':>10}{'PyTorch':>10}   ms per token, batch {given.batch}; PyTorch/cached"
    )
    found = []
    for length in given.lengths:
        shape = (given.width, given.depth, given.heads, 3 * given.width)
        model = GPTConfig((length,), VOCABULARY, *shape, num_classes=10, dropout=0.0, scan=given.scan)
        params = weights(model)
        sides = {"cached": cached(model, params, given.batch)}
        if length <= RECOMPUTED:
            sides["again"] = recomputed(model, params, given.batch)
        write = torch_decode(model, params, given.batch)
        if write is not None:
            sides["PyTorch"] = write
        written = {name: np.asarray(call()) for name, call in sides.items()}  # this also compiles
        for name, ids in written.items():
            equal = float((ids == written["cached"]).mean())
            if equal < 1.0:
                print(f"{name}: only {100 * equal:.1f} % of the tokens are those of cached decoding")
        turns = [{name: 1e3 * seconds(call) / length for name, call in sides.items()} for _ in range(given.repeats)]
        best = {name: min(turn[name] for turn in turns) for name in sides}
        row = "".join(f"{best[n]:>10.3f}" if n in best else f"{'-':>10}" for n in ("cached", "again", "PyTorch"))
        ratios = sorted(turn["PyTorch"] / turn["cached"] for turn in turns) if write is not None else []
        shown = f"   {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})" if ratios else ""
        print(f"{length:>8}{row}{shown}", flush=True)
        found.append(best["cached"])
    if len(found) > 1:
        slope = float(np.polyfit(np.log(given.lengths), np.log(found), 1)[0])
        print(f"time per token grows with length to the power {slope:.2f} (0 for constant)")
    if not ratios:
        print("PyTorch is not installed here; its column is empty")


if __name__ == "__main__":
    main()
