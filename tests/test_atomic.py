"""Files are replaced completely or not at all."""

import os
import resource
import signal

import pytest

from lm2_jax import atomic
from lm2_jax.atomic import is_remote, remove_temporaries, write_file, write_files


def test_content_is_replaced_and_an_equal_file_is_not_touched(tmp_path):
    file = tmp_path / "a.json"
    assert write_file(file, "one\n")
    inode = file.stat().st_ino
    assert not write_file(file, b"one\n")
    assert file.stat().st_ino == inode, "an equal file was written again"
    assert write_file(file, "two\n")
    assert file.read_text() == "two\n"
    assert os.listdir(tmp_path) == ["a.json"], "a temporary file was left"


def test_a_disk_that_is_full_leaves_the_old_content(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    file.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_files({tmp_path / "b.json": "new", file: "x" * 5000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"], "nothing is renamed before all is written"


def test_links_are_replaced_and_never_followed(tmp_path, monkeypatch):
    stranger = tmp_path / "stranger"
    stranger.write_text("precious")
    link = tmp_path / "a.json"
    link.symlink_to(stranger)
    write_file(link, "new")
    assert not link.is_symlink()
    assert link.read_text() == "new"
    monkeypatch.setattr(atomic.uuid, "uuid4", lambda: type("Guessed", (), {"hex": "guessed"}))
    (tmp_path / f"{atomic.TEMPORARY}guessed").symlink_to(stranger)
    with pytest.raises(FileExistsError):
        write_file(link, "newer")
    assert stranger.read_text() == "precious"


def test_devices_and_long_names_can_be_written(tmp_path):
    write_file("/dev/null", "gone")
    write_file(tmp_path / ("a" * 255), "x")
    assert (tmp_path / ("a" * 255)).read_text() == "x"


def test_temporaries_of_killed_writers_are_removed(tmp_path):
    (tmp_path / f"{atomic.TEMPORARY}0123").write_text("half")
    (tmp_path / "mine").write_text("x")
    remove_temporaries(tmp_path)
    assert os.listdir(tmp_path) == ["mine"]


def test_what_a_bucket_is():
    assert is_remote("gs://bucket/run")
    assert is_remote("unknown+x://bucket")
    assert not is_remote("runs/a://b")
    assert not is_remote("/runs/c:/d")
