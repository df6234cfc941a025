"""One run at a time writes to a workdir."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from lm2_jax.errors import UserError
from lm2_jax.training import lock
from lm2_jax.training.lock import WorkdirLock

HOLD = """
import sys, time
from etils import epath
from lm2_jax.training.lock import WorkdirLock
with WorkdirLock(epath.Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that owns the workdir."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def owner_of(workdir):
    return json.loads((workdir / lock.FILE).read_text())


def test_a_second_process_is_refused_and_a_killed_owner_is_followed(tmp_path, other):
    before = (tmp_path / lock.FILE).read_bytes()
    with pytest.raises(
        UserError, match=rf"in use by process {other.pid} of .* on host .*Nothing was changed"
    ) as caught:
        WorkdirLock(epath.Path(tmp_path))
    assert caught.value.status == 1
    assert (tmp_path / lock.FILE).read_bytes() == before
    other.send_signal(signal.SIGKILL)
    other.wait()
    with WorkdirLock(epath.Path(tmp_path)):
        assert owner_of(tmp_path)["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("age", [0, 1000])
def test_an_owner_on_another_host_is_judged_by_its_last_sign_of_life(tmp_path, age):
    owner = {"user": "u", "host": "elsewhere", "boot": "another", "pid": 1, "token": "t", "time": time.time() - age}
    (tmp_path / lock.FILE).write_text(json.dumps(owner))
    if age == 0:
        with pytest.raises(UserError, match="on host elsewhere"):
            WorkdirLock(epath.Path(tmp_path))
        assert owner_of(tmp_path) == owner
    else:
        with WorkdirLock(epath.Path(tmp_path)):
            assert owner_of(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"time": "x"}'])
def test_a_damaged_lock_file_of_nobody_is_replaced(tmp_path, content):
    (tmp_path / lock.FILE).write_text(content)
    with WorkdirLock(epath.Path(tmp_path)):
        assert owner_of(tmp_path)["pid"] == os.getpid()


def test_it_gives_signs_of_life_and_notices_that_it_was_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    with WorkdirLock(epath.Path(tmp_path)) as mine:
        first = owner_of(tmp_path)["time"]
        deadline = time.monotonic() + 10
        while owner_of(tmp_path)["time"] == first:
            assert time.monotonic() < deadline
        mine.check()
        (tmp_path / lock.FILE).write_text(json.dumps({"token": "theirs", "time": time.time()}))
        while not mine.lost and time.monotonic() < deadline:
            (tmp_path / lock.FILE).write_text(json.dumps({"token": "theirs", "time": time.time()}))
            time.sleep(0.01)
        with pytest.raises(UserError, match="another process has taken this run over"):
            mine.check()
    assert owner_of(tmp_path)["token"] == "theirs", "a lock that was lost is not removed"


def test_signs_of_life_that_fail_are_reported_once_and_tried_again(tmp_path, monkeypatch, capsys):
    tried: list[float] = []
    write = WorkdirLock._write

    def failing(self):
        tried.append(time.monotonic())
        if 2 <= len(tried) <= 4 or 6 <= len(tried) <= 7:
            raise ConnectionError("no network")
        write(self)

    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(WorkdirLock, "_write", failing)
    with WorkdirLock(epath.Path(tmp_path)) as mine:
        deadline = time.monotonic() + 10
        while len(tried) < 9:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        mine.check()
    warning = "run.lock: the sign of life was not written: ConnectionError: no network. It is tried again every 0.01"
    assert capsys.readouterr().err.count(warning) == 2


def test_a_lock_file_never_follows_a_link(tmp_path):
    (tmp_path / "stranger").write_text("precious")
    (tmp_path / "workdir").mkdir()
    (tmp_path / "workdir" / lock.FILE).symlink_to(tmp_path / "stranger")
    with pytest.raises(UserError, match="cannot be written"):
        WorkdirLock(epath.Path(tmp_path / "workdir"))
    assert (tmp_path / "stranger").read_text() == "precious"


def no_kernel_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


def test_without_locks_of_the_kernel_a_living_process_is_seen(tmp_path, other, monkeypatch):
    monkeypatch.setattr(lock.fcntl, "flock", no_kernel_locks)
    with pytest.raises(UserError, match=f"in use by process {other.pid}"):
        WorkdirLock(epath.Path(tmp_path))
    other.kill()
    other.wait()
    with WorkdirLock(epath.Path(tmp_path)):
        assert owner_of(tmp_path)["pid"] == os.getpid()


def test_an_owner_that_leaves_at_this_moment_is_followed(tmp_path, other, monkeypatch):
    """It removes the file after we have opened it."""
    calls = []

    def flock(descriptor, how):
        if not calls:
            (tmp_path / lock.FILE).unlink()
        calls.append(descriptor)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with WorkdirLock(epath.Path(tmp_path)):
        assert owner_of(tmp_path)["pid"] == os.getpid()
    assert len(calls) == 2


ELSEWHERE = {"user": "u", "host": "elsewhere", "boot": "another", "pid": 1, "token": "t"}


@pytest.mark.parametrize("before", ["", json.dumps(ELSEWHERE | {"time": 0.0})], ids=["new", "dead"])
def test_a_host_that_starts_at_the_same_moment_is_seen(tmp_path, monkeypatch, before):
    """The file is there and names nobody, or a dead owner; the other host writes its name a moment later."""
    (tmp_path / lock.FILE).write_text(before)
    alive = json.dumps(ELSEWHERE | {"token": "theirs", "time": time.time()})
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: (tmp_path / lock.FILE).write_text(alive))
    with pytest.raises(UserError, match="in use by process 1 of u on host elsewhere"):
        WorkdirLock(epath.Path(tmp_path))
    assert (tmp_path / lock.FILE).read_text() == alive
    monkeypatch.undo()
    (tmp_path / lock.FILE).unlink()
    with WorkdirLock(epath.Path(tmp_path)):
        assert owner_of(tmp_path)["pid"] == os.getpid()


def test_no_reader_sees_half_an_owner(tmp_path, monkeypatch):
    """The file always has one length, and is written by one call."""
    written = []
    write = os.pwrite
    monkeypatch.setattr(lock.os, "pwrite", lambda *words: written.append(len(words[1])) or write(*words))
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    (tmp_path / lock.FILE).write_text("x" * 2000)
    with WorkdirLock(epath.Path(tmp_path)):
        deadline = time.monotonic() + 10
        while len(written) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert (tmp_path / lock.FILE).stat().st_size == lock.FILE_BYTES
    assert set(written) == {lock.FILE_BYTES}


def test_a_lost_lock_is_noticed_when_it_matters(tmp_path):
    """Not only at the next sign of life."""
    with WorkdirLock(epath.Path(tmp_path)) as mine:
        (tmp_path / lock.FILE).write_text(json.dumps(ELSEWHERE | {"time": time.time()}))
        with pytest.raises(UserError, match="another process has taken this run over"):
            mine.check()
    assert owner_of(tmp_path)["host"] == "elsewhere"


@pytest.fixture
def bucket(monkeypatch):
    """A bucket in memory: the file system of gs:// without a cloud."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: MemoryFileSystem())
    MemoryFileSystem.store.clear()
    cached = epath.backend._FileSystemSpecBackend._get_filesystem  # etils keeps a file system per scheme
    cached.cache_clear()
    yield epath.Path("gs://bucket/run")
    cached.cache_clear()


def test_a_bucket_is_locked_by_a_file(bucket, monkeypatch):
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)
    with WorkdirLock(bucket):
        owner = json.loads((bucket / lock.FILE).read_text())
        assert owner["pid"] == os.getpid()
        alive = owner | {"boot": "another", "token": "theirs"}
    assert not (bucket / lock.FILE).exists()
    (bucket / lock.FILE).write_text(json.dumps(alive))
    with pytest.raises(UserError, match="in use by process"):
        WorkdirLock(bucket)
    (bucket / lock.FILE).write_text(json.dumps(alive | {"time": time.time() - 1000}))
    with WorkdirLock(bucket):
        assert json.loads((bucket / lock.FILE).read_text())["token"] != "theirs"
