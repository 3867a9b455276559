"""Time and memory of the selective scan against length: linear up to 65,536 tokens.

    python benchmarks/selective_scan.py [--width 32] [--state 16] [--longest 65536] [--repeats 5]

Prints, for each length, milliseconds (best of the repeats) and the program's temporary memory as the compiler plans it,
forward and with gradients, for the chunked scan, for a plain ``lax.scan`` and for attention of the same width (up to
8,192 tokens); then the slopes of the chunked scan on log-log axes.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.nn.selective_scan import Method, selective_scan

ATTENTION_LIMIT = 8192


def inputs(length: int, width: int, state: int) -> dict[str, jax.Array]:
    """Arguments of one scan, one sample."""
    keys = jax.random.split(jax.random.key(0), 4)
    u, delta = (jax.random.normal(k, (1, length, width)) for k in keys[:2])
    B, C = (jax.random.normal(k, (1, length, state)) for k in keys[2:])
    A = -jnp.broadcast_to(jnp.arange(1.0, state + 1), (width, state))
    return {"u": u, "delta": delta, "A": A, "B": B, "C": C}


def scan(method: Method | None) -> Callable[[dict[str, jax.Array]], jax.Array]:
    """The scan with `method`; by backend when None."""
    return lambda case: selective_scan(**case, softplus=True, method=method)[0]


def attention(case: dict[str, jax.Array]) -> jax.Array:
    """One head over the same sequence, without projections."""
    x = case["u"][:, :, None]
    return jax.nn.dot_product_attention(x, case["delta"][:, :, None], x)


def measure(call: Callable[..., Any], case: dict[str, jax.Array], repeats: int) -> tuple[float, float]:
    """(best milliseconds, temporary MiB) of a compiled call."""
    compiled = jax.jit(call).lower(case).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    jax.block_until_ready(compiled(case))
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(compiled(case))
        best = min(best, time.perf_counter() - began)
    return 1e3 * best, memory


def slope(lengths: list[int], values: list[float]) -> float:
    """Of a line on log-log axes: 1 for a cost linear in length."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--state", type=int, default=16)
    parser.add_argument("--longest", type=int, default=65536)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    lengths = [n for n in (2**k for k in range(10, 31, 2)) if n <= args.longest]
    rows: dict[str, Callable[[dict[str, jax.Array]], jax.Array]] = {
        "chunked": scan(None),
        "lax.scan": scan("scan"),
        "attention": attention,
    }
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, width {args.width}, state {args.state}")
    print(f"{'':10s} {'length':>7s} {'forward ms':>11s} {'MiB':>8s} {'gradient ms':>12s} {'MiB':>8s}")
    series: dict[str, list[float]] = {"time": [], "gradient time": [], "gradient memory": []}
    for name, call in rows.items():
        for length in lengths:
            if name == "attention" and length > ATTENTION_LIMIT:
                continue
            case = inputs(length, args.width, args.state)
            forward = measure(call, case, args.repeats)
            gradient = measure(jax.grad(lambda case, f=call: f(case).sum()), case, args.repeats)
            print(f"{name:10s} {length:7d} {forward[0]:11.2f} {forward[1]:8.1f} {gradient[0]:12.2f} {gradient[1]:8.1f}")
            if name == "chunked":
                for key, value in zip(series, (forward[0], *gradient), strict=True):
                    series[key].append(value)
    for key, values in series.items():
        print(f"slope of the chunked scan, {key}: {slope(lengths, values):.2f}")


if __name__ == "__main__":
    main()
