"""Documents of plain text: folders of .txt and .jsonl files, and tensorflow-datasets."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from etils import epath

from lm2_jax.data.base import Source, SourceConfig, Tokenizer
from lm2_jax.data.documents import DocumentFields, DocumentSource, MemoryDocuments
from lm2_jax.data.draws import shuffled
from lm2_jax.errors import UserError

_CORPUS_CHARACTERS = 4_000_000


def file_documents(path: epath.PathLike, field: str) -> Iterator[str]:
    """Texts below a folder, in the order of the file names: each .txt file, and each line of a .jsonl file.

    Args:
      path: folder, searched to any depth.
      field: where a line's object has its text.
    """
    folder = epath.Path(path)
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder; expected one with .txt or .jsonl files")
    files = sorted(_files(folder))
    if not files:
        raise UserError(f"{path}: neither .txt nor .jsonl files there")
    for file in files:
        try:
            if file.suffix == ".txt":
                yield file.read_text(encoding="utf-8")
            else:
                yield from _json_lines(file, field)
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text: {error}", status=1) from error


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry)
        elif entry.suffix in (".txt", ".jsonl"):
            yield entry


def _json_lines(file: epath.Path, field: str) -> Iterator[str]:
    with file.open("r", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}:{number}: not JSON: {error}", status=1) from error
            text = entry.get(field) if isinstance(entry, dict) else None
            if not isinstance(text, str):
                raise UserError(
                    f"{file}:{number}: expected an object with text under {field!r}, got {line.strip()[:80]!r}; "
                    "change the field's name"
                )
            yield text


class TfdsDocuments(Sequence[str]):
    """Texts of a prepared tensorflow-datasets set; TensorFlow itself is not needed.

    Args:
      name: of the set, with config and version where wanted ("lm1b", "wikipedia/20230601.en:1.0.0").
      split: in TFDS's notation ("train", "train[:10%]").
      data_dir: where it was prepared; None: TFDS's own default.
      field: feature that holds the text.
    """

    def __init__(self, name: str, split: str, data_dir: str | None, field: str):
        import tensorflow_datasets  # costs a third of a second, so only where it is used

        try:
            records: Any = tensorflow_datasets.data_source(name, split=split, data_dir=data_dir, download=False)
            first = records[0] if len(records) else {field: ""}
        except Exception as error:  # TFDS raises its own kinds and bare ones
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"TFDS {name!r}, split {split!r}, in data_dir {data_dir!r}: {reason} Expected a set prepared with "
                f"`tfds build {name} --file_format=array_record`; change name, split or data_dir"
            ) from error
        if field not in first:
            raise UserError(f"TFDS {name!r} has no feature {field!r}; it has {sorted(first)}. Change the field's name")
        self._records, self._field = records, field

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))  # past its end TFDS raises another error than a list

    def __getitem__(self, index: Any) -> Any:
        text = self._records[index][self._field]
        return text.decode("utf-8") if isinstance(text, bytes) else str(text)


def _tokenised(
    texts: Iterable[str], tokenizer: Tokenizer, limit_megabytes: int, name: str, convert: str
) -> MemoryDocuments:
    def documents() -> Iterator[np.ndarray]:
        read = 0
        for text in texts:
            read += len(text)
            if read > limit_megabytes * 1_000_000:
                raise UserError(
                    f"{name}: more than data.source.limit_megabytes={limit_megabytes} MB of text, too much to tokenise "
                    f"at each start: convert it once with `python -m lm2_jax.data.convert {convert}` and read the "
                    "shards, or raise the limit"
                )
            yield np.array(tokenizer.encode(text), np.uint32)

    return MemoryDocuments(documents(), tokenizer.eos_id, tokenizer.pad_id)


def _sample(texts: Sequence[str], seed: int) -> list[str]:
    """About 4 MB out of all parts of a corpus, the same for the same seed."""
    share = max(10_000, _CORPUS_CHARACTERS // max(1, len(texts)))
    sample, size = [], 0
    for index in shuffled(len(texts), seed, "corpus"):
        if size >= _CORPUS_CHARACTERS:
            break
        sample.append(texts[int(index)][:share])
        size += len(sample[-1])
    return sample


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFiles(DocumentFields, SourceConfig):
    """A folder of .txt files (a document each) and .jsonl files (a document a line), tokenised at the start."""

    kind: ClassVar[str] = "text"

    path: str
    """Folder, searched to any depth."""
    field: str = "text"
    """Name under which a line of a .jsonl file has its text."""
    limit_megabytes: int = 256
    """Most text that is tokenised at the start; more belongs into shards."""

    def build(self, tokenizer: Tokenizer, segment_tokens: int, seed: int) -> Source:
        """Reads and tokenises all files."""
        name = f"data.source.path={self.path!r}"
        texts = file_documents(self.path, self.field)
        documents = _tokenised(texts, tokenizer, self.limit_megabytes, name, f"OUT --text {self.path}")
        return DocumentSource(documents, segment_tokens, self, seed, name)

    def corpus(self, seed: int) -> list[str]:
        """A sample of all documents."""
        return _sample(list(file_documents(self.path, self.field)), seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsText(DocumentFields, SourceConfig):
    """A text set of tensorflow-datasets, prepared in the ArrayRecord format, tokenised at the start."""

    kind: ClassVar[str] = "tfds"

    name: str
    """Name in TFDS, with config and version where wanted."""
    split: str = "train"
    """Split in TFDS's notation, such as "train[:10%]"."""
    data_dir: str | None = None
    """Folder in which it was prepared; None: TFDS's default."""
    field: str = "text"
    """Feature that holds the text."""
    limit_megabytes: int = 256
    """Most text that is tokenised at the start; more belongs into shards."""

    def build(self, tokenizer: Tokenizer, segment_tokens: int, seed: int) -> Source:
        """Reads and tokenises the split."""
        name = f"data.source.name={self.name!r}"
        texts = TfdsDocuments(self.name, self.split, self.data_dir, self.field)
        documents = _tokenised(texts, tokenizer, self.limit_megabytes, name, f"OUT --tfds {self.name}")
        return DocumentSource(documents, segment_tokens, self, seed, name)

    def corpus(self, seed: int) -> list[str]:
        """A sample of all documents."""
        return _sample(TfdsDocuments(self.name, self.split, self.data_dir, self.field), seed)
