"""Tokenised documents in ArrayRecord files: the form in which a large corpus is read.

A shard set is a folder of `tokens-00000.array_record`, `tokens-00001.array_record`, ..., one record per document;
`index.npz` with the length and the hash of every document; the tokenizer; and, written last, `dataset.json`.
A record is the bytes "LM2", the letter of a little-endian numpy type (H uint16, I uint32, i int32), and the tokens.
ArrayRecord reads and writes file systems, so a bucket has to be mounted or copied.
"""

import dataclasses
import functools
import json
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import grain
import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  compiled, no stubs
from etils import epath

from lm2_jax.data.base import Source, SourceConfig, Tokenizer
from lm2_jax.data.documents import DocumentFields, DocumentSource, content_hash
from lm2_jax.data.tokenizers import FileTokenizer, save_tokenizer
from lm2_jax.errors import UserError
from lm2_jax.folders import prepare_folder

FORMAT = 1
METADATA, INDEX = "dataset.json", "index.npz"
_MAGIC = b"LM2"
_DTYPES = {b"H": np.dtype("<u2"), b"I": np.dtype("<u4"), b"i": np.dtype("<i4")}
_LETTERS = {dtype: letter for letter, dtype in _DTYPES.items()}
_CACHED_DOCUMENTS = 64  # rows that walk through a long document ask for it at each step


def encode_record(tokens: np.ndarray) -> bytes:
    """A document as the bytes of a record; the numpy type is kept."""
    return _MAGIC + _LETTERS[tokens.dtype.newbyteorder("<")] + tokens.tobytes()


def decode_record(record: bytes) -> np.ndarray:
    """The tokens of a record; ValueError where it is none."""
    dtype = _DTYPES.get(record[3:4])
    if record[:3] != _MAGIC or dtype is None:
        raise ValueError(f"not a token record: it begins with {record[:4]!r}, expected {_MAGIC!r} and a type's letter")
    return np.frombuffer(record, dtype, offset=4)


def local_folder(folder: epath.PathLike) -> epath.Path:
    """A folder of a file system; a bucket is a `UserError`."""
    if "://" in str(folder):
        raise UserError(
            f"{folder}: token shards are read and written in a file system (ArrayRecord); copy them between it and "
            "the bucket (`gcloud storage cp -r`), or mount the bucket"
        )
    return epath.Path(folder)


def empty_folder(out: epath.PathLike) -> epath.Path:
    """Makes the folder for a shard set; one that holds something or cannot be written to is a `UserError`."""
    folder = local_folder(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{out}: exists and is not empty; shards go into a new or empty folder")
    return prepare_folder(out)


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
    folder = empty_folder(out)
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
        tokens = np.array(document, dtype)
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
    with (folder / INDEX).open("wb") as file:
        np.savez(file, lengths=np.array(lengths, np.int64), hashes=np.array(hashes, np.uint64))
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
    (folder / METADATA).write_text(json.dumps(metadata, indent=2))
    return metadata


class ShardDocuments:
    """The `Documents` of a shard set; what cannot be read is a `UserError` with the file's name."""

    def __init__(self, folder: epath.PathLike, eos_id: int, pad_id: int):
        self._folder = local_folder(folder)
        self.eos_id, self.pad_id = eos_id, pad_id
        self.metadata = _read_metadata(self._folder)
        try:
            with (self._folder / INDEX).open("rb") as file, np.load(file) as index:
                self.lengths, self.hashes = index["lengths"], index["hashes"]
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{self._folder / INDEX}: damaged or missing ({error}); write the shards again", 1
            ) from error
        files = [self._folder / name for name in self.metadata["files"]]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file}: missing, though {METADATA} names it; write the shards again", status=1)
        try:
            self._records: Any = grain.sources.ArrayRecordDataSource([str(file) for file in files])
            count = len(self._records)
        except Exception as error:  # the reader raises bare RuntimeErrors, and ValueErrors of several kinds
            raise UserError(f"{self._folder}: damaged shard: {error}; write the shards again", status=1) from error
        if not count == len(self.lengths) == len(self.hashes) == self.metadata["documents"]:
            raise UserError(
                f"{self._folder}: {METADATA} tells of {self.metadata['documents']} documents, {INDEX} of "
                f"{len(self.lengths)}, and the files hold {count}; write the shards again",
                status=1,
            )
        self.tokens = functools.lru_cache(maxsize=_CACHED_DOCUMENTS)(self._tokens)

    def _tokens(self, index: int) -> np.ndarray:
        try:
            tokens = decode_record(self._records[index])
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(
                f"{self._folder}: document {index} is damaged: {error}; write the shards again", 1
            ) from error
        if len(tokens) != self.lengths[index]:
            raise UserError(
                f"{self._folder}: document {index} has {len(tokens)} tokens, {INDEX} says {self.lengths[index]}; "
                "write the shards again",
                status=1,
            )
        return tokens


def _read_metadata(folder: epath.Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"data.source.path={str(folder)!r}: no such folder; expected a shard set")
    if not (folder / METADATA).is_file():
        raise UserError(
            f"data.source.path={str(folder)!r}: no {METADATA} there, so it is no shard set or one whose conversion was "
            "interrupted; `python -m lm2_jax.data.convert` makes one"
        )
    try:
        metadata = json.loads((folder / METADATA).read_text())
        kept = {key: metadata[key] for key in ("tokenizer", "dtype", "max_id", "documents", "tokens", "files")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / METADATA}: damaged ({error!r}); write the shards again", status=1) from error
    if metadata["format"] != FORMAT:
        raise UserError(f"{folder / METADATA}: format {metadata['format']}, this version reads {FORMAT}", status=1)
    return kept


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
        made_with = documents.metadata["tokenizer"]
        if made_with != tokenizer.fingerprint or documents.metadata["max_id"] >= tokenizer.vocab_size:
            raise UserError(
                f"data.source.path={self.path!r}: its tokens (up to {documents.metadata['max_id']}) were made with "
                f"tokenizer {made_with}, but data.tokenizer is {tokenizer.fingerprint} with {tokenizer.vocab_size} "
                f"tokens: {self._tokenizer_hint()}"
            )
        return DocumentSource(documents, segment_tokens, self, seed, f"data.source.path={self.path!r}")

    def corpus(self, seed: int) -> list[str]:
        """Always a `UserError`: shards hold tokens, and their tokenizer exists already."""
        raise UserError(
            f"data.source.path={self.path!r} holds tokens, no text to train a tokenizer on: {self._tokenizer_hint()}"
        )

    def _tokenizer_hint(self) -> str:
        kinds = {"tokenizer.json": "json", "tokenizer.model": "sentencepiece"}
        found = [
            f"set data.tokenizer.kind={kind!r} and data.tokenizer.path={str(epath.Path(self.path) / name)!r}"
            for name, kind in kinds.items()
            if (epath.Path(self.path) / name).exists()
        ]
        return " or ".join(found) or "set data.tokenizer to the one the shards were made with"
