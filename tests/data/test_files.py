"""Readers on damaged, hostile and odd files: one message with file and row, or the right text."""

import json
import os
import sys

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from lm2_jax.data import files
from lm2_jax.data.babi import read_samples
from lm2_jax.data.background import Books
from lm2_jax.data.philox import Draws
from lm2_jax.data.text_files import Document, cut_document, list_files, read_documents
from lm2_jax.errors import UserError

BOM = b"\xef\xbb\xbf"
STORY = "1 Mary moved to the kitchen.\n2 Where is Mary? \tkitchen\t1\n"
PROSE = "The sun was low over the hills. " * 400


def texts(path, field: str = "text") -> list[str]:
    return [document.text for document in read_documents(path, field)]


def write_table(path, column: list[str], **options) -> None:
    parquet.write_table(pyarrow.table({"text": column, "number": list(range(len(column)))}), path, **options)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", BOM + "é\r\nx".encode()),
        ("a.md", "é\r\nx".encode()),
        ("a.anything", "é\r\nx".encode()),
        ("a.jsonl", BOM + rb'{"text": "\u00e9\r\nx"}'),
        ("a.ndjson", rb'"\u00e9\r\nx"'),
        ("a.json", BOM + rb'[{"text": "\u00e9\r\nx"}]'),
        ("a.json", rb'{"text": ["\u00e9\r\nx"]}'),
        ("a.json", rb'["\u00e9\r\nx"]'),
        ("a.JSON", rb'{"text": "\u00e9\r\nx"}'),
    ],
)
def test_every_kind_of_file_named_itself(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert texts(tmp_path / name) == ["é\r\nx"]


def test_parquet_is_read_by_rows(tmp_path):
    write_table(tmp_path / "a.parquet", ["first", "second \u00e9"] * 300)
    assert texts(tmp_path / "a.parquet") == ["first", "second é"] * 300
    assert texts(tmp_path) == ["first", "second é"] * 300
    with pytest.raises(UserError, match=r"a\.parquet: no column 'body'; it has \['text', 'number'\]"):
        texts(tmp_path, "body")
    with pytest.raises(UserError, match=r"a\.parquet:1: expected text under 'number', got '0'"):
        texts(tmp_path, "number")


def test_patterns_and_homes(tmp_path, monkeypatch):
    for name in ("a/x.txt", "a/b/y.txt", "z.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(f"{tmp_path}/**/*.txt") == ["a/b/y.txt", "a/x.txt"]
    assert texts(f"{tmp_path}/?.md") == ["z.md"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("~/z.md") == ["z.md"]
    with pytest.raises(UserError, match="no file matches this pattern"):
        texts(f"{tmp_path}/*.nothing")
    (tmp_path / "[1].txt").write_text("a name like a pattern")
    assert texts(tmp_path / "[1].txt") == ["a name like a pattern"]


def test_half_surrogates_become_the_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83dz\\ude00"}\n{"text": "\\ud83d\\ude00"}\n')
    assert texts(tmp_path) == ["a\ufffdz\ufffd", "\U0001f600"]


@pytest.mark.parametrize("marked", [False, True])
def test_other_encodings_are_named_with_their_row(tmp_path, marked):
    mark = BOM if marked else b""
    (tmp_path / "latin.txt").write_bytes(mark + b"fine\n" + "caf\u00e9".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt:2: not UTF-8 text \(byte 0xe9\)"):
        texts(tmp_path)
    (tmp_path / "latin.txt").rename(tmp_path / "latin.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(mark + b'"fine"\n"caf\xe9"\n')
    with pytest.raises(UserError, match=r"latin\.jsonl:2: not UTF-8 text"):
        texts(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.txt", "qa1_x_train.txt"])
def test_wide_encodings(tmp_path, encoding, name):
    (tmp_path / name).write_bytes((STORY * 50).encode(encoding))
    with pytest.raises(UserError, match=r"expected UTF-8 text, this"):
        texts(tmp_path)
    with pytest.raises(UserError, match=r"expected UTF-8 text, this" if "qa1" in name else "expected a file named qa1"):
        read_samples(str(tmp_path), "qa1", "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"text": ' * 100_000, "nested too deep"),
        ("1" * 5000, "not JSON"),
        ('{"text": ' + "9" * 5000 + "}", "not JSON"),
        ("{", "not JSON"),
        ('{"a": 1, "b": 2}', r"text under 'text', got one with \['a', 'b'\]"),
        ("17", "expected an object with text under 'text', got a int"),
        ("NaN", "got a float"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_that_is_no_text(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}(:1|: row 1)?: .*{message}"):
        texts(tmp_path)


def test_loops_of_links_give_each_document_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("one")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "two.txt").symlink_to(tmp_path / "a" / "one.txt")
    assert texts(tmp_path) == ["one"]
    assert texts(f"{tmp_path}/**/*.txt") == ["one"]


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "folder.txt" / "inner.txt").write_text("inner")
    assert texts(tmp_path) == ["inner"]
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"pipe\.txt: expected a file, this is a pipe"):
        texts(tmp_path)
    (tmp_path / "pipe.txt").unlink()
    (tmp_path / "gone.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"gone\.txt: a link to 'nowhere', which does not exist"):
        texts(tmp_path)
    with pytest.raises(UserError, match="a link to 'nowhere'"):
        texts(tmp_path / "gone.txt")
    (tmp_path / "gone.txt").unlink()
    (tmp_path / "self.txt").symlink_to("self.txt")
    with pytest.raises(UserError, match=r"self\.txt'?: cannot be read"):
        texts(tmp_path)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "", "?" * 5000])
def test_names_that_no_file_can_have(name):
    with pytest.raises(UserError, match=r"no such file or folder|no file matches"):
        texts(name)


def test_hidden_files_are_no_texts(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "a.txt").write_text("no")
    (tmp_path / "._b.txt").write_bytes(b"\xff")
    (tmp_path / "c.txt").write_text("yes")
    assert [file.name for file in list_files(tmp_path)] == ["c.txt"]


def test_parquet_that_unpacks_to_much_more_is_refused(tmp_path, monkeypatch):
    indices = pyarrow.array([0] * 2000, pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(indices, ["x" * 1_000_000])
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "bomb.parquet", compression="zstd")
    assert (tmp_path / "bomb.parquet").stat().st_size < 1_000_000  # for 2 GB
    with pytest.raises(UserError, match=r"bomb\.parquet: unpacks to more than .* MiB"):
        texts(tmp_path)
    monkeypatch.setattr(files, "FREE_EXPANSION_BYTES", 1 << 20)
    write_table(tmp_path / "bomb.parquet", ["x" * 1_000_000 + "y", "x" * 1_000_000], compression="zstd")
    with pytest.raises(UserError, match="unpacks to more than 1 MiB"):
        texts(tmp_path)


@pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: b"", lambda content: content[::-1]])
def test_damaged_parquet(tmp_path, damage):
    write_table(tmp_path / "a.parquet", ["x" * 1000])
    (tmp_path / "a.parquet").write_bytes(damage((tmp_path / "a.parquet").read_bytes()))
    with pytest.raises(UserError, match=r"a\.parquet: not a Parquet file that can be read"):
        texts(tmp_path)


def test_bounds_of_lines_and_json_files(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_LINE_BYTES", 20)
    monkeypatch.setattr(files, "MOST_JSON_BYTES", 20)
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\n{"text": "much too long"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: a line of more than"):
        texts(tmp_path)
    (tmp_path / "a.json").write_text('{"text": "much too long"}')
    with pytest.raises(UserError, match=r"a\.json: JSON of more than"):
        texts(tmp_path / "a.json")


def test_documents_are_cut_where_text_ends():
    text = "A paragraph of some words.\n\nAnother one, a bit longer.\nA line. " + "unbroken" * 20
    for most in (1, 2, 7, 30, 60, 1000):
        parts = [part.text for part in cut_document(Document(text, "file"), most)]
        assert "".join(parts) == text
        assert max(map(len, parts)) <= most
    assert next(cut_document(Document(text, "file"), 40)).text == "A paragraph of some words.\n\n"
    assert [part.where for part in cut_document(Document("ab cd", "f"), 3)] == ["f, character 0", "f, character 3"]


def test_babi_files_with_a_mark_and_with_damage(tmp_path):
    path = tmp_path / "qa1_x_train.txt"
    path.write_bytes(BOM + STORY.encode())
    (sample,) = read_samples(str(tmp_path), "qa1", "train")
    assert (sample.facts, sample.answer) == (("Mary moved to the kitchen.",), "kitchen")
    for line in ("9" * 5000 + " x", "1 Where? \tx\t" + "9" * 5000, "\u0661 Mary", "x"):
        path.write_text(STORY + line)
        with pytest.raises(UserError, match=r"line 3 is not a line of a bAbI file"):
            read_samples(str(tmp_path), "qa1", "train")
    path.write_bytes(STORY.encode() + "3 Caf\u00e9.\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"qa1_x_train\.txt:3: not UTF-8"):
        read_samples(str(tmp_path), "qa1", "train")
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="this is a folder"):
        read_samples(str(tmp_path), "qa1", "train")
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(UserError, match="this is a pipe"):
        read_samples(str(tmp_path), "qa1", "train")


def test_books_with_marks_other_encodings_and_no_files(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "a.txt").write_bytes(BOM + PROSE.encode())
    read = Books(str(tmp_path))
    for key in range(50):
        sentences = read.sentences(Draws(key), held_out=False)
        assert not any("\ufeff" in next(sentences) for _ in range(5))
    (tmp_path / "b.txt").write_bytes(PROSE.encode() + "caf\u00e9".encode("latin-1"))
    with pytest.raises(UserError, match=r"b\.txt:1: not UTF-8"):
        Books(str(tmp_path))
    (tmp_path / "b.txt").unlink()
    (tmp_path / "b.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"b\.txt: a link to 'nowhere'"):
        Books(str(tmp_path))


def test_sources_are_configured_without_their_libraries():
    """Constructing a run imports no reader and no tokenizer library."""
    import subprocess

    code = (
        "import sys\n"
        "from lm2_jax.data import babilong_source, convert, mixed, pipeline, shards, text_source, tokenizers\n"
        "text_source.TextFiles(path='x'); shards.TokenShards(path='x'); tokenizers.TokenizerConfig()\n"
        "heavy = {'grain', 'tokenizers', 'sentencepiece', 'array_record', 'pyarrow', 'tensorflow_datasets'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_text_that_is_read_is_the_text_of_the_file(tmp_path):
    """A random text survives every container."""
    letters = np.array(list('ab \n\t"\\é日\U0001f600\u2028\x0b'))
    text = "".join(np.random.default_rng(0).choice(letters, 500))
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}) + "\n")
    write_table(tmp_path / "c.parquet", [text])
    assert texts(tmp_path) == [text] * 3
