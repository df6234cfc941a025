"""`python eval.py babilong` as a process: killed and resumed, and as two processes on eight devices."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

from tests.e2e.test_train_program import ROOT, call
from tests.e2e.test_two_processes import free_port

pytestmark = pytest.mark.slow
QUESTIONS = 12
PATIENCE = 400  # seconds, on a machine with other work


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    given = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, "eval.py", *arguments],
        env=os.environ | given | environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A trained run, questions, and the result files of an evaluation without interruption."""
    place = tmp_path_factory.mktemp("evaluation")
    done = call("lm2_tiny", "--workdir", str(place / "run"), "--optim.steps", "1", "--optim.warmup-steps", "0")
    assert done.returncode == 0, done.stderr
    for length, facts in (("0k", 1), ("1k", 4)):
        rows = [
            {
                "input": f"Mary went to the kitchen. John moved to room {number}. " * facts,
                "question": "Where is Mary? ",
                "target": "kitchen",
            }
            for number in range(QUESTIONS)
        ]
        (place / "data" / length).mkdir(parents=True)
        (place / "data" / length / "qa1.json").write_text(json.dumps(rows))
    done = call(*options(place, "whole"), program="eval.py")
    assert done.returncode == 0, done.stderr
    return place


def options(place: pathlib.Path, out: str, *more: str) -> list[str]:
    folders = ["--workdir", str(place / "run"), "--data-dir", str(place / "data"), "--out", str(place / out)]
    return ["babilong", *folders, "--batch-rows", "2", "--max-new-tokens", "4", *more]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def answered(place: pathlib.Path, out: str) -> list[str]:
    file = place / out / "answers.jsonl"
    return file.read_text().split("\n")[:-1] if file.exists() else []


def test_a_killed_evaluation_resumes(place):
    """SIGKILL after some answers: they are kept, and the second call gives the files of one call."""
    process = start(*options(place, "killed"))
    end = time.monotonic() + PATIENCE
    while len(answered(place, "killed")) < 4 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was still at work"
    kept = answered(place, "killed")
    assert 4 <= len(kept) < 2 * QUESTIONS
    done = call(*options(place, "killed"), program="eval.py")
    assert done.returncode == 0, done.stderr
    assert contents(place / "killed") == contents(place / "whole")
    assert set(kept) <= set(answered(place, "killed"))


def test_two_processes_answer_as_one(place):
    """Rows and heads are split over eight devices of two processes; one of them writes."""
    address = f"localhost:{free_port()}"
    mesh = ["--mesh.data", "4", "--mesh.model", "2", "--distributed"]
    processes = [
        start(
            *options(place, "both", *mesh),
            JAX_NUM_CPU_DEVICES="4",
            NPROC="64",
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
        )
        for index in range(2)
    ]
    printed = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    assert "wrote" in printed[0]
    assert "wrote" not in printed[1]
    assert contents(place / "both") == contents(place / "whole")
