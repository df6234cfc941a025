"""Token shards: written, read back, and refused when they are not what they should be."""

import io
import json
import sys
import zipfile

import numpy as np
import pytest

from lm2_jax import cli
from lm2_jax.data import convert
from lm2_jax.data.shards import ShardDocuments, TokenShards, decode_record, encode_record, write_shards
from lm2_jax.data.text_source import TextFiles
from lm2_jax.data.tokenizers import FileTokenizer, TokenizerConfig, build_tokenizer
from lm2_jax.errors import UserError

BYTES = build_tokenizer(TokenizerConfig(kind="bytes"), lambda: [], 259)
TEXTS = [f"Document {i}: " + "word " * (i % 7) for i in range(30)]


@pytest.fixture
def shard_set(tmp_path):
    """Thirty documents in several files."""
    folder = tmp_path / "set"
    write_shards((BYTES.encode(text) for text in TEXTS), BYTES, folder, tokens_per_shard=200)
    return folder


def edit_metadata(folder, **changes):
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read_all(folder, count: int) -> list[str]:
    documents = ShardDocuments(folder, BYTES.eos_id, BYTES.pad_id)
    return [BYTES.decode(documents.tokens(i).tolist()) for i in range(count)]


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32"])
def test_a_record_keeps_tokens_and_type(dtype):
    tokens = np.array([0, 1, 40_000 if dtype == "uint16" else 100_000], dtype)
    record = encode_record(tokens)
    assert len(record) == 4 + tokens.nbytes
    assert decode_record(record).dtype == tokens.dtype
    np.testing.assert_array_equal(decode_record(record), tokens)


def test_other_bytes_are_no_record():
    with pytest.raises(ValueError, match="not a token record"):
        decode_record(b"LM2xabcd")


def test_every_document_comes_back(shard_set):
    assert len(list(shard_set.glob("*.array_record"))) > 2
    documents = ShardDocuments(shard_set, BYTES.eos_id, BYTES.pad_id)
    assert read_all(shard_set, 30) == TEXTS
    np.testing.assert_array_equal(documents.lengths, [len(text) for text in TEXTS])
    assert len(set(documents.hashes.tolist())) == 30
    assert documents.tokens(3).dtype == np.uint16


@pytest.mark.parametrize("packing", ["packed", "ordered"])
def test_shards_give_what_the_text_gives(shard_set, tmp_path, packing):
    text = tmp_path / "text"
    text.mkdir()
    (text / "all.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS))
    sources = [
        config.build(BYTES, 8, 0)
        for config in (
            TokenShards(path=str(shard_set), packing=packing),
            TextFiles(path=str(text), packing=packing),
        )
    ]
    for step in range(12):
        one, other = (source.example(step, 1, 4, 3) for source in sources)
        for name in one._fields:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_the_wrong_tokenizer_is_a_message_that_names_the_right_one(shard_set):
    other = build_tokenizer(TokenizerConfig(), lambda: ["some text, some more text"], 300)
    with pytest.raises(UserError, match=r"made with tokenizer .*data\.tokenizer\.kind='json'.*tokenizer\.json"):
        TokenShards(path=str(shard_set)).build(other, 8, 0)
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        TokenShards(path=str(shard_set)).corpus(0)
    kept = TokenizerConfig(kind="json", path=str(shard_set / "tokenizer.json"))
    TokenShards(path=str(shard_set)).build(build_tokenizer(kept, lambda: [], 259), 8, 0)


def test_ids_beyond_the_vocabulary_are_a_message(shard_set):
    edit_metadata(shard_set, max_id=259)
    with pytest.raises(UserError, match=r"up to 259.* with 259 tokens"):
        TokenShards(path=str(shard_set)).build(BYTES, 8, 0)


def test_a_bucket_is_refused_with_what_to_do():
    with pytest.raises(UserError, match=r"gs://bucket/set: .*gcloud storage cp"):
        TokenShards(path="gs://bucket/set").build(BYTES, 8, 0)
    with pytest.raises(UserError, match=r"gs://bucket/set: .*gcloud storage cp"):
        write_shards([[3, 4]], BYTES, "gs://bucket/set", tokens_per_shard=9)


def test_missing_things_are_named(shard_set, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        TokenShards(path=str(tmp_path / "nowhere")).build(BYTES, 8, 0)
    with pytest.raises(UserError, match=r"no dataset\.json there"):
        TokenShards(path=str(tmp_path)).build(BYTES, 8, 0)
    first = min(shard_set.glob("*.array_record"))
    first.rename(first.with_suffix(".gone"))
    with pytest.raises(UserError, match=rf"{first.name}: missing"):
        TokenShards(path=str(shard_set)).build(BYTES, 8, 0)


@pytest.mark.parametrize("name", ["index.npz", "dataset.json", "tokens-00000.array_record"])
@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b""])
def test_damaged_files_are_named(shard_set, name, damage):
    path = shard_set / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="write the shards again") as caught:
        TokenShards(path=str(shard_set)).build(BYTES, 8, 0)
    assert caught.value.status == 1


def test_flipped_bytes_inside_a_shard_are_found_when_read(tmp_path):
    rng = np.random.default_rng(0)
    write_shards(rng.integers(3, 259, (8, 20_000)).tolist(), BYTES, tmp_path / "set", tokens_per_shard=10**9)
    (path,) = (tmp_path / "set").glob("*.array_record")
    content = bytearray(path.read_bytes())
    middle = len(content) // 3
    content[middle : middle + 64] = bytes(255 - byte for byte in content[middle : middle + 64])
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        read_all(tmp_path / "set", 8)


def test_counts_that_disagree_are_a_message(shard_set):
    edit_metadata(shard_set, documents=31)
    with pytest.raises(UserError, match=r"lengths is int64 \(30,\), expected .*dataset\.json says, 31 documents"):
        TokenShards(path=str(shard_set)).build(BYTES, 8, 0)
    edit_metadata(shard_set, documents=30, format=99)
    with pytest.raises(UserError, match="format 99, this version reads 1"):
        TokenShards(path=str(shard_set)).build(BYTES, 8, 0)


def test_nothing_is_overwritten_and_nothing_is_no_set(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        write_shards([[3]], BYTES, tmp_path / "full", 100)
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="no document with text"):
        write_shards([[], []], BYTES, tmp_path / "none", 100)


def run_converter(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["convert", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.run(convert.main)
    return int(caught.value.code or 0)


def test_converter_from_a_folder(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text"
    (text / "deep").mkdir(parents=True)
    (text / "a.txt").write_text("one document, first in order")
    (text / "deep" / "b.jsonl").write_text('{"body": "second"}\n\n{"body": ""}\n{"body": "third"}\n')
    out = str(tmp_path / "out")
    arguments = ("--out", out, "--text", str(text), "--field", "body", "--tokenizer.kind", "bytes")
    assert run_converter(monkeypatch, *arguments) == 0
    assert "3 documents, 39 tokens (uint16) in 1 files; 1 empty documents left out" in capsys.readouterr().out
    assert read_all(out, 3) == ["one document, first in order", "second", "third"]
    assert run_converter(monkeypatch, *arguments) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_converter_trains_a_bpe(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("the kitchen and the garden and the kitchen " * 50)
    (tmp_path / "text" / "b.txt").write_text("the garden and the kitchen " * 50)
    written = convert.convert(
        convert.Conversion(out=str(tmp_path / "out"), text=str(tmp_path / "text"), vocab_size=300)
    )
    assert written["documents"] == 2
    kept = TokenizerConfig(kind="json", path=str(tmp_path / "out" / "tokenizer.json"))
    tokenizer = build_tokenizer(kept, lambda: [], 300)
    example = TokenShards(path=str(tmp_path / "out")).build(tokenizer, 16, 0).example(0, 0, 1, 1)
    assert "the garden and the kitchen" in tokenizer.decode(example.tokens.tolist())


def test_converter_tries_the_folder_before_the_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("some text")
    monkeypatch.setattr(convert, "build_tokenizer", None)
    assert run_converter(monkeypatch, "--out", str(tmp_path / "a.txt" / "out"), "--text", str(tmp_path)) == 1
    assert "a.txt/out': cannot write there" in capsys.readouterr().err


def test_converter_wants_one_input_and_a_size_that_fits(tmp_path):
    with pytest.raises(UserError, match="give either --text or --tfds"):
        convert.convert(convert.Conversion(out=str(tmp_path / "out")))
    (tmp_path / "a.txt").write_text("x")
    small = convert.Conversion(
        out=str(tmp_path / "out"), text=str(tmp_path), tokenizer=TokenizerConfig(kind="bytes"), vocab_size=100
    )
    with pytest.raises(UserError, match="259 tokens but --vocab-size is 100"):
        convert.convert(small)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": ["../set/tokens-00000.array_record"]}, r"got '\.\./set/tokens-00000\.array_record'; refused"),
        ({"files": ["/etc/passwd"]}, "got '/etc/passwd'; refused"),
        ({"files": ["tokens-00000.array_record/../../x"]}, "refused"),
        ({"files": [["tokens-00000.array_record"]]}, "refused"),
        ({"files": "tokens-00000.array_record"}, r"\['files'\] missing or of another type"),
        ({"documents": -1}, "damaged: max_id"),
        ({"documents": 10**12, "tokens": 10**13}, "bytes for 1000000000000 documents"),
        ({"documents": True}, r"\['documents'\] missing or of another type"),
        ({"max_id": -5}, "damaged: max_id -5"),
        ({"max_id": 2**40}, "damaged: max_id"),
        ({"max_id": 300}, r"tokens \(up to 300\)"),
        ({"tokens": 10**9}, r"dataset\.json says 1000000000"),
        ({"format": "1"}, r"\['format'\] missing or of another type"),
    ],
)
def test_a_stranger_s_description_is_refused(shard_set, changes, message):
    edit_metadata(shard_set, **changes)
    with pytest.raises(UserError, match=message):
        TokenShards(path=str(shard_set)).build(BYTES, 8, 0)


def edit_index(folder, **changes):
    with np.load(folder / "index.npz") as index:
        arrays = dict(index)
    np.savez(folder / "index.npz", **(arrays | changes))


@pytest.mark.parametrize("length", [-1, 0, 2**50, np.iinfo(np.int64).min])
def test_lengths_that_make_no_sense_are_refused(shard_set, length):
    documents = ShardDocuments(shard_set, 0, 0)
    edit_index(shard_set, lengths=np.array([length, *documents.lengths[1:]]))
    with pytest.raises(UserError, match=r"index\.npz: damaged .*lengths from"):
        ShardDocuments(shard_set, 0, 0)


@pytest.mark.parametrize("dtype", ["<f8", "<i4", "O"])
def test_an_index_of_another_type_is_refused(shard_set, dtype):
    lengths = np.array(ShardDocuments(shard_set, 0, 0).lengths.tolist(), dtype)
    with np.load(shard_set / "index.npz") as index:
        hashes = index["hashes"]
    np.savez(shard_set / "index.npz", lengths=lengths, hashes=hashes)
    with pytest.raises(UserError, match=r"index\.npz: damaged"):
        ShardDocuments(shard_set, 0, 0)


def test_a_header_of_a_huge_array_makes_no_array(shard_set):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"shape": (10**12,), "fortran_order": False, "descr": "<i8"})
    with zipfile.ZipFile(shard_set / "index.npz", "w") as archive:
        archive.writestr("lengths.npy", header.getvalue() + bytes(8 * 30))
        archive.writestr("hashes.npy", header.getvalue() + bytes(8 * 30))
    with pytest.raises(UserError, match=r"index\.npz: damaged .*1000000000000"):
        ShardDocuments(shard_set, 0, 0)
    with zipfile.ZipFile(shard_set / "index.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("lengths.npy", bytes(10_000_000))
        archive.writestr("hashes.npy", bytes(10_000_000))
    with pytest.raises(UserError, match=r"index\.npz: damaged"):
        ShardDocuments(shard_set, 0, 0)


def test_hashes_of_the_index_are_compared(shard_set):
    hashes = ShardDocuments(shard_set, 0, 0).hashes.copy()
    hashes[3] += 1
    edit_index(shard_set, hashes=hashes)
    documents = ShardDocuments(shard_set, 0, 0)
    documents.tokens(2)
    with pytest.raises(UserError, match=r"document 3: its tokens do not have the hash that index\.npz says"):
        documents.tokens(3)


def test_ids_above_the_description_s_are_refused(shard_set):
    edit_metadata(shard_set, max_id=50)
    with pytest.raises(UserError, match=r"document 0 has token ids from .* dataset\.json says 0 to 50"):
        ShardDocuments(shard_set, 0, 0).tokens(0)


def other_merges(folder) -> FileTokenizer:
    """A tokenizer with the names of a shard set's and other merges."""
    plain = json.loads((folder / "tokenizer.json").read_text())
    plain["model"]["merges"].reverse()
    plain["model"]["merges"].sort()
    (folder.parent / "other.json").write_text(json.dumps(plain))
    return build_tokenizer(TokenizerConfig(kind="json", path=str(folder.parent / "other.json")), list, 512)


@pytest.fixture
def bpe_set(tmp_path):
    tokenizer = build_tokenizer(TokenizerConfig(), lambda: TEXTS, 300)
    write_shards(map(tokenizer.encode, TEXTS), tokenizer, tmp_path / "bpe", tokens_per_shard=200)
    return tokenizer, tmp_path / "bpe"


def test_shards_do_not_open_with_other_merges(bpe_set):
    tokenizer, folder = bpe_set
    TokenShards(path=str(folder)).build(tokenizer, 8, 0)
    other = other_merges(folder)
    assert other.vocabulary() == tokenizer.vocabulary()
    with pytest.raises(UserError, match=rf"made with tokenizer {tokenizer.fingerprint}, but.*{other.fingerprint}"):
        TokenShards(path=str(folder)).build(other, 8, 0)


def test_shards_of_earlier_versions_are_followed_by_their_tokenizer_file(bpe_set):
    tokenizer, folder = bpe_set
    edit_metadata(folder, tokenizer=tokenizer.vocabulary_fingerprint)
    TokenShards(path=str(folder)).build(tokenizer, 8, 0)
    other = other_merges(folder)
    with pytest.raises(UserError, match=rf"made with tokenizer {tokenizer.fingerprint}, but.*{other.fingerprint}"):
        TokenShards(path=str(folder)).build(other, 8, 0)
    (folder / "tokenizer.json").unlink()
    old, new = tokenizer.vocabulary_fingerprint, tokenizer.fingerprint
    with pytest.raises(UserError, match=rf"earlier version.*{old}.*{new}.*Convert the text again"):
        TokenShards(path=str(folder)).build(tokenizer, 8, 0)
