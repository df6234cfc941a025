"""Places to write to are tried before the work."""

import os

import pytest

from lm2_jax.errors import UserError
from lm2_jax.folders import check_file, check_folder, open_path, prepare_file, prepare_folder


def test_folder(tmp_path):
    folder = prepare_folder(tmp_path / "new" / "eval")
    assert list(folder.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--out=.*file/eval.*cannot write there") as caught:
        prepare_folder(tmp_path / "file" / "eval", "--out")
    assert caught.value.status == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write there"):
        prepare_folder(tmp_path / "eval")


def test_a_check_makes_nothing(tmp_path):
    assert check_folder(tmp_path / "new" / "eval", "--out") == tmp_path / "new" / "eval"
    assert check_file(tmp_path / "new" / "costs.json", "--json") == tmp_path / "new" / "costs.json"
    assert not list(tmp_path.iterdir())


def test_file(tmp_path):
    assert prepare_file(tmp_path / "new" / "costs.json", "--json").parent.is_dir()
    assert not (tmp_path / "new" / "costs.json").exists()
    (tmp_path / "file").write_text("old")
    assert prepare_file(tmp_path / "file", "--json").read_text() == "old"
    assert prepare_file("/dev/null", "--json")
    with pytest.raises(UserError, match="expected a file, this is a folder"):
        prepare_file(tmp_path, "--json")
    with pytest.raises(UserError, match=r"the folder of --json=.*cannot write there"):
        prepare_file(tmp_path / "file" / "costs.json", "--json")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "expected the path of a folder"),
        (" ", "expected the path of a folder"),
        ("a\0b", "expected the path of a folder"),
        ("ftp://host/run", r"unknown kind of bucket 'ftp://'; known: gs://, s3://, az://, hf://"),
        ("gs://bucket/run", "the library for gs:// is not installed: .*gcsfs"),
        ("s3://bucket/run", "the library for s3:// is not installed: .*s3fs"),
    ],
)
def test_paths_that_cannot_be_reached_are_one_message(path, message, monkeypatch):
    def absent(name, **options):
        raise ImportError(f"Please install {name}fs" if name == "s3" else "Please install gcsfs")

    monkeypatch.setattr("fsspec.filesystem", absent)
    with pytest.raises(UserError, match=rf"--workdir=.*{message}"):
        open_path(path, "--workdir")


def test_a_bucket_without_rights_is_one_message(monkeypatch):
    def denied(name, **options):
        raise RuntimeError("403 Forbidden\nlong explanation")

    monkeypatch.setattr("fsspec.filesystem", denied)
    with pytest.raises(UserError, match=r"--workdir='gs://bucket/run': cannot be reached: 403 Forbidden$") as caught:
        open_path("gs://bucket/run", "--workdir")
    assert caught.value.status == 1
