"""Several processes as one job."""

import os

import jax

from lm2_jax.errors import UserError


def join_hosts() -> None:
    """Joins the processes that run the same command on the other hosts; before any device is asked for.

    On TPU slices, GKE and under Slurm or MPI, jax finds them by itself. Elsewhere $JAX_COORDINATOR_ADDRESS (host:port
    of the first process), $JAX_NUM_PROCESSES and $JAX_PROCESS_ID say which there are.

    Raises:
      UserError: nothing says where the others are, or they do not answer.
    """
    number, index = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    try:
        jax.distributed.initialize(
            num_processes=None if number is None else int(number), process_id=None if index is None else int(index)
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--distributed: cannot join the other hosts: {str(error).strip()} Off TPU slices, GKE, Slurm and MPI, set "
            "JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID; on a "
            "single host leave --distributed out.",
            status=1,
        ) from error
