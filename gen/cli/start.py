"""What every command that computes does first."""

from typing import Annotated

import tyro

from gen.errors import GenError

__all__ = ["Multihost", "start"]

Multihost = Annotated[bool, tyro.conf.FlagCreatePairsOff]


def start(multihost: bool = False) -> None:
    """Turns the compile cache on and, if asked to, joins the other processes of the job.

    Args:
      multihost: the same command was started once per host by SLURM, GKE, a TPU pod or MPI; jax finds the others.
    Raises GenError when it does not.
    """
    import jax

    from gen.training.engine import enable_compile_cache

    enable_compile_cache()
    if not multihost:
        return
    try:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # read on CPU only
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise GenError(
            f"--multihost found no job to join ({reason}); start it by srun, mpirun or on a TPU pod"
        ) from None
