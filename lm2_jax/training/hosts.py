"""Several processes as one job: how they find each other, and how they agree on control flow."""

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from lm2_jax.errors import UserError

T = TypeVar("T")


class FailedElsewhere(UserError):
    """Something failed on other processes of the job, and so on this one."""


# How long a process that ends, also with an error, waits for the others to end; after that jax kills them.
LEAVE_SECONDS = 60


def join_hosts() -> None:
    """Joins the processes that run the same command on the other hosts; before any device is used.

    On TPU slices, GKE and under Slurm or MPI, jax finds them by itself. Elsewhere $JAX_COORDINATOR_ADDRESS (host:port
    of the first process), $JAX_NUM_PROCESSES and $JAX_PROCESS_ID identify them.

    Raises:
      UserError: the others cannot be found, or do not answer.
    """
    number, index = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    try:
        jax.distributed.initialize(
            num_processes=None if number is None else int(number),
            process_id=None if index is None else int(index),
            shutdown_timeout_seconds=LEAVE_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--distributed: cannot join the other hosts: {str(error).strip()} Off TPU slices, GKE, Slurm and MPI, set "
            "JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID; on a "
            "single host leave --distributed out.",
            status=1,
        ) from error


def all_gather_hosts(value: Any) -> np.ndarray:
    """One small array from each process, in the order of processes; all processes must call this."""
    value = np.asarray(value)
    if jax.process_count() == 1:
        return value[None]
    return np.asarray(multihost_utils.process_allgather(value))


def run_on_all_hosts(make: Callable[[], T]) -> T:
    """Calls `make` on every process; if it fails on one, it fails on all, so that none waits for one that has left.

    Args:
      make: must not wait for another process.
    Raises:
      UserError: it failed on other processes only. Where it failed, what it raised.
    """
    if jax.process_count() == 1:
        return make()
    result, failure = None, None
    try:
        result = make()
    except Exception as error:  # whatever it is, the others must fail too
        failure = error
    failed = np.flatnonzero(all_gather_hosts(np.int32(failure is not None)))
    if failure is not None:
        raise failure
    if failed.size:
        raise FailedElsewhere(f"this failed on process {_listed(failed)} of the job, whose output says why", status=1)
    return result  # pyright: ignore[reportReturnType]


def from_first_process(make: Callable[[], T]) -> T:
    """What the first process makes, on all processes; all must call this.

    Args:
      make: gives JSON types; called on the first process only.
    Raises:
      UserError: it failed on the first process. There, what it raised.
    """
    if jax.process_count() == 1:
        return make()
    is_first = jax.process_index() == 0
    content = np.frombuffer(run_on_all_hosts(lambda: json.dumps(make()).encode() if is_first else b""), np.uint8)
    size = int(all_gather_hosts(np.int32(content.size))[0])
    return json.loads(all_gather_hosts(content if is_first else np.zeros(size, np.uint8))[0].tobytes())


def check_same(**texts: str) -> None:
    """Refuses processes that were started differently.

    Args:
      **texts: what must be equal, by its name in the message.
    Raises:
      UserError: on all processes, if one has another text than the first.
    """
    digests = all_gather_hosts(
        [list(hashlib.sha256(text.encode()).digest()) for text in texts.values()]
    )  # [process, text, 32]
    for index, name in enumerate(texts):
        others = np.flatnonzero((digests[:, index] != digests[0, index]).any(axis=1))
        if others.size:
            raise UserError(
                f"--distributed: process {_listed(others)} of the job has another {name} than the first one. Run the "
                "same version with the same options on all hosts."
            )


def _listed(processes: np.ndarray) -> str:
    return ", ".join(str(process) for process in processes)
