import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from lm2_jax import UserError, runs
from lm2_jax.commands import generate
from lm2_jax.inference import saving
from tests.inference.subjects import text_of, tiny_run

ROOT = pathlib.Path(__file__).parents[2]
NAME = "lm2_tiny"


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Calls generate.py on a tiny run, in a folder of its own."""
    monkeypatch.setattr(runs, "load_run", lambda workdir: tiny_run(NAME))
    monkeypatch.chdir(tmp_path)
    return lambda *words: generate.main(["--workdir", "tiny", "--max-new-tokens", "6", *words])


def typed(monkeypatch, content: bytes) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(content))
    monkeypatch.setattr(sys, "stdin", stdin)


def test_a_book_is_read_once_and_asked_from_its_file(program, tmp_path, capsys, monkeypatch):
    (tmp_path / "book.txt").write_text(text_of(300))
    program("--read", "book.txt", "--save-memory", "book.memory", "--prompt", "who?")
    first = capsys.readouterr()
    assert "read 300 tokens" in first.err
    expected = tiny_run(NAME).generate("who?", tiny_run(NAME).read(text_of(300)), max_new_tokens=6)
    assert first.out == expected[0] + "\n"

    program("--memory", "book.memory", "--prompt", "who?")
    assert capsys.readouterr().out == first.out
    typed(monkeypatch, b"who?\n")
    program("--memory", "book.memory")
    assert capsys.readouterr().out == first.out
    program("--memory", "book.memory", "--question", "who?")
    assert capsys.readouterr().out != first.out


def test_prompts_of_a_file_are_answered_into_a_file(program, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "id": 7}\n\n{"prompt": "bcd"}\n{"question": "who?"}\n')
    program("--prompts", "in.jsonl", "--out", "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    answers = tiny_run(NAME).generate(["a", "bcd"], max_new_tokens=6)
    assert rows[:2] == [{"prompt": "a", "id": 7, "output": answers[0]}, {"prompt": "bcd", "output": answers[1]}]
    assert rows[2]["question"] == "who?"
    with pytest.raises(UserError, match="exists; it is not overwritten"):
        program("--prompts", "in.jsonl", "--out", "out.jsonl")


def test_two_files_and_a_memory_that_grows(program, tmp_path):
    (tmp_path / "a.txt").write_text(text_of(100))
    (tmp_path / "b.txt").write_text("b" * 77)
    program("--read", "a.txt", "b.txt", "--save-memory", "ab")
    program("--read", "a.txt", "--save-memory", "a")
    program("--memory", "a", "--read", "b.txt", "--save-memory", "a_and_b")
    assert (tmp_path / "ab").read_bytes() == (tmp_path / "a_and_b").read_bytes()
    program("--memory", "a", "--read", "b.txt", "--save-memory", "a")
    assert (tmp_path / "ab").read_bytes() == (tmp_path / "a").read_bytes()
    program("--read", "a.txt", "b.txt", "--save-memory", "ab")  # nothing is left to read
    assert (tmp_path / "ab").read_bytes() == (tmp_path / "a").read_bytes()
    with pytest.raises(UserError, match="holds the memory of another text"):
        program("--read", "b.txt", "--save-memory", "ab")
    assert (tmp_path / "ab").read_bytes() == (tmp_path / "a").read_bytes()


@pytest.mark.parametrize(
    ("is_update", "stop_after"),
    [*((False, n) for n in (1, 2, 3, 5, 6)), *((True, n) for n in (1, 2, 3, 5))],  # the sixth save is the last
)
def test_a_reading_that_stops_anywhere_is_resumed(program, tmp_path, monkeypatch, is_update, stop_after):
    """Stopped right after a save; files end inside segments.

    A memory that is its own start is not stopped after its last save: the same command then adds the text again.
    """
    (tmp_path / "old.txt").write_text("o" * 50)
    (tmp_path / "a.txt").write_text(text_of(150))
    (tmp_path / "b.txt").write_text("b" * 170)
    program("--read", "old.txt", "--save-memory", "old")
    read = ["--memory", "old", "--read", "a.txt", "b.txt", "--every", "40", "--save-memory"]
    program(*read, "undisturbed")
    read = [*read, "old" if is_update else "new"]
    write, writes = saving.Saver.write, []

    def write_and_stop(self, memory):
        write(self, memory)
        writes.append(memory.tokens_read)
        if len(writes) == stop_after:
            raise RuntimeError("stopped")

    monkeypatch.setattr(saving.Saver, "write", write_and_stop)
    with pytest.raises(RuntimeError, match="stopped"):
        program(*read)
    monkeypatch.setattr(saving.Saver, "write", write)
    if stop_after < 6:
        assert (tmp_path / read[-1]).read_bytes() != (tmp_path / "undisturbed").read_bytes()
    program(*read)
    assert (tmp_path / read[-1]).read_bytes() == (tmp_path / "undisturbed").read_bytes()


BAD = {
    "no model": ([], "expected a model", 2),
    "two models": (["--workdir", "w", "--model", "m"], "either --workdir", 2),
    "no such text": (["--workdir", "w", "--read", "none.txt"], "none.txt: no such file", 2),
    "an empty text": (["--workdir", "w", "--read", "empty.txt"], "the file is empty", 2),
    "a folder as text": (["--workdir", "w", "--read", "folder"], "this is a folder", 2),
    "binary as text": (["--workdir", "w", "--read", "binary.txt"], "expected UTF-8 text", 2),
    "zeros as text": (["--workdir", "w", "--read", "zeros.txt"], "zero bytes", 2),
    "no such memory": (["--workdir", "w", "--memory", "none", "--prompt", "a"], "none: no such file", 2),
    "text as memory": (["--workdir", "w", "--memory", "text.txt", "--prompt", "a"], "no safetensors file", 1),
    "text overwritten": (["--workdir", "w", "--read", "text.txt", "--save-memory", "text.txt"], "no safetensors", 1),
    "bad temperature": (["--workdir", "w", "--prompt", "a", "--temperature", "-1"], "--temperature -1.0: expected", 2),
    "no tokens": (["--workdir", "w", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0: expected", 2),
    "prompts without out": (["--workdir", "w", "--prompts", "in.jsonl"], "used together", 2),
    "prompts that are text": (
        ["--workdir", "w", "--prompts", "text.txt", "--out", "o"],
        "text.txt:1: expected a JSON",
        2,
    ),
    "no prompts": (["--workdir", "w", "--prompts", "empty.txt", "--out", "o"], "has no prompts", 2),
    "unwritable": (["--workdir", "w", "--read", "text.txt", "--save-memory", "text.txt/m"], "cannot write there", 1),
    "an empty prompt": (["--workdir", "w", "--prompt", ""], "prompt 0 is empty", 2),
    "chat without a template": (["--workdir", "w", "--chat"], "chat template", 2),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_message_and_nothing_is_lost(case, monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "load_run", lambda workdir: tiny_run(NAME))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"ab\xff\xfe\x00" * 100)
    (tmp_path / "zeros.txt").write_bytes(bytes(100))
    (tmp_path / "folder").mkdir()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    words, message, status = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        generate.main(words)
    assert error.value.status == status
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_standard_input_that_is_empty_or_no_text_is_refused(program, monkeypatch):
    typed(monkeypatch, b"")
    with pytest.raises(UserError, match="standard input is empty"):
        program()
    typed(monkeypatch, b"\xff\xfe")
    with pytest.raises(UserError, match="standard input: expected UTF-8"):
        program("--prompt", "-")


def test_unknown_options_end_with_status_2(program):
    with pytest.raises(UserError, match=r"--temprature: no such option\. Did you mean '--temperature'") as error:
        program("--temprature", "1")
    assert error.value.status == 2


def run_program(*words: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path.home() / ".cache" / "lm2_jax" / "tests_of_one_device"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    command = [sys.executable, str(ROOT / "tests" / "inference" / "program.py"), NAME, *words]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize(
    "kills", [pytest.param(4, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.long)], ids=str
)
def test_kills_while_reading_change_no_bit(tmp_path, kills):
    book = tmp_path / "book.txt"
    book.write_text(text_of(30_000))
    words = ["--read", str(book), "--every", "320", "--save-memory"]

    def finish(path: pathlib.Path) -> bytes:
        with run_program(*words, str(path)) as process:
            _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        return path.read_bytes()

    undisturbed = finish(tmp_path / "undisturbed")
    killed, contents = tmp_path / "killed", set()
    for number in range(kills):
        with run_program(*words, str(killed)) as process:
            written, before = 0, killed.stat().st_ino if killed.exists() else 0
            while process.poll() is None and written < 1 + number % 3:
                now = killed.stat().st_ino if killed.exists() else 0
                written, before = written + (now != before), now
                time.sleep(0.001)
            time.sleep(0.01 * (number % 7))
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL, "it ended before the kill"
        contents.add(killed.read_bytes())
    assert len(contents) == kills, "each start reads further"
    assert undisturbed not in contents
    assert finish(killed) == undisturbed
