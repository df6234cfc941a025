"""Processes that find each other."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from lm2_jax.errors import UserError
from lm2_jax.training import hosts
from lm2_jax.training.hosts import all_gather_hosts, check_same, from_first_process, join_hosts, run_on_all_hosts

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import jax
from lm2_jax.training.hosts import join_hosts
join_hosts()
print(jax.process_index(), jax.process_count(), jax.device_count())
"""


def test_nobody_says_where_the_others_are(monkeypatch):
    def initialize(**arguments):
        assert (arguments["num_processes"], arguments["process_id"]) == (2, None)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(
        UserError, match=r"coordinator_address should be defined.*set JAX_COORDINATOR_ADDRESS"
    ) as caught:
        join_hosts()
    assert caught.value.status == 1


def others_say(monkeypatch, *values):
    """As if there were more processes, which all say something: each a function of what this one says."""
    monkeypatch.setattr(jax, "process_count", lambda: 1 + len(values))
    monkeypatch.setattr(
        hosts, "all_gather_hosts", lambda own: np.stack([np.asarray(own), *(value(own) for value in values)])
    )


def test_one_process_asks_nobody():
    assert all_gather_hosts(7).tolist() == [7]
    assert run_on_all_hosts(lambda: "done") == "done"
    check_same(config="a", mesh="b")


def test_what_fails_on_another_process_fails_here_too(monkeypatch):
    others_say(monkeypatch, lambda own: 0, lambda own: 1)
    with pytest.raises(UserError, match="failed on process 2 of the job, whose output says why") as caught:
        run_on_all_hosts(lambda: "done")
    assert caught.value.status == 1


def test_what_fails_here_is_told_to_the_others_first(monkeypatch):
    told = []
    others_say(monkeypatch, lambda own: told.append(int(own)) or 0)
    with pytest.raises(ZeroDivisionError):
        run_on_all_hosts(lambda: 1 // 0)
    assert told == [1]


def test_what_fails_nowhere_is_returned(monkeypatch):
    others_say(monkeypatch, lambda own: 0)
    assert run_on_all_hosts(lambda: "done") == "done"


def test_processes_that_were_started_otherwise_are_refused(monkeypatch):
    def with_another_mesh(digests):
        digests = np.array(digests)
        digests[1, 31] ^= 1
        return digests

    others_say(monkeypatch, np.asarray, with_another_mesh)
    with pytest.raises(UserError, match="process 2 of the job has another mesh than the first one") as caught:
        check_same(config="a", mesh="b")
    assert caught.value.status == 2


def test_the_first_process_decides_for_all(monkeypatch):
    """Whatever the second would see: it is not asked."""
    sent = []

    def gather_as_first(own):
        sent.append(np.asarray(own))
        return np.stack([own, own])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "all_gather_hosts", gather_as_first)
    assert from_first_process(lambda: {"steps": [4, 8]}) == {"steps": [4, 8]}
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(hosts, "all_gather_hosts", lambda own: np.stack([sent.pop(0), own]))
    assert from_first_process(lambda: 1 // 0) == {"steps": [4, 8]}
    assert not sent


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
