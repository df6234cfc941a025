import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lm2_jax
from lm2_jax import UserError, memory_file
from tests.inference.subjects import text_of, tiny_run

NAME = "lm2_tiny"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "book.memory"
    tiny_run(NAME).read(text_of(75)).save(path)
    return path


def change_metadata(path, out, **changes):
    """The file with fields of its metadata changed; the value None deletes one."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    metadata = json.loads(header["__metadata__"][memory_file.METADATA]) | changes
    metadata = {name: value for name, value in metadata.items() if value is not None}
    header["__metadata__"][memory_file.METADATA] = json.dumps(metadata)
    new = json.dumps(header).encode()
    out.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + size :])
    return out


def test_the_file_says_what_was_read(saved):
    metadata = memory_file.read_memory_file(saved).metadata
    assert (metadata["format"], metadata["preset"], metadata["step"]) == (1, NAME, 7)
    assert (metadata["tokens_read"], metadata["position"], metadata["segment_tokens"]) == (75, 11, 32)
    (source,) = metadata["sources"]
    assert source["tokens"] == 75
    assert source["is_complete"]
    assert len(source["sha256"]) == 64
    arrays = safetensors.numpy.load(saved.read_bytes())
    assert arrays["open_tokens"].shape == (11,)


def test_equal_memories_are_equal_files(saved, tmp_path):
    again = tmp_path / "again"
    tiny_run(NAME).read([text_of(75)[:13], text_of(75)[13:]]).save(again)
    assert again.read_bytes() == saved.read_bytes()
    lm2_jax.load_memory(saved, tiny_run(NAME)).save(again)
    assert again.read_bytes() == saved.read_bytes()


def test_a_memory_in_bfloat16_comes_back(tmp_path):
    run = tiny_run(NAME)
    memory = run.read(text_of(40))
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, memory.state)
    content = memory_file.encode(dataclasses.replace(memory, state=low))
    path = tmp_path / "low"
    path.write_bytes(content)
    file = memory_file.read_memory_file(path)
    for array, leaf in zip(file.states.values(), jax.tree.leaves(low), strict=False):
        assert array.dtype == jnp.bfloat16
        assert array.tobytes() == np.asarray(leaf).tobytes()
    with pytest.raises(UserError, match="shape and type"):
        lm2_jax.load_memory(path, run)


@pytest.mark.parametrize(
    ("make", "message", "status"),
    [
        (lambda saved, out: out.write_bytes(b""), "the file is empty", 1),
        (lambda saved, out: out.write_text("Once upon a time there was a key. " * 9), "no safetensors file", 1),
        (lambda saved, out: out.write_bytes(os.urandom(5000)), "no safetensors file", 1),
        (lambda saved, out: out.write_bytes(saved.read_bytes()[:-100]), "truncated", 1),
        (lambda saved, out: out.write_bytes(saved.read_bytes()[:50]), "truncated", 1),
        (lambda saved, out: out.write_bytes(saved.read_bytes()[:-1] + b"\x07"), "changed or damaged", 1),
        (lambda saved, out: safetensors.numpy.save_file({"w": np.zeros(3)}, out), "of something else", 1),
        (lambda saved, out: change_metadata(saved, out, format=2), "has format 2, and this version reads format 1", 1),
        (lambda saved, out: change_metadata(saved, out, sources=[{"a": 1}]), "metadata are damaged", 1),
        (lambda saved, out: change_metadata(saved, out, position=5), "metadata are damaged", 1),
        (lambda saved, out: change_metadata(saved, out, model=None), "metadata are damaged", 1),
        (lambda saved, out: change_metadata(saved, out, model="0" * 32), "made by another model", 1),
        (lambda saved, out: change_metadata(saved, out, tokenizer="0" * 16), "made with the tokenizer", 1),
        (lambda saved, out: out.mkdir(), "this is a folder", 2),
        (lambda saved, out: None, "no such file", 2),
    ],
)
def test_another_or_damaged_file_is_refused_with_one_message(saved, tmp_path, make, message, status):
    path = tmp_path / "bad"
    make(saved, path)
    with pytest.raises(UserError, match=message) as error:
        lm2_jax.load_memory(path, tiny_run(NAME))
    assert error.value.status == status
    assert str(path) in str(error.value)


def test_the_memory_of_other_parameters_is_refused(saved):
    with pytest.raises(UserError, match="made by another model"):
        lm2_jax.load_memory(saved, tiny_run(NAME, seed=1))


def test_an_unwritable_place_is_refused(tmp_path, saved):
    memory = lm2_jax.load_memory(saved, tiny_run(NAME))
    with pytest.raises(UserError, match="folder"):
        memory.save(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"):
        memory.save(tmp_path / "file" / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_inspect_diff_and_export(saved, tmp_path, capsys):
    memory_file.main(["inspect", str(saved)])
    shown = capsys.readouterr().out
    assert "75 tokens read: 2 segments of 32 and 11 tokens of the next" in shown
    assert "groups/0/memory/slots [layer 1]" in shown
    assert "of 6" in shown

    memory_file.main(["diff", str(saved), str(saved)])
    assert "equal bit for bit" in capsys.readouterr().out
    other = tmp_path / "other"
    tiny_run(NAME).read(text_of(64)).save(other)
    memory_file.main(["diff", str(saved), str(other)])
    shown = capsys.readouterr().out
    assert "tokens_read: 75 and 64" in shown
    assert "slots" not in shown, "the same two segments"
    tiny_run(NAME).read("x" * 64).save(other)
    memory_file.main(["diff", str(saved), str(other)])
    assert "slots [layer 0]: norms" in capsys.readouterr().out

    memory_file.main(["export", str(saved), "--out", str(tmp_path / "m.npz")])
    with np.load(tmp_path / "m.npz", allow_pickle=False) as arrays:
        assert json.loads(str(arrays["metadata"]))["tokens_read"] == 75
        assert arrays["state/groups/0/memory/slots"].shape == (2, 1, 6, 32)


def test_merging_is_refused_and_says_what_to_do(saved):
    run = tiny_run(NAME)
    memory = lm2_jax.load_memory(saved, run)
    with pytest.raises(UserError, match="--read SECOND_TEXT"):
        memory_file.merge(run, [memory, memory])


def test_effective_rank():
    assert memory_file.effective_rank(np.eye(5)) == pytest.approx(5)
    assert memory_file.effective_rank(np.ones((4, 3))) == pytest.approx(1)
    assert memory_file.effective_rank(np.zeros((4, 3))) == 0
