"""A run that `--overwrite` replaces is lost at no moment: kills, errors and signals at every file system call."""

import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from etils import epath

from lm2_jax.errors import UserError
from lm2_jax.training import workdir as workdirs
from lm2_jax.training.lock import WorkdirLock
from lm2_jax.training.replace import holds_run, replacement
from lm2_jax.training.workdir import ASIDE, MOVING, REMOVING
from tests.e2e.tiny_run import tiny_config, train, write_documents

CALLS = ("mkdir", "rename", "replace", "rmdir", "unlink", "remove")
HIDDEN = (ASIDE, MOVING, REMOVING)


class Lock(WorkdirLock):
    """A lock without a file, so that a process that only seems to die leaves none."""

    def __init__(self, mine: bool = True):
        self._mine = mine

    def owns(self) -> bool:
        return self._mine


class Died(BaseException):
    """The process is killed here."""


def write(folder, name: str) -> None:
    """A run with one checkpoint."""
    if not folder.exists():
        folder.mkdir()
    (folder / "config.json").write_text(f"config of {name}")
    (folder / "tokenizer.json").write_text(f"tokenizer of {name}")
    (folder / "metrics.jsonl").write_text(f"metrics of {name}")
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / f"{name}.tfevents").write_text(name)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
    (folder / "checkpoints" / "4.orbax-checkpoint-tmp" / "params").write_text(f"weights of {name}")
    os.rename(folder / "checkpoints" / "4.orbax-checkpoint-tmp", folder / "checkpoints" / "4")


def contents(folder) -> dict[str, str]:
    """All files by path."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "run.lock"
    }


def expected(folder, name: str) -> dict[str, str]:
    write(folder, name)
    return contents(folder)


def call(workdir, overwrite: bool, name: str = "new", lock=None) -> None:
    """What a start does with files: it replaces the run, or resumes."""
    with replacement(epath.Path(workdir), lock or Lock(), overwrite):
        if overwrite:
            write(workdir, name)


def at_call(monkeypatch, number: int, act, once: bool) -> None:
    """Acts in the place of a file system call, and of all after it unless `once`."""
    count = iter(range(10_000))

    def wrap(function):
        def wrapped(*args, **kwargs):
            n = next(count)
            if n == number or (n > number and not once):
                act()
            return function(*args, **kwargs)

        return wrapped

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))


def die(*_: object) -> None:
    raise Died


def killed_at(workdir, number: int, monkeypatch, overwrite: bool) -> bool:
    """A start that is killed at a file system call; whether it came that far."""
    with monkeypatch.context() as patch:
        at_call(patch, number, die, once=False)
        try:
            call(workdir, overwrite)
        except Died:
            return True
    return False


def refuse() -> None:
    raise OSError(28, "No space left on device")


def check(workdir, old: dict[str, str], new: dict[str, str]) -> None:
    """One of the two runs is there completely; the old one if the new one has no checkpoint."""
    there = contents(workdir)
    assert not [name for name in HIDDEN if (workdir / name).exists()], "nothing is left over"
    assert there in (old, new)


def check_nothing_is_lost(workdir, old: dict[str, str], new: dict[str, str]) -> None:
    """Right after a kill: every file of the old run is somewhere, or the new run has a checkpoint."""
    there = set(contents(workdir).values())
    assert set(old.values()) <= there or new["checkpoints/4/params"] in there


@pytest.fixture
def runs(tmp_path):
    """A workdir with an old run, and what the old and a new one consist of."""
    workdir = tmp_path / "w"
    old, new = expected(workdir, "old"), expected(tmp_path / "new", "new")
    return workdir, old, new


def calls_of(workdir, monkeypatch) -> int:
    """Number of file system calls of a replacement from start to end, in a copy."""
    shutil.copytree(workdir, workdir.parent / "copy")
    made = []
    with monkeypatch.context() as patch:
        for name in CALLS:
            function = getattr(os, name)
            patch.setattr(
                os, name, lambda *args, function=function, **kwargs: (made.append(0), function(*args, **kwargs))[1]
            )
        call(workdir.parent / "copy", overwrite=True)
    shutil.rmtree(workdir.parent / "copy")
    return len(made)


def test_a_kill_at_any_call_loses_nothing(runs, monkeypatch):
    """Nor does a second kill in the start that follows."""
    workdir, old, new = runs
    seen = []
    for first in range(calls_of(workdir, monkeypatch)):
        for second in range(30):
            shutil.rmtree(workdir)
            write(workdir, "old")
            assert killed_at(workdir, first, monkeypatch, overwrite=True)
            check_nothing_is_lost(workdir, old, new)
            killed_again = killed_at(workdir, second, monkeypatch, overwrite=False)
            check_nothing_is_lost(workdir, old, new)
            call(workdir, overwrite=False)
            check(workdir, old, new)
            seen.append(contents(workdir) == new)
            if not killed_again:
                break
    assert any(seen)
    assert not all(seen)


def test_a_second_overwrite_after_a_kill_loses_nothing(runs, monkeypatch):
    """The oldest run is kept until another has a checkpoint."""
    workdir, old, new = runs
    for first in range(calls_of(workdir, monkeypatch)):
        shutil.rmtree(workdir)
        write(workdir, "old")
        assert killed_at(workdir, first, monkeypatch, overwrite=True)
        for second in range(0, 40, 2):
            killed_at(workdir, second, monkeypatch, overwrite=True)
            check_nothing_is_lost(workdir, old, new)
        check_nothing_is_lost(workdir, old, new)
        call(workdir, overwrite=False)
        check(workdir, old, new)


def test_an_error_at_any_call_loses_nothing(runs, monkeypatch):
    """As on a full disk: the program goes on to its handlers."""
    workdir, old, new = runs
    for number in range(calls_of(workdir, monkeypatch)):
        shutil.rmtree(workdir)
        write(workdir, "old")
        with monkeypatch.context() as patch:
            at_call(patch, number, refuse, once=True)
            with pytest.raises((UserError, OSError)):
                call(workdir, overwrite=True)
        check_nothing_is_lost(workdir, old, new)
        call(workdir, overwrite=False)
        check(workdir, old, new)


DRIVER = """
import os, pathlib, shutil, signal, sys
from etils import epath
from lm2_jax.training.lock import WorkdirLock
from tests.training.test_replace import CALLS, call, check, check_nothing_is_lost, contents, expected, write

base = pathlib.Path(sys.argv[1])
old, new, workdir = expected(base / "old", "old"), expected(base / "new", "new"), base / "w"
number, killed = 0, True
while killed:
    shutil.rmtree(workdir, ignore_errors=True)
    write(workdir, "old")
    child = os.fork()
    if not child:
        count = iter(range(10_000))
        for name in CALLS:
            def wrapped(*args, function=getattr(os, name), **kwargs):
                if next(count) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            setattr(os, name, wrapped)
        with WorkdirLock(epath.Path(workdir)) as lock:
            call(workdir, overwrite=True, lock=lock)
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    check_nothing_is_lost(workdir, old, new)
    with WorkdirLock(epath.Path(workdir)) as lock:
        call(workdir, overwrite=False, lock=lock)
    check(workdir, old, new)
    number += 1
print(number)
"""


def test_a_real_kill_at_any_call_loses_nothing(tmp_path):
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", DRIVER, str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_the_old_run_is_kept_until_the_new_one_has_ended(runs):
    workdir, old, new = runs
    with replacement(epath.Path(workdir), Lock(), True):
        assert [path.name for path in workdir.iterdir()] == [ASIDE]
        assert contents(workdir / ASIDE) == old
        assert holds_run(epath.Path(workdir))
        write(workdir, "new")
        assert contents(workdir / ASIDE) == old
    assert contents(workdir) == new


def fail(workdir, saves: bool) -> None:
    with replacement(epath.Path(workdir), Lock(), True):
        if saves:
            write(workdir, "new")
        (workdir / "config.json").write_text("config of new")
        raise UserError("no data")


def test_the_old_run_comes_back_where_the_new_one_fails(runs, capsys):
    workdir, old, _ = runs
    with pytest.raises(UserError, match="no data"):
        fail(workdir, saves=False)
    assert contents(workdir) == old
    assert f"{workdir}: the run that --overwrite was replacing is back" in capsys.readouterr().err


def test_after_an_error_the_old_run_is_kept_and_the_message_says_how_to_go_back(runs, capsys):
    workdir, old, new = runs
    with pytest.raises(UserError, match="no data"):
        fail(workdir, saves=True)
    message = capsys.readouterr().err
    assert f"is still in {workdir / ASIDE}" in message
    assert "delete the other files and move its files up" in message
    for path in workdir.iterdir():
        if path.name != ASIDE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (workdir / ASIDE).iterdir():
        path.rename(workdir / path.name)
    (workdir / ASIDE).rmdir()
    assert contents(workdir) == old
    fail_again = shutil.copytree(workdir, workdir.parent / "again")
    with pytest.raises(UserError, match="no data"):
        fail(fail_again, saves=True)
    call(fail_again, overwrite=False)  # a later call that ends well
    assert contents(fail_again) == new


def test_nothing_is_touched_where_another_process_has_taken_over(runs):
    workdir, old, new = runs

    def taken_over() -> None:
        with replacement(epath.Path(workdir), Lock(mine=False), True):
            write(workdir, "new")
            shutil.rmtree(workdir / "checkpoints")
            raise UserError("another process")

    with pytest.raises(UserError, match="another process"):
        taken_over()
    assert (workdir / "config.json").read_text() == new["config.json"]
    assert contents(workdir / ASIDE) == old


def test_without_overwrite_nothing_moves(runs):
    workdir, old, _ = runs
    call(workdir, overwrite=False)
    assert contents(workdir) == old


def test_two_runs_in_one_place_are_not_mixed(runs):
    workdir = runs[0]
    write(workdir / MOVING, "new")
    before = contents(workdir)
    with pytest.raises(UserError, match=re.escape(f"{workdir / MOVING} holds files")) as caught:
        call(workdir, overwrite=False)
    assert caught.value.status == 1
    assert contents(workdir) == before


def test_a_hidden_run_is_named_where_none_is_found(runs):
    workdir, _, _ = runs
    os.makedirs(workdir.parent / "v")
    workdir.rename(workdir.parent / "v" / ASIDE)
    with pytest.raises(UserError, match=rf"no run there.*{re.escape(ASIDE)} has a run that --overwrite was replacing"):
        workdirs.read_config(workdir.parent / "v")


def test_one_lock_from_the_replacement_to_the_end(tmp_path, monkeypatch):
    """No other process can take the workdir between the two, and a failing start changes nothing."""
    documents = write_documents(tmp_path / "documents")
    workdir = tmp_path / "w"
    write(workdir, "old")
    old = contents(workdir)
    locks = []
    acquire = WorkdirLock.__init__

    def counted(self, place):
        assert contents(workdir) == old, "it is locked before anything moves"
        locks.append(self)
        acquire(self, place)

    def locked(*_):
        assert (workdir / ASIDE).exists()
        with pytest.raises(UserError, match="in use by process"):
            acquire(WorkdirLock.__new__(WorkdirLock), epath.Path(workdir))
        raise UserError("far enough")

    monkeypatch.setattr(WorkdirLock, "__init__", counted)
    monkeypatch.setattr(workdirs, "check_space", locked)
    with pytest.raises(UserError, match="far enough"):
        train(dataclasses.replace(tiny_config(documents)), workdir, overwrite=True)
    assert len(locks) == 1
    assert contents(workdir) == old
