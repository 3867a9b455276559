"""``gen doctor``."""

import importlib.util
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["doctor"]

CORE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scipy", "safetensors")
# feature -> (module that provides it, extra that installs it)
FEATURES = {
    "TensorBoard logs": ("tensorboardX", "tensorboard"),
    "Weights & Biases logs": ("wandb", "wandb"),
    "downloads from the Hugging Face hub": ("huggingface_hub", "hub"),
    "Hugging Face data sets": ("datasets", "hf-datasets"),
    "JPEG decoding at twice the speed": ("simplejpeg", "simplejpeg"),
    "tests": ("pytest", "dev"),
}


def doctor() -> None:
    """Shows devices, versions and caches, tries a matmul and a collective, and names what is missing.

    Exits with an error when a calculation gives a wrong number.

    Examples:
      gen doctor
      XLA_FLAGS=--xla_force_host_platform_device_count=8 gen doctor     eight simulated devices
    """
    import jax

    print(f"python {sys.version.split()[0]}  gen {_version('gen-image')}")
    print("  ".join(f"{name} {_version(name)}" for name in CORE))
    devices = jax.devices()
    print(
        f"devices: {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), {jax.process_count()} process(es)"
    )
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    if memory:
        print(f"memory per device: {memory / 2**30:.1f} GiB")
    print(f"compile cache: {_cache()}")
    _try()
    for feature, (module, extra) in FEATURES.items():
        if importlib.util.find_spec(module) is None:
            print(f"missing for {feature}: pip install 'gen-image[{extra}]'")
    if devices[0].platform == "cpu":
        print("no accelerator found; on one, pip install 'gen-image[cuda]' or 'gen-image[tpu]'")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cache() -> str:
    """The compile cache folder, its size, and whether it can be written."""
    from gen.training.engine import enable_compile_cache

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
    from gen.training.sharding import batch_sharding, make_mesh

    n = jax.device_count()
    split = batch_sharding(make_mesh())
    x = np.random.default_rng(0).standard_normal((8 * n, 64)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        product = np.asarray(jax.jit(lambda a: a.T @ a)(jax.device_put(x, split)))  # contracts the axis that is split
    error = float(np.abs(product - x.T.astype(np.float64) @ x).max() / np.abs(product).max())
    total = float(jax.jit(jnp.sum)(jax.device_put(jnp.arange(n, dtype=jnp.float32), split)))
    if error > 1e-4 or total != n * (n - 1) / 2:
        raise GenError(
            f"the devices calculate wrongly: matmul error {error:.1e}, sum {total}; check drivers and jaxlib"
        )
    print(f"matmul over {n} device(s): ok (relative error {error:.0e}); sum across devices: ok")
