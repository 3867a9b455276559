"""Targets: accelerators that programs are compiled for where none is at hand.

The compilers of TPUs and of NVIDIA GPUs come in wheels and need no device, only its description. What is known of a
device beside that stands in `CHIPS`, with its source.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from gen.config import suggest
from gen.errors import GenError

__all__ = ["CHIPS", "Chip", "Target", "find_target", "prepare"]


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is known of a device, and from where.

    Attributes:
      title: its name, for people.
      platform: what jax calls its kind: "tpu" or "cuda".
      memory: bytes that programs may use.
      peak: products and sums per second in bfloat16, dense.
      bandwidth: bytes per second between the device and its memory.
      links: bytes per second that a device can send to the others of its slice or machine, all its links together.
      clock: cycles per second of the compiler's estimates; 0 where it makes none.
      source: where the figures stand.
    """

    title: str
    platform: str
    memory: int
    peak: float
    bandwidth: float
    links: float
    clock: float
    source: str


_GIB, _TPUS = 2**30, "Google Cloud, TPU system architecture, key chip specifications of {}; the clock is peak / units"
# A TPU's links are given in both directions together: half of that can be sent. Its clock follows from the peak and
# from its matrix units, 4 of 128 x 128 (v5e) and 8 (v5p, two cores). By the 2 of 256 x 256 that are published of v6e it
# would be 3.5 GHz; that of v5p is taken for it, so its estimates are good for comparing alone.
CHIPS: Mapping[str, Chip] = {
    "v5e": Chip("TPU v5e", "tpu", 16 * _GIB, 197e12, 819e9, 200e9, 1.5e9, _TPUS.format("v5e")),
    "v5p": Chip("TPU v5p", "tpu", 95 * _GIB, 459e12, 2765e9, 600e9, 1.75e9, _TPUS.format("v5p")),
    "v6e": Chip("TPU v6e", "tpu", 32 * _GIB, 918e12, 1600e9, 400e9, 1.75e9, _TPUS.format("v6e")),
    "h200": Chip(
        "NVIDIA H200",
        "cuda",
        139 * _GIB,
        989e12,
        4.8e12,
        450e9,
        0.0,
        "NVIDIA H200 Tensor Core GPU datasheet (SXM); 141 GB, of which a driver leaves 139 GiB at most",
    ),
}

_SLICES = "v5e:8x8, v5p:4x4x4, v6e:4x4 (a TPU slice), h200, h200:8 (GPUs of one machine)"
_WHEELS = {
    "tpu": ("libtpu", "pip install 'jax[tpu]'"),
    "cuda": ("jax_cuda12_plugin", "pip install 'jax[cuda12]'"),
}

# What the compiler of GPUs is told of an H200 (cudaDeviceProp; compute capability 9.0).
_H200 = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 48 << 10,
    "shared_memory_per_block_optin": 227 << 10,
    "shared_memory_per_core": 228 << 10,
    "threads_per_core_limit": 2048,
    "core_count": 132,
    "fpus_per_core": 128,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "memory_bandwidth": 4_800_000_000_000,
    "l2_cache_size": 50 << 20,
    "clock_rate_ghz": 1.98,
    "device_memory_size": 139 << 30,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices that a program is compiled for.

    Attributes:
      name: as it was asked for, such as "v5e:8x8".
      chip: what each of them is.
      shape: how many there are along each axis of the slice.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Counts the devices."""
        return math.prod(self.shape)

    def devices(self) -> list[Any]:
        """Gives their descriptions, which a mesh can be made of (`prepare` first).

        Raises GenError for a compiler that is not installed, and for a slice that does not exist.
        """
        module, wheels = _WHEELS[self.chip.platform]
        if importlib.util.find_spec(module) is None:
            raise GenError(
                f"the compiler of {self.chip.title} is not installed (no module {module}); install it beside gen: "
                f"{wheels} (docs/accelerators.md)"
            )
        import jax
        from jax.experimental import topologies

        try:
            if self.chip.platform == "tpu":
                found = topologies.get_topology_desc(platform="tpu", topology_name=self.name)
            else:
                found = topologies.get_topology_desc(
                    platform="cuda", topology_name="h200", target_config=_described(), topology=f"1x1x{self.count}"
                )
        except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise GenError(f"the compiler knows no target '{self.name}' ({reason[:200]}); such as {_SLICES}") from None
        if len(found.devices) != self.count:
            raise GenError(f"target '{self.name}' has {len(found.devices)} devices and not {self.count}; give another")
        return list(found.devices)


def _described() -> str:
    """The H200 as a text of XLA's GpuTargetConfigProto."""
    facts = " ".join(f"{name}: {value}" for name, value in _H200.items())
    return (
        f"gpu_device_info {{ {facts} cuda_compute_capability {{ major: 9 minor: 0 }} }} platform_name: 'CUDA' "
        "dnn_version_info { major: 9 minor: 10 patch: 0 } device_description_str: 'NVIDIA H200'"
    )


def find_target(text: str) -> Target:
    """Finds the target that `text` names: ``v5e:8x8``, ``h200``, ``h200:8``. Raises GenError for another one."""
    name, _, size = text.partition(":")
    if name not in CHIPS:
        raise GenError(f"unknown target '{text}'; {suggest(name, CHIPS)} (such as {_SLICES})")
    chip = CHIPS[name]
    if chip.platform == "cuda":
        if not re.fullmatch(r"[1-8]?", size):
            raise GenError(f"target '{text}' is not one machine; expected {name} or {name}:2 to {name}:8")
        return Target(text, chip, (int(size or 1),))
    axes = 3 if name == "v5p" else 2
    if not re.fullmatch("x".join([r"[1-9]\d*"] * axes), size):
        raise GenError(f"target '{text}' is no slice of {chip.title}; expected {axes} axes, such as {_SLICES}")
    return Target(text, chip, tuple(map(int, size.split("x"))))


def prepare() -> None:
    """Sets what the compilers read from the environment when they are loaded: to be called before jax is.

    Nothing is asked of the machine that this runs on, and nothing it has is taken: several processes may compile at a
    time. Without a device nothing can be tuned by trying, and untuned products of Triton may find no tile.
    """
    quiet = {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3"}
    alone = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }
    for name, value in {**quiet, **alone}.items():
        os.environ.setdefault(name, value)
    untuned = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {untuned}".strip()
