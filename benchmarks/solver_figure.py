"""The same noise through every solver: error against a 1000-step reference, at 1 to 50 network calls.

    gen demo
    python benchmarks/solver_figure.py runs/demo/teacher --out solvers.png

Takes any run folder of a diffusion or flow model, sampled with its own guidance. Left: root mean square distance of
each sample's latents to the reference (Heun's method, 1000 steps) for the solvers of the probability flow. Middle:
Frechet distance between the latents of the samples and of the reference, for all solvers; stochastic ones draw other
samples, so they end at the distance between two references of different noise (dotted). Right: one sample of each
solver along the number of calls. The figures are also written as JSON beside the picture.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import gen
from gen.metrics.frechet import frechet_of_features
from gen.runs import Loaded, labels_for
from gen.sampling.adaptive import Dopri5
from gen.sampling.generate import quantise
from gen.sampling.generator import Sampler, decode
from gen.sampling.grids import Grid, Uniform
from gen.sampling.integrate import nfe
from gen.sampling.multistep import DPMSolver, UniPC
from gen.sampling.noise import prior
from gen.sampling.runge_kutta import RungeKutta
from gen.sampling.sde import EulerMaruyama
from gen.sampling.solvers import DDIM, Ancestral, EDMStochastic, Euler, Heun, Renoise
from gen.training.indexed import sample_keys
from gen.training.program import enable_compile_cache

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SOLVERS: dict[str, Any] = {
    "Euler": Euler(),
    "DDIM": DDIM(),
    "Heun": Heun(),
    "midpoint": RungeKutta("midpoint"),
    "DPM-Solver++ 2M": DPMSolver(2),
    "DPM-Solver++ 3M": DPMSolver(3),
    "UniPC 2": UniPC(2),
    "UniPC 3": UniPC(3),
    "ancestral": Ancestral(),
    "EDM, churn 10": EDMStochastic(10.0),
    "DPM-Solver++ 2M SDE": DPMSolver(2, stochastic=True),
    "Euler-Maruyama": EulerMaruyama(),
    "renoise": Renoise(),
}
CALLS = (1, 2, 3, 5, 8, 14, 25, 50)
SHOWN = (1, 3, 8, 25, 50)
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)


def steps_for(solver: Any, process: Any, calls: int) -> int:
    """The most steps that need at most `calls` network calls; 0 where one step needs more."""
    fits = [n for n in range(1, calls + 1) if nfe(solver, Grid(np.linspace(1.0, 0.0, n + 1), process)) <= calls]
    return max(fits, default=0)


def measure(run: Loaded, count: int) -> tuple[dict[str, list[dict[str, float]]], dict[str, dict[int, np.ndarray]]]:
    """Points (calls, rms, frechet) and the first sample's image by calls, for each solver."""
    generator, denoiser = run.generator, run.denoiser
    process, shape = generator.sampler.process or denoiser.process, generator.shape
    keys, cond = sample_keys(0, jnp.arange(count)), labels_for(generator, np.arange(count), None)

    def latents(solver: Any, steps: int, keys: jax.Array = keys) -> np.ndarray:
        sampler = Sampler(solver, Uniform(), steps, generator.sampler.guidance, generator.sampler.process)
        return np.asarray(jax.jit(lambda p, k, c: sampler(denoiser, p, k, shape, c))(run.params["net"], keys, cond))

    def image(sample: np.ndarray) -> np.ndarray:
        return np.asarray(quantise(decode(generator.tokenizer, run.params, jnp.asarray(sample[:1]))))[0]

    reference, other = latents(Heun(), 1000), latents(Heun(), 1000, sample_keys(1, jnp.arange(count)))
    points: dict[str, list[dict[str, float]]] = {}
    images: dict[str, dict[int, np.ndarray]] = {"reference": {CALLS[-1]: image(reference)}}

    def add(name: str, calls: float, sample: np.ndarray) -> None:
        flat, exact = (v.reshape(count, -1).astype(np.float64) for v in (sample, reference))
        point = {
            "calls": calls,
            "rms": float(np.sqrt(np.mean((flat - exact) ** 2))),
            "frechet": frechet_of_features(flat, exact),
        }
        points.setdefault(name, []).append(point)
        print(f"{name:20s} {calls:7.1f} calls  rms {point['rms']:.2e}  frechet {point['frechet']:.2e}", flush=True)

    add("other noise", 1.0, other)
    add("other noise", float(CALLS[-1]), other)
    for name, solver in SOLVERS.items():
        for steps, calls in sorted({steps_for(solver, process, c): c for c in reversed(CALLS)}.items()):
            if steps:
                sample = latents(solver, steps)
                add(name, nfe(solver, Grid(np.linspace(1.0, 0.0, steps + 1), process)), sample)
                images.setdefault(name, {})[calls] = image(sample)
    for tolerance in TOLERANCES:
        sample, calls = adaptive(run, process, keys, cond, Dopri5(tolerance, tolerance))
        add("Dopri5 (adaptive)", float(calls.mean()), sample)
    return points, images


def adaptive(run: Loaded, process: Any, keys: Any, cond: Any, method: Dopri5) -> tuple[np.ndarray, np.ndarray]:
    """Latents by adaptive steps, and the calls of each sample."""
    generator = run.generator

    def integrate(params: Any, keys: Any, cond: Any) -> Any:
        x = prior(Grid(np.array([process.t_max, 0.0]), process), keys, generator.shape)
        denoise = generator.sampler.guided(run.denoiser, params)
        return method.integrate(denoise, x, process, process.t_max, max(process.t_min, 1e-3), cond)

    sample, calls = jax.jit(integrate)(run.params["net"], keys, cond)
    return np.asarray(sample), np.asarray(calls)


def draw(points: dict[str, list[dict[str, float]]], images: dict[str, dict[int, np.ndarray]], path: Path) -> None:
    """The figure."""
    figure = plt.figure(figsize=(17, 7), layout="constrained")
    panels = figure.subfigures(1, 2, width_ratios=(2, 1))
    axes = panels[0].subplots(1, 2)
    styles = {name: "--" for name, solver in SOLVERS.items() if solver.stochastic} | {"other noise": ":"}
    for axis, key, title in zip(
        axes, ("rms", "frechet"), ("distance of each sample to the reference", "Frechet distance"), strict=True
    ):
        for number, (name, line) in enumerate(points.items()):
            if key == "frechet" or name not in styles:
                calls, values = ([point[k] for point in line] for k in ("calls", key))
                axis.loglog(calls, values, styles.get(name, "-"), marker=".", color=plt.cm.tab20(number), label=name)
        axis.set(xlabel="network calls per sample", title=title)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)
    cells = panels[1].subplots(len(images), len(SHOWN), squeeze=False)
    for row, (name, found) in zip(cells, images.items(), strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=7)
        for cell, calls in zip(row, SHOWN, strict=True):
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set_visible(False)
            if within := [c for c in found if c <= calls]:
                cell.imshow(found[max(within)].squeeze(), cmap="gray", vmin=0, vmax=255)
    for cell, calls in zip(cells[0], SHOWN, strict=True):
        cell.set_title(str(calls), fontsize=8)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("solvers.png"))
    parser.add_argument("--count", type=int, default=512, help="samples (512)")
    options = parser.parse_args(arguments)
    enable_compile_cache()
    points, images = measure(gen.load(options.run), options.count)
    draw(points, images, options.out)
    options.out.with_suffix(".json").write_text(json.dumps(points, indent=1))
    print(f"wrote {options.out} and {options.out.with_suffix('.json')}")


if __name__ == "__main__":
    main()
