"""Two processes as one job on this machine: whatever happens to them, they end where one process ends.

One run goes through many hands, and all tests look at what they left:

    first     two processes, SIGTERM at the second one only
    second    one process goes on, SIGTERM
    third     two processes go on, SIGKILL at both
    fourth    two processes go on, SIGKILL at the second one only
    fifth     two processes go on, behind a checkpoint that the second one cannot read, to the end
"""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import pytest

from tests.e2e.hosts_run import SAVE_EVERY, STEPS
from tests.e2e.tiny_run import write_documents

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "e2e" / "hosts_run.py"
DEVICES = 8
PATIENCE = 400  # seconds, on a machine that has other things to do
HEARTBEAT = 20

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Job:
    """Processes that train together.

    Args:
      folder: where they tell what they have.
      processes: how many; they share eight devices.
      options: of hosts_run.py, or what gives them by process.
    """

    def __init__(self, folder: pathlib.Path, processes: int, options: Callable[[int], list[str]]):
        folder.mkdir()
        self.folder, address = folder, f"localhost:{free_port()}"
        self.running: list[subprocess.Popen[bytes]] = []
        for index in range(processes):
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(DEVICES // processes),
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
                "PYTHONPATH": str(ROOT),
            }
            together = []
            if processes > 1:
                environment |= {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(processes),
                    "JAX_PROCESS_ID": str(index),
                }
                together = ["--distributed"]
            command = [sys.executable, str(PROGRAM), str(folder.parent / "documents"), str(folder)]
            with open(folder / f"{index}.log", "wb") as log:
                self.running.append(
                    subprocess.Popen(
                        [*command, *options(index), *together],
                        env=environment,
                        cwd=ROOT,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait_until(self, done: Callable[[], bool]) -> None:
        """Waits for something that the processes are to do, or stops them and shows what they printed."""
        end = time.monotonic() + PATIENCE
        while not done():
            left = [process.poll() for process in self.running]
            if time.monotonic() > end or any(status is not None for status in left):
                self.kill()
                pytest.fail(
                    f"in {self.folder.name}, statuses {left}:\n" + "\n".join(map(self.output, range(len(left))))
                )
            time.sleep(0.1)

    def held(self) -> None:
        """Waits until all are held at their step."""
        self.wait_until(lambda: all((self.folder / f"held-{index}").exists() for index in range(len(self.running))))

    def release(self) -> None:
        (self.folder / "released").touch()

    def kill(self) -> None:
        for process in self.running:
            process.kill()
            process.wait()

    def end(self) -> list[int]:
        """Exit statuses of all."""
        try:
            return [process.wait(timeout=PATIENCE) for process in self.running]
        finally:
            self.kill()

    def output(self, index: int) -> str:
        """What a process printed."""
        return (self.folder / f"{index}.log").read_text(errors="replace")

    def arrays(self, moment: str) -> dict[str, np.ndarray]:
        """All parts of all arrays that the processes had at the "begin" or the "end"."""
        parts: dict[str, np.ndarray] = {}
        for index in range(len(self.running)):
            with np.load(self.folder / f"{moment}-{index}.npz") as own:
                for name, part in own.items():
                    assert name not in parts or parts[name].tobytes() == part.tobytes(), (
                        f"{name} is not the same on all"
                    )
                    parts[name] = part
        return parts


class Story(NamedTuple):
    """All that happened."""

    alone: Job  # one process, undisturbed
    jobs: list[Job]  # first to fifth
    statuses: list[list[int]]
    folder: pathlib.Path


def damage_for_the_second(checkpoint: pathlib.Path) -> None:
    """Breaks the arrays' files that the second process wrote, and that the first does not read."""
    files = [path for path in (checkpoint / "opt_state" / "ocdbt.process_1").rglob("*") if path.is_file()]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert files


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    write_documents(folder / "documents")
    workdir = folder / "together"

    def start(name: str, processes: int, *options: str, place: pathlib.Path = workdir) -> Job:
        return Job(folder / name, processes, lambda index: ["--workdir", str(place), *options])

    alone = start("alone", 1, place=folder / "undisturbed")
    assert alone.end() == [0], alone.output(0)

    first = start("first", 2, "--hold-at-step", "2")
    first.held()
    first.running[1].send_signal(signal.SIGTERM)
    time.sleep(5)  # jax looks for the signal once a second, and tells the other process
    first.release()
    statuses = [first.end()]

    second = start("second", 1, "--hold-at-step", "4")
    second.held()
    second.running[0].send_signal(signal.SIGTERM)
    second.release()
    statuses.append(second.end())

    third = start("third", 2, "--hold-at-step", "7")
    third.held()
    third.wait_until((workdir / "checkpoints" / "6").exists)
    third.kill()
    statuses.append(third.end())

    fourth = start("fourth", 2, "--hold-at-step", "7", "--heartbeat", str(HEARTBEAT))
    fourth.held()
    fourth.running[1].kill()
    fourth.release()
    statuses.append(fourth.end())

    damage_for_the_second(workdir / "checkpoints" / "6")
    fifth = start("fifth", 2)
    statuses.append(fifth.end())
    return Story(alone, [first, second, third, fourth, fifth], statuses, folder)


def differing(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if a[name].tobytes() != b[name].tobytes()]


def step_of(arrays: dict[str, np.ndarray]) -> int:
    return int(arrays[".step []"])


def lines_of(workdir: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_each_process_has_its_rows_and_its_half_of_what_is_split(story):
    for name in (".memory.", ".params", ".opt_state"):
        with (
            np.load(story.jobs[0].folder / "begin-0.npz") as own,
            np.load(story.jobs[0].folder / "begin-1.npz") as other,
        ):
            halves = [part for part in own if part.startswith(name) and part not in other]
        assert halves, f"both processes hold the same of {name}"


def test_the_end_is_that_of_one_process(story):
    """Sums over processes are made in another order than within one; seen: 3e-15 beside memory of size 7."""
    assert story.statuses[-1] == [0, 0], story.jobs[-1].output(0)
    ours, theirs = story.jobs[-1].arrays("end"), story.alone.arrays("end")
    assert ours.keys() == theirs.keys()
    assert step_of(ours) == STEPS
    assert any(name.startswith(".memory.") for name in ours)
    for name, part in theirs.items():
        np.testing.assert_allclose(ours[name], part, rtol=1e-11, atol=1e-12, err_msg=name)


def test_every_step_is_written_once_and_says_what_one_process_says(story):
    ours, theirs = lines_of(story.folder / "together"), lines_of(story.folder / "undisturbed")
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for line, expected in zip(ours, theirs, strict=True):
        assert line.keys() == expected.keys()
        for name in expected.keys() - {"tokens_per_second"}:
            assert line[name] == pytest.approx(expected[name], rel=1e-6), (line["step"], name)
    assert "eval_loss" in ours[-1]


def test_only_the_first_process_prints(story):
    for job in (story.jobs[0], story.jobs[2]):
        assert f"/{STEPS} | loss" in job.output(0)
        assert "loss" not in job.output(1)


def test_sigterm_at_one_process_stops_all_behind_the_same_step(story):
    assert story.statuses[0] == [0, 0], story.jobs[0].output(1)
    ends = [dict(np.load(story.jobs[0].folder / f"end-{index}.npz"))[".step []"] for index in range(2)]
    assert ends == [3, 3], "held behind step 2, so 3 is the first that none has passed"
    assert 3 % SAVE_EVERY, "no step of the schedule"
    assert (story.folder / "together" / "checkpoints" / "3" / "memory").exists()


def test_one_process_goes_on_with_what_two_left_and_two_with_what_one_left(story):
    first, second, third = story.jobs[:3]
    assert story.statuses[1] == [0], second.output(0)
    assert step_of(second.arrays("begin")) == 3
    assert differing(second.arrays("begin"), first.arrays("end")) == []
    assert step_of(third.arrays("begin")) == 5
    assert differing(third.arrays("begin"), second.arrays("end")) == []


def test_a_run_that_was_killed_goes_on_behind_its_checkpoint(story):
    assert story.statuses[2] == [-signal.SIGKILL] * 2
    assert step_of(story.jobs[3].arrays("begin")) == 6


def test_one_death_ends_the_job_with_a_message(story):
    status, killed = story.statuses[3]
    assert killed == -signal.SIGKILL
    assert status != 0
    assert re.search("another task died|tasks? .*(crashed|unhealthy|heartbeat)", story.jobs[3].output(0)), story.jobs[
        3
    ].output(0)


def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_all(story):
    fifth, folder = story.jobs[4], story.folder / "together" / "checkpoints" / "6"
    assert differing(fifth.arrays("begin"), story.jobs[2].arrays("begin")) == [], (
        "the third began with checkpoint 5, too"
    )
    assert f"skipping the damaged checkpoint {folder}: FailedElsewhere: this failed on process 1" in fifth.output(0)
    assert f"skipping the damaged checkpoint {folder}: " in fifth.output(1)


def test_processes_that_do_not_share_a_workdir_are_refused(tmp_path):
    write_documents(tmp_path / "documents")
    places = [tmp_path / "here", tmp_path / "there"]
    job = Job(tmp_path / "job", 2, lambda index: ["--workdir", str(places[index])])
    assert job.end() == [2, 2], job.output(0)
    for index in range(2):
        assert "what the first process writes there, process 1 does not see" in job.output(index)
        assert "Traceback" not in job.output(index)
        assert not places[index].exists(), "a refused run leaves no folder"
