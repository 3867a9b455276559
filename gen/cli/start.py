"""What every command that computes does first."""

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from typing import Annotated

import tyro

from gen.cli import together
from gen.cli.flags import Switch, flag
from gen.errors import GenError

__all__ = ["ALONE", "Job", "Multihost", "join_late", "start"]

_called = False  # whether `start` was
_PATIENCE = 300  # seconds in which all processes of a job must have started
_LATE = 10  # seconds that a process which failed before it joined waits for the others, to tell them


@dataclasses.dataclass(frozen=True)
class Job:
    """The processes that work together on one command.

    Attributes:
      multihost: this is one of the processes of a SLURM, GKE, TPU pod or MPI job.
      coordinator: of another job: the address of process 0.
      processes: of another job: their number.
      process: of another job: which this is, from 0.
    """

    multihost: Switch = False
    coordinator: Annotated[str | None, flag("HOST:PORT")] = None
    processes: Annotated[int | None, flag("N")] = None
    process: Annotated[int | None, flag("I")] = None


ALONE = Job()
Multihost = Annotated[Job, flag(name="")]  # its fields are flags of the command


def start(job: Job = ALONE, patience: int = _PATIENCE) -> None:
    """Turns the compile cache on and, if asked to, joins the other processes of the job.

    Without a coordinator jax finds the others through SLURM, the TPU pod's metadata, GKE or MPI. A job that is there
    already (a program that called `jax.distributed.initialize` itself) is kept.

    Raises GenError for flags that name no job, and when the job cannot be joined.
    """
    global _called
    _called = True
    import jax

    from gen.training.program import enable_compile_cache

    explicit = (job.coordinator, job.processes, job.process)
    if any(value is not None for value in explicit):
        _check(job)
    enable_compile_cache()
    if not (job.multihost or job.coordinator) or jax.distributed.is_initialized():
        return
    try:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # read on CPU only
        jax.distributed.initialize(
            *explicit,
            cluster_detection_method="deactivate" if job.coordinator else None,
            initialization_timeout=patience,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise GenError(
            f"--multihost found no job to join ({reason}); start it by srun, mpirun or on a TPU pod, or name it: "
            "--coordinator HOST:PORT --processes N --process I"
        ) from None
    together.watch()


def join_late(args: Sequence[str]) -> bool:
    """Joins the job that the flags of a command name which failed before it called `start`; whether there is one."""
    if _called or not any(arg.startswith(("--multihost", "--coordinator")) for arg in args):
        return False
    with contextlib.suppress(SystemExit, GenError):
        with contextlib.redirect_stderr(io.StringIO()):
            job, _ = tyro.cli(Job, args=list(args), return_unknown_args=True)
        start(job, _LATE)
    return together.joined()


def _check(job: Job) -> None:
    if job.coordinator is None or job.processes is None or job.process is None:
        raise GenError("a job is named by three flags; give --coordinator HOST:PORT, --processes N and --process I")
    host, colon, port = job.coordinator.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise GenError(f"--coordinator is '{job.coordinator}'; expected HOST:PORT of process 0, such as node0:1234")
    if not 0 <= job.process < job.processes:
        raise GenError(f"--process is {job.process} of {job.processes}; expected 0 to {job.processes - 1}")
