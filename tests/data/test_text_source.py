"""Text from folders and from tensorflow-datasets."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lm2_jax.data import convert
from lm2_jax.data.shards import ShardDocuments
from lm2_jax.data.text_files import read_documents
from lm2_jax.data.text_source import TextFiles, TfdsText
from lm2_jax.data.tokenizers import TokenizerConfig, build_tokenizer
from lm2_jax.errors import UserError

BYTES = build_tokenizer(TokenizerConfig(kind="bytes"), lambda: [], 259)
STORIES = [f"Story {i}. " + "Éva went on. " * (i % 3) for i in range(24)]


class Stories(tfds.core.GeneratorBasedBuilder):
    """A set as a user of TFDS would write it."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "number": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, text in enumerate(STORIES):
            yield i, {"text": text, "number": i}


@pytest.fixture(scope="module")
def stories_dir(tmp_path_factory):
    """A prepared set in the ArrayRecord format; written and read without TensorFlow."""
    folder = str(tmp_path_factory.mktemp("tfds"))
    Stories(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def everything(source, rows: int = 2) -> str:
    """All text of an epoch and more, end to end."""
    examples = [source.example(step, row, rows, 4) for step in range(8) for row in range(rows)]
    return "".join(BYTES.decode(example.tokens.tolist()) for example in examples)


def test_tfds_is_read_as_documents(stories_dir):
    source = TfdsText(name="stories", data_dir=stories_dir, held_out_fraction=0.0).build(BYTES, 64, 0)
    text = everything(source)
    assert all(story in text for story in STORIES)


def test_tfds_splits_and_corpus(stories_dir):
    half = TfdsText(name="stories", data_dir=stories_dir, split="train[:50%]", held_out_fraction=0.0)
    assert len(half.corpus(0)) == 12
    whole = TfdsText(name="stories", data_dir=stories_dir)
    assert sorted(whole.corpus(0)) == sorted(STORIES)
    assert whole.corpus(0) == whole.corpus(0) != whole.corpus(1)


def test_tfds_becomes_shards(stories_dir, tmp_path):
    conversion = convert.Conversion(
        out=str(tmp_path / "out"), tfds="stories", data_dir=stories_dir, tokenizer=TokenizerConfig(kind="bytes")
    )
    assert convert.convert(conversion)["documents"] == 24
    documents = ShardDocuments(tmp_path / "out", BYTES.eos_id, BYTES.pad_id)
    assert sorted(BYTES.decode(documents.tokens(i).tolist()) for i in range(24)) == sorted(STORIES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "nothing"}, "TFDS 'nothing'.*not found.*tfds build nothing --file_format=array_record"),
        ({"split": "nosplit"}, "Unknown split 'nosplit'"),
        ({"data_dir": "/nowhere"}, "data_dir '/nowhere'"),
        ({"field": "body"}, r"no feature 'body'; it has \['number', 'text'\]"),
    ],
)
def test_wrong_tfds_settings_are_one_message(stories_dir, change, message):
    with pytest.raises(UserError, match=message):
        TfdsText(**({"name": "stories", "data_dir": stories_dir} | change)).build(BYTES, 64, 0)


def test_files_come_in_order_to_any_depth(tmp_path):
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "c.txt").write_text("third é")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "second", "more": 1}\n')
    (tmp_path / "b.md").write_text("note")
    (tmp_path / "ignored.csv").write_text("no")
    (tmp_path / "manifest.json").write_text('[{"title": "no text"}]')
    assert [document.text for document in read_documents(tmp_path, "text")] == ["first", "second", "note", "third é"]
    source = TextFiles(path=str(tmp_path), held_out_fraction=0.0).build(BYTES, 8, 0)
    text = everything(source)
    assert all(document in text for document in ("first", "second", "third é"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"bad\.jsonl:2: not JSON"),
        ('{"body": "x"}', r"bad\.jsonl:2: expected an object with text under 'text'"),
        ('{"text": 5}', r"bad\.jsonl:2: expected an object"),
        ('["text"]', r"bad\.jsonl:2: expected an object"),
    ],
)
def test_bad_lines_are_named_with_their_number(tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(UserError, match=message):
        TextFiles(path=str(tmp_path)).build(BYTES, 8, 0)


def test_missing_empty_and_binary_folders(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        TextFiles(path=str(tmp_path / "nowhere")).build(BYTES, 8, 0)
    with pytest.raises(UserError, match="no texts in this folder"):
        TextFiles(path=str(tmp_path)).corpus(0)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt:1: not UTF-8"):
        TextFiles(path=str(tmp_path)).build(BYTES, 8, 0)


def test_too_much_text_names_the_converter(tmp_path):
    (tmp_path / "big.txt").write_text("x" * 1_000_001)
    with pytest.raises(UserError, match=r"limit_megabytes=1 .*lm2_jax\.data\.convert --out OUT --text"):
        TextFiles(path=str(tmp_path), limit_megabytes=1).build(BYTES, 8, 0)


def test_the_corpus_is_a_few_megabytes_from_all_files(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 3_000_000)
    texts = TextFiles(path=str(tmp_path)).corpus(0)
    assert {text[0] for text in texts} == {"a", "b", "c"}
    assert 3_500_000 < sum(map(len, texts)) < 4_500_000


def test_the_converter_runs_as_a_module(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text("\n".join(json.dumps({"text": story}) for story in STORIES))
    command = [sys.executable, "-m", "lm2_jax.data.convert", "--out", str(tmp_path / "out")]
    command += ["--text", str(tmp_path / "text"), "--tokenizer.kind", "bytes"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "24 documents" in done.stdout


def test_real_books(data_dir, tmp_path):
    for name in ("howards_end.txt", "pride_and_prejudice.txt"):
        (tmp_path / name).write_bytes((data_dir / "books" / name).read_bytes())
    source = TextFiles(path=str(tmp_path), packing="ordered", document_segments=64)
    row = source.build(BYTES, 128, 0).example(step=3, row=5, rows=8, segments=4)
    assert row.valid.all()
    assert " the " in BYTES.decode(row.tokens.tolist())
