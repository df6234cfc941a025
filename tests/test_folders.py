"""Places to write to are tried before the work."""

import os

import pytest

from lm2_jax.errors import UserError
from lm2_jax.folders import prepare_file, prepare_folder


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
