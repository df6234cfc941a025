"""`python train.py` as people call it: help, mistakes, and a run that is resumed."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[2]


def call(*arguments: str, program: str = "train.py") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "COLUMNS": "200",
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
    }
    command = [sys.executable, program, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def assert_refused(done: subprocess.CompletedProcess[str], *words: str, status: int = 2) -> None:
    text = done.stdout + done.stderr
    assert done.returncode == status, text
    assert "Traceback" not in text
    for word in words:
        assert word in text


@pytest.mark.slow  # each call starts a Python with jax
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lm2_tinny"], ["lm2_tinny", "Did you mean 'lm2_tiny'"]),
        (["lm2_tiny", "--optim.learning-rat", "1"], ["--optim.learning-rat", "--optim.learning-rate"]),
        (["lm2_tiny", "--optim.steps", "many"], ["many", "--optim.steps"]),
        (["lm2_tiny", "--data.rows", "0"], ["data.rows must be at least 1, got 0"]),
        (["lm2_tiny", "--model.decoder.num-heads", "5"], ["decoder.width=32 is not a multiple of decoder.num_heads=5"]),
        (["lm2_tiny", "--mesh.data", "3"], ["3", "1 devices", "mesh.data=3"]),
        (["lm2_tiny", "--plan", "--mesh.slots", "4"], ["model.memory.num_slots=6 is not divisible by mesh.slots=4"]),
    ],
)
def test_a_mistake_is_one_message(tmp_path, arguments, words):
    assert_refused(call(*arguments, *(["--workdir", str(tmp_path / "w")] if len(arguments) > 1 else [])), *words)
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_help_lists_presets_and_every_field_with_its_doc():
    done = call("--help")
    assert done.returncode == 0
    assert "lm2_tiny" in done.stdout
    done = call("lm2_tiny", "--help")
    assert done.returncode == 0
    for words in ("--model.memory.num-slots", "--mesh.fsdp", "--workdir", "Steps between lines of metrics.jsonl"):
        assert words in done.stdout


def test_a_foreign_workdir_is_refused_with_the_fields(tmp_path):
    once = ("none_tiny", "--workdir", str(tmp_path), "--optim.steps", "1", "--optim.warmup-steps", "0")
    first = call(*once, "--optim.learning-rate", "0.125")
    assert first.returncode == 0, first.stderr
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = call(*once)
    assert_refused(done, "another config", "optim.learning_rate: 0.125 there, 0.002 now", "choose another --workdir")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_two_steps_and_then_two_more(tmp_path):
    arguments = ["lm2_tiny", "--workdir", str(tmp_path), "--optim.steps", "4", "--train.log-every", "1"]
    arguments += ["--checkpoint.every-steps", "2"]
    first = call(*arguments)
    assert first.returncode == 0, first.stderr
    for path in (tmp_path / "checkpoints" / "4").rglob("manifest.ocdbt"):
        path.write_bytes(b"")
    second = call(*arguments)
    assert second.returncode == 0, second.stderr
    assert "resuming after step 2" in second.stdout
    assert str(tmp_path / "checkpoints" / "4") in second.stderr
    assert "Traceback" not in second.stderr
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
