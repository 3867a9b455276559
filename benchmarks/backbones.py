"""Training steps, forward passes and guided sampling against PyTorch, as ratios in one run.

    python benchmarks/backbones.py [--cases DiT-S/2 EDM] [--peer-python PATH] [--pairs 5] [--dtype bfloat16]

Cases: DiT-S/2 (batch 8, and 50-step DDIM with guidance), DiT-B/2 (batch 4), LightningDiT-B/1 (batch 4), EDM's CIFAR-10
network (batch 8). A training step is the whole program that `gen train` runs: noise, loss, gradients, their norm and
the guard against NaN, AdamW, and an average of the parameters.

The peers are plain torch modules with the same parameters doing the same work (`torch_peers.py`; our weights are
loaded into them and the outputs compared first), eager and by torch.compile, and diffusers' DiT with `--diffusers`.
`--peer-python` is an interpreter that has them. The sides run in turns; the figure is torch's seconds over ours in each
pair, median (lowest to highest). On a CPU both run on one thread of one core and the seconds are CPU time, or with
`--threads 2` on as many threads and cores, in wall time, for which the machine must be quiet; so it is on a GPU.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.diffusion.backbones.dit import dit
from gen.diffusion.backbones.edm_unet import SongUNetConfig
from gen.diffusion.backbones.lightningdit import lightningdit
from gen.diffusion.ddpm import DDPM
from gen.diffusion.denoiser import Denoiser, EDMPrecondition, Predict
from gen.diffusion.objectives import EDMLoss
from gen.diffusion.process import EDM, Linear
from gen.diffusion.train import DenoiserTask
from gen.nn.network import count
from gen.pretrained import dit as official_dit
from gen.pretrained import edm as official_edm
from gen.pretrained import lightningdit as official_lightningdit
from gen.sampling.generator import Sampler
from gen.sampling.grids import Respaced
from gen.sampling.guidance import ClassifierFree
from gen.sampling.solvers import DDIM
from gen.training.ema import Constant
from gen.training.optim import OptimConfig

STEPS = 50


def tie_to_cores(number: int) -> None:
    """Ties this process and its children to the last `number` cores, and each to as many threads.

    To be called before anything is computed: jax counts the cores at its first use.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-number:])
    os.environ["OMP_NUM_THREADS"] = str(number)
    if number == 1:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"


def on_cpu() -> bool:
    """Whether there is no accelerator."""
    return jax.default_backend() == "cpu"


def cpu_time() -> bool:
    """Whether CPU time is what counts: on one core."""
    return on_cpu() and len(os.sched_getaffinity(0)) == 1


@dataclasses.dataclass(frozen=True)
class Case:
    """A network with its batch size; `importer` writes its weights under official names."""

    network: Any
    batch: int
    importer: Any
    samples: int = 0  # batch size of the sampler, 0 for none

    @property
    def unet(self) -> bool:
        """Whether it is EDM's U-Net."""
        return isinstance(self.network, SongUNetConfig)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the input."""
        size = self.network.size if self.unet else self.network.size[0]
        return size, size, self.network.channels

    @property
    def denoiser(self) -> Denoiser:
        """What is trained."""
        if self.unet:
            return Denoiser(self.network, EDM(), EDMPrecondition(), EDMLoss())
        return Denoiser(self.network, Linear(), Predict("velocity"))

    def task(self) -> DenoiserTask:
        """How it is trained."""
        return DenoiserTask(
            self.denoiser,
            optim=OptimConfig(1e-4),
            emas=(Constant(0.9999),),
            dropout=0.0 if self.unet else 0.1,
        )

    def describe(self, modes: Sequence[str], diffusers: bool) -> dict[str, Any]:
        """What the peer needs to know."""
        net = self.network
        size, _, channels = self.shape
        common = {
            "batch": self.batch,
            "samples": self.samples,
            "size": size,
            "channels": channels,
            "width": net.width,
            "dtype": net.dtype,
        }
        common |= {"modes": list(modes), "diffusers": diffusers, "steps": STEPS}
        if self.unet:
            rows = [[list(dataclasses.astuple(row)) for row in plan] for plan in net.plans]
            return common | {"kind": "unet", "encoder": rows[0], "decoder": rows[1], "dropout": net.dropout}
        modern = hasattr(net, "swiglu")
        hidden = net.hidden if modern else int(net.width * net.mlp_ratio)
        fields = {"depth": net.depth, "heads": net.heads, "patch": net.patch, "hidden": hidden}
        return common | fields | {"kind": "dit", "modern": modern}


def cases(dtype: str) -> dict[str, Case]:
    """The cases by name."""
    small, base = (dit(name, learned_variance=False, dtype=dtype) for name in ("S/2", "B/2"))
    cifar = SongUNetConfig(augment=9, dropout=0.13, dtype=dtype)
    return {
        "DiT-S/2": Case(small, 8, official_dit.IMPORTER, samples=1),
        "DiT-B/2": Case(base, 4, official_dit.IMPORTER),
        "LightningDiT-B/1": Case(lightningdit("B/1", dtype=dtype), 4, official_lightningdit.IMPORTER),
        "EDM": Case(cifar, 8, official_edm.IMPORTER),
    }


def randomised(params: Any) -> Any:
    """Small random values where a layer starts at zero, so that every product is of ordinary numbers."""
    rng = np.random.default_rng(0)

    def fill(leaf: np.ndarray) -> np.ndarray:
        return leaf if leaf.any() else 0.02 * rng.standard_normal(leaf.shape, np.float32)

    return jax.tree.map(fill, jax.device_get(params))


def seconds(call: Callable[[], Any]) -> float:
    """CPU seconds of a call on one core, else wall time: the mean of three seconds of calls after one that wakes up."""
    clock = time.process_time if cpu_time() else time.perf_counter
    times = []
    while len(times) < 2 or sum(times[1:]) < 3.0:
        began = clock()
        jax.block_until_ready(call())
        times.append(clock() - began)
    return statistics.mean(times[1:])


def programs(case: Case, params: Any) -> dict[str, Callable[[], Any]]:
    """Our side: calls without arguments by what they do."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((case.batch, *case.shape), np.float32))
    labels = jnp.asarray(rng.integers(1000, size=case.batch), jnp.int32)
    cond = {} if case.unet else {"label": labels}
    denoiser, task, key = case.denoiser, case.task(), jax.random.key(0)
    forward = jax.jit(lambda p, x, t, c: denoiser.net(p, x, (t,), c)[0])
    schedule = task.inputs(0, 1)
    step = jax.jit(lambda s, b, k: task.update(s, {}, b, schedule, k), donate_argnums=0)
    own, ema = (jax.tree.map(jnp.array, params) for _ in range(2))
    kept = [dataclasses.replace(task.init(key, {}, None), params={"net": own}, ema={"net": ema})]

    def train() -> Any:
        kept[0], metrics = step(kept[0], {"latent": x, **cond}, key)
        return metrics

    shared, t = jax.tree.map(jnp.array, params), jnp.full(case.batch, 0.5)
    ours: dict[str, Callable[[], Any]] = {"step": train, "forward": lambda: forward(shared, x, t, cond)}
    if case.samples:
        chain = Denoiser(case.network, DDPM("linear", 1000), Predict("eps", clock="index"))
        sampler = Sampler(DDIM(), Respaced(), STEPS, ClassifierFree(1.5))
        draw = jax.jit(lambda p, k, c: sampler(chain, p, k, case.shape, c))
        keys, few = jax.random.split(key, case.samples), {"label": labels[: case.samples]}
        ours["sample"] = lambda: draw(shared, keys, few)
    return ours


def product_rate() -> float:
    """The most float32 operations per second that a product of matrices reaches here, of three sizes."""
    best, product = 0.0, jax.jit(jnp.matmul)
    for size in (512, 1024, 2048):
        a = jnp.ones((size, size))
        best = max(best, 2 * size**3 / seconds(lambda a=a: product(a, a)))
    return best


def operations(case: Case, what: str) -> float:
    """Floating-point operations of a transformer: three forward passes for a training step, two for a guided one."""
    denoiser = dataclasses.replace(case.denoiser, network=dataclasses.replace(case.network, remat="none", scan=False))
    params = jax.eval_shape(denoiser.net.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((case.batch, *case.shape), jnp.float32)
    t, label = (jax.ShapeDtypeStruct((case.batch,), dtype) for dtype in (jnp.float32, jnp.int32))
    cond = {"label": label}
    cost = jax.jit(lambda p, x, t, c: denoiser.net(p, x, (t,), c)[0]).lower(params, x, t, cond).cost_analysis()
    image = cost["flops"] / case.batch
    return image * {"step": 3 * case.batch, "forward": case.batch, "sample": 2 * STEPS * case.samples}[what]


class Peer:
    """The torch side: a process that answers commands."""

    def __init__(self, python: str) -> None:
        script = Path(__file__).with_name("torch_peers.py")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([python, str(script)], text=True, **pipes)

    def ask(self, **command: Any) -> Any:
        """The answer to one command; leaves where the peer died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("the torch side ended; its message stands above (is torch installed in --peer-python?)")
        return json.loads(answer)


def write_weights(case: Case, params: Any, path: Path) -> None:
    """Our weights under official names, with an input and our output, in float32, images channels first."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, *case.shape), np.float32)
    t, y = np.array([0.3, 0.8], np.float32), np.array([3, 7], np.int32)
    network = dataclasses.replace(case.network, dtype="float32")
    net = dataclasses.replace(case.denoiser, network=network).net
    out = jax.jit(lambda p: net(p, x, (t,), {} if case.unet else {"label": y})[0])(params)
    named = {"in:x": x.transpose(0, 3, 1, 2), "in:t": t, "in:y": y, "out": np.asarray(out).transpose(0, 3, 1, 2)}
    np.savez(path, **case.importer.save(network, params), **named)


def measure(name: str, case: Case, peer: Peer, options: argparse.Namespace) -> None:
    """Prints a case's ratios."""
    params = randomised(case.denoiser.net.init(jax.random.key(0)))
    with tempfile.TemporaryDirectory() as folder:
        write_weights(case, params, path := Path(folder) / "weights.npz")
        description = case.describe(options.modes, options.diffusers)
        answer = peer.ask(op="build", case=description, weights=str(path))
    counts = ", ".join(f"{who}{number:,}" for who, number in answer["parameters"].items())
    print(f"\n{name}, batch {case.batch}, {case.network.dtype}; parameters: ours {count(params):,}, {counts}")
    print(f"same weights, same input: outputs differ by {answer['difference']:.1e} of the largest", flush=True)
    for what, ours in programs(case, params).items():
        if what not in options.what:
            continue
        peers = answer["peers"]
        seconds(ours)  # compiles
        for who in peers:
            peer.ask(op="run", peer=who, what=what)
        rows = [
            (seconds(ours), *(peer.ask(op="run", peer=who, what=what)["seconds"] for who in peers))
            for _ in range(options.pairs)
        ]
        # a U-Net's convolutions need fewer products than their definition (gen.nn.convolution): no bound is told
        bound = operations(case, what) / options.rate if on_cpu() and not case.unet else math.nan
        images = (case.samples if what == "sample" else case.batch) / statistics.median(row[0] for row in rows)
        print(f"  {LABELS[what]:30s} ours {images:8.3f} images/s", flush=True)
        for i, who in enumerate(peers, 1):
            ratios = sorted(row[i] / row[0] for row in rows)
            most = statistics.median(row[i] for row in rows) / bound
            spread = f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
            line = f"    over {who:18s} {statistics.median(ratios):5.2f} {spread}"
            print(line + ("" if math.isnan(most) else f", at most {most:.2f}"), flush=True)


LABELS = {"step": "training step", "forward": "forward", "sample": f"{STEPS}-step DDIM with guidance"}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(cases("float32"))
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help="which networks (all)")
    parser.add_argument("--what", nargs="+", choices=LABELS, default=list(LABELS), help="which programs (all)")
    parser.add_argument("--modes", nargs="+", choices=("eager", "compile"), default=["eager", "compile"])
    parser.add_argument("--diffusers", action="store_true", help="also against diffusers' DiT")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrix products")
    parser.add_argument("--threads", type=int, default=1, help="of either side on a CPU (1)")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved measurements (5)")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has torch (this one)")
    options = parser.parse_args()
    tie_to_cores(options.threads)
    peer = Peer(options.peer_python)
    where = "one thread, CPU time" if cpu_time() else f"{options.threads} threads, wall time"
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {where}; ratio: torch's seconds over ours")
    if on_cpu():
        options.rate = product_rate()
        print(f"products of matrices reach {options.rate / 1e9:.0f} GFLOP/s; 'at most': a program of nothing but them")
    for name in options.cases:
        measure(name, cases(options.dtype)[name], peer, options)


if __name__ == "__main__":
    main()
