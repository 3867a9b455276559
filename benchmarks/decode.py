"""Time per token of cached decoding against length, beside full recomputation and a plain PyTorch decode.

    python benchmarks/decode.py [--width 256] [--depth 6] [--batch 4] [--lengths 16 64 256] [--repeats 5]

Writes whole sequences with a LlamaGen of random weights, unguided, and prints milliseconds per token (best of the
repeats) for each length; those of a decoder that reads everything again for each token, up to 64 tokens; and, where
PyTorch is installed, those of the same network with a cache written in plain PyTorch, in the same run.
"""

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.autoregressive.decoding import drawn
from gen.autoregressive.gpt import GPTConfig
from gen.autoregressive.sampler import TokenSampler

RECOMPUTED = 64  # longest sequence that is read again for each token
VOCABULARY = 1024


def best(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest call, after one that is not counted."""
    call()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def cached(model: GPTConfig, params: Any, batch: int) -> Callable[[], Any]:
    """Writes `batch` sequences by the project's sampler."""
    keys, cond = jax.random.split(jax.random.key(0), batch), {"label": jnp.zeros(batch, jnp.int32)}
    run = jax.jit(lambda params: TokenSampler().tokens(model, {"net": params}, keys, cond, None))
    return lambda: jax.block_until_ready(run(params))


def recomputed(model: GPTConfig, params: Any, batch: int) -> Callable[[], Any]:
    """The same, reading all positions for each token."""
    keys, cond = jax.random.split(jax.random.key(0), batch), {"label": jnp.zeros(batch, jnp.int32)}

    def step(tokens: jax.Array, at: jax.Array) -> tuple[jax.Array, None]:
        logits = model.logits(params, tokens, cond)[:, at]
        return tokens.at[:, at].set(drawn(keys, logits, at)), None

    start = jnp.zeros((batch, model.length), jnp.int32)
    run = jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(model.length))[0])
    return lambda: jax.block_until_ready(run())


def torch_decode(model: GPTConfig, batch: int) -> Callable[[], Any] | None:
    """The same network in plain PyTorch with a cache of keys and values; None where PyTorch is not installed."""
    try:
        import torch
    except ImportError:
        return None
    width, heads = model.width, model.heads
    size, functional = width // heads, torch.nn.functional
    torch.manual_seed(0)

    def matrix(rows: int, columns: int) -> Any:
        return torch.randn(rows, columns) / math.sqrt(columns)

    layers = [
        {
            "qkv": matrix(3 * width, width),
            "out": matrix(width, width),
            "gate": matrix(model.hidden, width),
            "up": matrix(model.hidden, width),
            "down": matrix(width, model.hidden),
        }
        for _ in range(model.depth)
    ]
    tokens, head = torch.randn(VOCABULARY + 1, width), matrix(VOCABULARY, width)

    def norm(x: Any) -> Any:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + model.eps)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def write() -> Any:
        caches = [torch.zeros(2, batch, heads, model.length, size) for _ in layers]
        ids, written = torch.full((batch,), VOCABULARY), []
        for at in range(model.length):
            x = tokens[ids]
            for layer, cache in zip(layers, caches, strict=True):
                q, k, v = (norm(x) @ layer["qkv"].T).reshape(batch, 3, heads, 1, size).unbind(1)
                cache[0, :, :, at : at + 1], cache[1, :, :, at : at + 1] = k, v
                seen = cache[:, :, :, : at + 1]
                out = functional.scaled_dot_product_attention(q, seen[0], seen[1])
                x = x + out.reshape(batch, width) @ layer["out"].T
                n = norm(x)
                x = x + (functional.silu(n @ layer["gate"].T) * (n @ layer["up"].T)) @ layer["down"].T
            ids = torch.multinomial((norm(x) @ head.T).softmax(-1), 1)[:, 0]
            written.append(ids)
        return torch.stack(written, 1)

    return write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 256), ("depth", 6), ("heads", 4), ("batch", 4), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--scan", action="store_true", help="depth as one scan")
    given = parser.parse_args()
    print(f"{'tokens':>8}{'cached':>10}{'again':>10}{'PyTorch':>10}{'ratio':>8}   ms per token, batch {given.batch}")
    found = []
    for length in given.lengths:
        shape = (given.width, given.depth, given.heads, 3 * given.width)
        model = GPTConfig((length,), VOCABULARY, *shape, num_classes=1, dropout=0.0, scan=given.scan)
        params = jax.tree.map(lambda a: a + 0.02, model.net.init(jax.random.key(0)))
        own = 1e3 * best(cached(model, params, given.batch), given.repeats) / length
        again, there, ratio = "-", "-", "-"
        if length <= RECOMPUTED:
            again = f"{1e3 * best(recomputed(model, params, given.batch), given.repeats) / length:.2f}"
        write = torch_decode(model, given.batch)
        if write is not None:
            theirs = 1e3 * best(write, given.repeats) / length
            there, ratio = f"{theirs:.2f}", f"{own / theirs:.2f}"
        found.append(own)
        print(f"{length:>8}{own:>10.2f}{again:>10}{there:>10}{ratio:>8}", flush=True)
    if len(found) > 1:
        slope = float(np.polyfit(np.log(given.lengths), np.log(found), 1)[0])
        print(f"time per token grows with length to the power {slope:.2f} (0 for constant)")
    if torch_decode(model, 1) is None:
        print("PyTorch is not installed here; its column is empty")


if __name__ == "__main__":
    main()
