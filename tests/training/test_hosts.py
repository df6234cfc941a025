"""Processes that find each other."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest

from lm2_jax.errors import UserError
from lm2_jax.training.hosts import join_hosts

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import jax
from lm2_jax.training.hosts import join_hosts
join_hosts()
print(jax.process_index(), jax.process_count(), jax.device_count())
"""


def test_nobody_says_where_the_others_are(monkeypatch):
    def initialize(**arguments):
        assert arguments == {"num_processes": 2, "process_id": None}
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(
        UserError, match=r"coordinator_address should be defined.*set JAX_COORDINATOR_ADDRESS"
    ) as caught:
        join_hosts()
    assert caught.value.status == 1


@pytest.mark.slow
def test_two_processes_are_one_job():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    running = []
    for index in range(2):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
        command = [sys.executable, "-c", PROGRAM]
        running.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True))
    printed = [process.communicate(timeout=200)[0].strip() for process in running]
    assert printed == ["0 2 2", "1 2 2"]
