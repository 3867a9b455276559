"""Processes that tests start: simulated devices, jobs of several processes, and an end for every wait."""

import os
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

__all__ = ["devices", "ended", "free_port"]


def devices(count: int) -> dict[str, str]:
    """Gives the environment of a process with so many simulated devices; the compiler's other flags stay."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    # fewer threads than devices deadlock in collectives
    return {"XLA_FLAGS": flags.strip(), "NPROC": "16", "JAX_PLATFORMS": "cpu"}


def free_port() -> str:
    """Gives a port that nothing listens on, for the coordinator of a job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def ended(*processes: subprocess.Popen[Any], seconds: float = 300) -> list[tuple[int, str]]:
    """Gives (exit status, what was printed to its pipes) of each of the processes of one job.

    All are read at once: one whose pipe is full would stop, and with it those that wait for it. None is left behind:
    what has not ended after `seconds` is killed and raises `subprocess.TimeoutExpired`.
    """

    def read(process: subprocess.Popen[Any]) -> tuple[int, str]:
        printed = process.communicate(timeout=seconds)
        return process.returncode, "".join(text for text in printed if text)

    with ThreadPoolExecutor(len(processes)) as pool:
        try:
            return list(pool.map(read, processes))
        finally:
            for process in processes:
                process.kill()
