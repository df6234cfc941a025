"""A run that is killed five times ends bit for bit where the undisturbed one ends."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.e2e.tiny_run import MODELS, SAVE_EVERY, STEPS, write_documents

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "e2e" / "tiny_run.py"


def run(workdir: pathlib.Path, documents: pathlib.Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    command = [sys.executable, str(PROGRAM), str(workdir), str(documents), *options]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def finish(workdir: pathlib.Path, documents: pathlib.Path, *options: str) -> dict[str, np.ndarray]:
    out = workdir.parent / f"{workdir.name}.npz"
    done = run(workdir, documents, "--out", str(out), *options)
    assert done.returncode == 0, done.stderr
    with np.load(out) as arrays:
        return dict(arrays)


def differing(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if a[name].tobytes() != b[name].tobytes()]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_five_kills_two_of_them_inside_a_save_change_no_bit(tmp_path, model):
    documents = write_documents(tmp_path / "documents")
    undisturbed = finish(tmp_path / "undisturbed", documents, "--model", model)
    assert any("memory" in name for name in undisturbed), "the state that is carried is compared, too"

    workdir = tmp_path / "killed"
    for option, step in [
        ("--die-at-step", 3),  # before anything is saved
        ("--die-at-step", 6),
        ("--die-while-saving", 8),
        ("--die-at-step", 14),
        ("--die-while-saving", 16),
    ]:
        killed = run(workdir, documents, "--model", model, option, str(step))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        folders = {path.name for path in (workdir / "checkpoints").iterdir()}
        if option == "--die-while-saving":
            assert any(name.startswith(f"{step}.orbax-checkpoint-tmp") for name in folders), folders
            assert str(step) not in folders, "the checkpoint was complete before the kill"
    shutil.copytree(workdir, tmp_path / "forgetful")

    assert differing(undisturbed, finish(workdir, documents, "--model", model)) == []
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1)), "no step is missing, none appears twice"

    # The same with an empty memory must not pass, or the comparison would say nothing about memory.
    assert (tmp_path / "forgetful" / "checkpoints" / str(16 - SAVE_EVERY)).exists()
    forgetful = differing(undisturbed, finish(tmp_path / "forgetful", documents, "--model", model, "--zero-memory"))
    assert any("params" in name for name in forgetful)
    assert any("memory" in name for name in forgetful)


@pytest.mark.slow
def test_a_kill_while_a_run_is_replaced_loses_none(tmp_path):
    """Before the new run's first checkpoint the old one comes back; after it the new one resumes."""
    documents = write_documents(tmp_path / "documents")
    workdir = tmp_path / "workdir"
    old = finish(workdir, documents)
    killed = run(workdir, documents, "--overwrite", "--die-at-step", str(SAVE_EVERY - 1))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(path.name for path in (workdir / ".replaced" / "checkpoints").iterdir()) == ["16", "20"]
    assert not list((workdir / "checkpoints").glob("[0-9]"))
    again = run(workdir, documents, "--out", str(tmp_path / "again.npz"))
    assert again.returncode == 0, again.stderr
    assert "the run that --overwrite was replacing is back" in again.stderr
    assert "This run is finished" in again.stdout
    with np.load(tmp_path / "again.npz") as arrays:
        assert differing(old, dict(arrays)) == []
    assert not (workdir / ".replaced").exists()

    killed = run(workdir, documents, "--overwrite", "--die-at-step", str(SAVE_EVERY + 2))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (workdir / ".replaced" / "checkpoints" / "20").exists()
    resumed = run(workdir, documents)
    assert f"resuming after step {SAVE_EVERY}" in resumed.stdout, resumed.stderr
    assert not (workdir / ".replaced").exists()
