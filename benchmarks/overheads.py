"""What sampling costs beyond its forward passes, compile time against depth, and memory by remat policy.

    python benchmarks/overheads.py [--pairs 5]

One thread of one core. Sampler: CPU seconds of a guided 50-step sampler over those of 50 calls of the compiled
network on the doubled batch, in turns (DiT-S/4, two images). Compile time: CPU seconds to trace and compile the
training step of a DiT of width 192, its depth scanned or unrolled. Memory: temporary arrays of DiT-S/2's training step
at batch 8, as the compiler plans them.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from backbones import seconds, tie_to_cores

from gen.diffusion.backbones.dit import DiTConfig, dit
from gen.diffusion.ddpm import DDPM
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.process import Linear
from gen.diffusion.train import DenoiserTask
from gen.nn.layers import Remat
from gen.sampling.generator import Sampler
from gen.sampling.grids import Respaced
from gen.sampling.guidance import ClassifierFree
from gen.sampling.multistep import DPMSolver
from gen.sampling.solvers import DDIM
from gen.training.ema import Constant

STEPS = 50


def sampler_overhead(solver: Any, pairs: int) -> list[float]:
    """The sampler's CPU seconds over those of its forward passes alone, sorted."""
    denoiser = Denoiser(dit("S/4", learned_variance=False), DDPM("linear", 1000), Predict("eps", clock="index"))
    params = denoiser.net.init(jax.random.key(0))
    sampler = Sampler(solver, Respaced(), STEPS, ClassifierFree(1.5))
    keys, label = jax.random.split(jax.random.key(1), 2), jnp.array([3, 7])
    draw = jax.jit(lambda p, k, c: sampler(denoiser, p, k, (32, 32, 4), c))
    forward = jax.jit(lambda p, x, t, c: denoiser.net(p, x, (t,), c)[0])
    x, cond = jnp.ones((4, 32, 32, 4)), {"label": jnp.tile(label, 2)}

    def passes() -> Any:
        return [forward(params, x, jnp.full(4, float(i)), cond) for i in range(sampler.nfe(denoiser.process))]

    rows = [(seconds(lambda: draw(params, keys, {"label": label})), seconds(passes)) for _ in range(pairs)]
    return sorted(sampled / bare for sampled, bare in rows)


def training_step(network: DiTConfig, batch: int) -> Any:
    """The lowered training step of a network."""
    task = DenoiserTask(Denoiser(network, Linear(), Predict("velocity")), emas=(Constant(0.9999),))
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda k: task.init(k, {}, None), key)
    data = {
        "latent": jax.ShapeDtypeStruct((batch, *network.size, network.channels), jnp.float32),
        "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }
    return jax.jit(lambda s, b, k: task.update(s, {}, b, k), donate_argnums=0).lower(state, data, key)


def compile_seconds(depth: int, scan: bool) -> float:
    """CPU seconds to trace and compile a training step."""
    network = DiTConfig((16, 16), 4, 2, 192, depth, 3, remat="dots" if scan else "none", scan=scan)
    began = time.process_time()
    training_step(network, 4).compile()
    return time.process_time() - began


def temporary_mib(remat: Remat) -> float:
    """Temporary memory of a training step."""
    compiled = training_step(dit("S/2", learned_variance=False, remat=remat), 8).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="interleaved measurements of the samplers (5)")
    pairs = parser.parse_args().pairs
    tie_to_cores(1)
    print(f"one thread; {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for name, solver in {"DDIM": DDIM(), "DPM-Solver++ 2M": DPMSolver(2)}.items():
        ratios = sampler_overhead(solver, pairs)
        spread = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
        print(f"{name}, {STEPS} steps over its forward passes: {statistics.median(ratios):.3f} ({spread})", flush=True)
    for scan in (True, False):
        depths = (4, 12, 28) if scan else (4, 12)
        found = ", ".join(f"{depth} blocks {compile_seconds(depth, scan):.1f} s" for depth in depths)
        print(f"compile time, {'scanned' if scan else 'unrolled'}: {found}", flush=True)
    for remat in ("none", "dots", "full"):
        print(f"temporary memory, remat {remat}: {temporary_mib(remat):,.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
