"""Tokenised documents in ArrayRecord files: the form in which a large corpus is read.

A shard set is a folder of `tokens-00000.array_record`, `tokens-00001.array_record`, ..., one record per document;
`index.npz` with the length and the hash of every document; the tokenizer; and, written last, `dataset.json`.
A record is the bytes "LM2", the letter of a little-endian numpy type (H uint16, I uint32, i int32), and the tokens.
ArrayRecord reads and writes file systems, so a bucket has to be mounted or copied.

A shard set may come from somebody else. Nothing outside its folder is read, nothing in it is executed, and no array
is made before its size was compared with the files: lengths, token ids and hashes are checked as documents are read.
"""

import dataclasses
import functools
import io
import json
import os
import re
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
from etils import epath

from lm2_jax.atomic import is_remote, write_file
from lm2_jax.data.base import Source, SourceConfig, Tokenizer
from lm2_jax.data.documents import DocumentFields, DocumentSource, content_hash
from lm2_jax.data.files import check_regular, read_bytes, read_json
from lm2_jax.data.tokenizers import FileTokenizer, TokenizerKind, load_tokenizer, save_tokenizer
from lm2_jax.errors import UserError
from lm2_jax.folders import check_folder, prepare_folder

FORMAT = 1
METADATA, INDEX = "dataset.json", "index.npz"
_MAGIC = b"LM2"
_DTYPES = {b"H": np.dtype("<u2"), b"I": np.dtype("<u4"), b"i": np.dtype("<i4")}
_LETTERS = {dtype: letter for letter, dtype in _DTYPES.items()}
_CACHED_DOCUMENTS = 64  # rows that read a long document need it at each step
_FILE_NAME = re.compile(r"tokens-[0-9]{5,9}\.array_record")
_MOST_TOKENS = 1 << 40  # of one document
_ARRAYS = {"lengths": np.dtype("<i8"), "hashes": np.dtype("<u8")}


def encode_record(tokens: np.ndarray) -> bytes:
    """A document as the bytes of a record; the numpy type is kept."""
    return _MAGIC + _LETTERS[tokens.dtype.newbyteorder("<")] + tokens.tobytes()


def decode_record(record: bytes) -> np.ndarray:
    """The tokens of a record; ValueError for anything else."""
    dtype = _DTYPES.get(record[3:4])
    if record[:3] != _MAGIC or dtype is None:
        raise ValueError(f"not a token record: it begins with {record[:4]!r}, expected {_MAGIC!r} and a type's letter")
    return np.frombuffer(record, dtype, offset=4)


def local_folder(folder: epath.PathLike) -> epath.Path:
    """A folder of a file system; a bucket is a `UserError`."""
    if is_remote(folder):
        raise UserError(
            f"{folder}: token shards are read and written in a file system (ArrayRecord); copy them between it and "
            "the bucket (`gcloud storage cp -r`), or mount the bucket"
        )
    return epath.Path(folder)


def check_empty(out: epath.PathLike) -> None:
    """Checks the folder for a shard set; one that holds something or cannot be written to is a `UserError`."""
    folder = local_folder(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{out}: exists and is not empty; shards go into a new or empty folder")
    check_folder(out, "out")


def write_shards(
    documents: Iterable[Sequence[int] | np.ndarray],
    tokenizer: FileTokenizer,
    out: epath.PathLike,
    tokens_per_shard: int,
) -> dict[str, Any]:
    """Writes a shard set.

    Args:
      documents: token ids of one document after another; empty ones are left out and counted.
      tokenizer: the one that made them.
      out: folder, new or empty.
      tokens_per_shard: a new file begins with the document after which a file holds this many.
    Returns:
      What `dataset.json` holds.
    """
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  no stubs

    check_empty(out)
    folder = prepare_folder(out)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    lengths, hashes, files, empty, max_id = [], [], [], 0, 0
    writer, written = None, 0
    for document in documents:
        if not len(document):
            empty += 1
            continue
        if writer is None:
            files.append(f"tokens-{len(files):05}.array_record")
            # One record per group: reading a document does not unpack its neighbours.
            writer, written = array_record_module.ArrayRecordWriter(str(folder / files[-1]), "group_size:1"), 0
        tokens = np.asarray(document).astype(dtype)
        writer.write(encode_record(tokens))
        lengths.append(len(tokens))
        hashes.append(content_hash(tokens))
        max_id, written = max(max_id, int(tokens.max())), written + len(tokens)
        if written >= tokens_per_shard:
            writer.close()
            writer = None
    if writer is not None:
        writer.close()
    if not lengths:
        raise UserError(f"{out}: no document with text came in, so no shard was written")
    save_tokenizer(tokenizer, folder)
    index = io.BytesIO()
    np.savez(index, lengths=np.array(lengths, np.int64), hashes=np.array(hashes, np.uint64))
    write_file(folder / INDEX, index.getvalue())
    metadata = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "dtype": dtype.name,
        "max_id": max_id,
        "documents": len(lengths),
        "empty_documents": empty,
        "tokens": sum(lengths),
        "files": files,
    }
    write_file(folder / METADATA, json.dumps(metadata, indent=2))
    return metadata


class ShardDocuments:
    """The `Documents` of a shard set; what cannot be read is a `UserError` with the file's name."""

    def __init__(self, folder: epath.PathLike, eos_id: int, pad_id: int):
        import grain  # slow to import

        self._folder = local_folder(folder)
        self.eos_id, self.pad_id = eos_id, pad_id
        self.metadata = _read_metadata(self._folder)
        self.lengths, self.hashes = _read_index(self._folder / INDEX, self.metadata)
        files = [self._folder / name for name in self.metadata["files"]]
        for file in files:
            if not file.exists():
                raise UserError(f"{file}: missing, though {METADATA} names it; write the shards again", status=1)
            check_regular(file)
        try:
            self._records: Any = grain.sources.ArrayRecordDataSource([str(file) for file in files])
            count = len(self._records)
        except Exception as error:  # the reader raises bare RuntimeErrors, and ValueErrors of several kinds
            raise UserError(f"{self._folder}: damaged shard: {error}; write the shards again", status=1) from error
        if count != len(self.lengths):
            raise UserError(
                f"{self._folder}: {METADATA} and {INDEX} describe {len(self.lengths)} documents, the files "
                f"hold {count}; write the shards again",
                status=1,
            )
        self.tokens = functools.lru_cache(maxsize=_CACHED_DOCUMENTS)(self._tokens)

    def _tokens(self, index: int) -> np.ndarray:
        where = f"{self._folder}: document {index}"
        try:
            tokens = decode_record(self._records[index])
        except Exception as error:
            raise UserError(f"{where} is damaged: {error}; write the shards again", 1) from error
        if len(tokens) != self.lengths[index]:
            raise UserError(
                f"{where} has {len(tokens)} tokens, {INDEX} says {self.lengths[index]}; write the shards again", 1
            )
        if tokens.min() < 0 or tokens.max() > self.metadata["max_id"]:
            raise UserError(
                f"{where} has token ids from {tokens.min()} to {tokens.max()}, {METADATA} says 0 to "
                f"{self.metadata['max_id']}; write the shards again",
                status=1,
            )
        if content_hash(tokens) != self.hashes[index]:
            raise UserError(f"{where}: its tokens do not have the hash that {INDEX} says; write the shards again", 1)
        return tokens


def _read_metadata(folder: epath.Path) -> dict[str, Any]:
    """What `dataset.json` says, checked for types, file names and numbers."""
    if not folder.is_dir():
        raise UserError(f"data.source.path={str(folder)!r}: no such folder; expected a shard set")
    path = folder / METADATA
    if not path.is_file():
        raise UserError(
            f"data.source.path={str(folder)!r}: no {METADATA} there, so it is no shard set or one whose conversion was "
            "interrupted; `python -m lm2_jax.data.convert` makes one"
        )
    try:
        metadata = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; write the shards again", status=1) from error
    types = {"format": int, "tokenizer": str, "max_id": int, "documents": int, "tokens": int, "files": list}
    wrong = [
        key for key, kind in types.items() if not isinstance(metadata, dict) or type(metadata.get(key)) is not kind
    ]
    if wrong:
        raise UserError(f"{path}: damaged, {wrong} missing or of another type; write the shards again", status=1)
    if metadata["format"] != FORMAT:
        raise UserError(f"{path}: format {metadata['format']}, this version reads {FORMAT}", status=1)
    for name in metadata["files"]:
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise UserError(
                f"{path}: expected files such as 'tokens-00000.array_record', got {name!r}; refused", status=1
            )
    if not (0 <= metadata["max_id"] < 2**32 and 1 <= metadata["documents"] <= metadata["tokens"] < 2**62):
        raise UserError(
            f"{path}: damaged: max_id {metadata['max_id']}, documents {metadata['documents']}, tokens "
            f"{metadata['tokens']}; write the shards again",
            status=1,
        )
    return {key: metadata[key] for key in types}


def _read_index(path: epath.Path, metadata: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Length and hash of every document; sizes are compared with the file's before an array is made."""
    count = metadata["documents"]
    arrays = []
    try:
        content = read_bytes(path)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name, dtype in _ARRAYS.items():
                entry = archive.getinfo(f"{name}.npy")
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size < count * dtype.itemsize:
                    raise ValueError(f"{name} has {entry.file_size} bytes for {count} documents")
                with archive.open(entry) as file:
                    version = np.lib.format.read_magic(file)
                    shape, _, found = _HEADERS[version](file)
                    if shape != (count,) or found != dtype:
                        raise ValueError(
                            f"{name} is {found} {shape}, expected {dtype} and, as {METADATA} says, {count} documents"
                        )
                    arrays.append(np.frombuffer(file.read(count * dtype.itemsize), dtype))
        lengths, hashes = arrays
        if len(lengths) != count or lengths.min() < 1 or lengths.max() > _MOST_TOKENS:
            raise ValueError(f"lengths from {lengths.min()} to {lengths.max()}")
        if int(lengths.sum(dtype=object)) != metadata["tokens"]:
            raise ValueError(f"{int(lengths.sum(dtype=object))} tokens, {METADATA} says {metadata['tokens']}")
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path}: damaged or missing ({error}); write the shards again", 1) from error
    return lengths, hashes


_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenShards(DocumentFields, SourceConfig):
    """Tokens that `python -m lm2_jax.data.convert` wrote; `data.tokenizer` must be the one they were made with."""

    kind: ClassVar[str] = "shards"

    path: str
    """Folder of the shard set."""

    def build(self, tokenizer: Tokenizer, segment_tokens: int, seed: int) -> Source:
        """Opens the shards; a tokenizer that is not theirs is a `UserError`."""
        if not isinstance(tokenizer, FileTokenizer):
            raise TypeError(f"shards compare fingerprints: expected a FileTokenizer, got {type(tokenizer).__name__}")
        documents = ShardDocuments(self.path, tokenizer.eos_id, tokenizer.pad_id)
        max_id = documents.metadata["max_id"]
        made_with = self._made_with(documents.metadata["tokenizer"], tokenizer)
        if made_with != tokenizer.fingerprint or max_id >= tokenizer.vocab_size:
            raise UserError(
                f"data.source.path={self.path!r}: its tokens (up to {max_id}) were made with tokenizer {made_with}, "
                f"but data.tokenizer is {tokenizer.fingerprint} with {tokenizer.vocab_size} tokens: "
                f"{self._tokenizer_hint()}"
            )
        return DocumentSource(documents, segment_tokens, self, seed, f"data.source.path={self.path!r}")

    def corpus(self, seed: int) -> list[str]:
        """Always a `UserError`: shards hold tokens, and their tokenizer exists already."""
        raise UserError(
            f"data.source.path={self.path!r} holds tokens, no text to train a tokenizer on: {self._tokenizer_hint()}"
        )

    def _made_with(self, recorded: str, tokenizer: FileTokenizer) -> str:
        """Fingerprint of the tokenizer that made the shards.

        Earlier versions recorded a hash of the vocabulary alone. For their shards the tokenizer's file in the folder
        says which tokenizer it was.
        """
        if recorded.startswith("v2:"):
            return recorded
        try:
            kept = load_tokenizer(self.path, tokenizer.config, recorded)
        except UserError as error:
            raise UserError(
                f"data.source.path={self.path!r}: the shards were written by an earlier version, which recorded a hash "
                f"of their tokenizer's vocabulary only ({recorded}). This version compares all of the tokenizer "
                f"({tokenizer.fingerprint}) with the file next to the shards, which is not it: {error}. Convert the "
                "text again",
                status=1,
            ) from error
        return kept.fingerprint

    def _tokenizer_hint(self) -> str:
        found = [
            f"set data.tokenizer.kind={kind.kind!r} and data.tokenizer.path={os.fspath(path)!r}"
            for kind in TokenizerKind.registry.values()
            if kind.reads_file and (path := epath.Path(self.path) / kind.file_name).exists()
        ]
        return " or ".join(found) or "set data.tokenizer to the one the shards were made with"
