"""Sources of plain text: files (a folder, a file, a glob pattern), and tensorflow-datasets."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np

from lm2_jax.data.base import Source, SourceConfig, Tokenizer
from lm2_jax.data.documents import DocumentFields, DocumentSource, MemoryDocuments
from lm2_jax.data.draws import shuffled
from lm2_jax.data.files import clean_text, decode
from lm2_jax.data.text_files import Document, cut_document, read_documents
from lm2_jax.data.tokenizers import token_array
from lm2_jax.errors import UserError
from lm2_jax.fields import Since

_CORPUS_CHARACTERS = 4_000_000


class TfdsDocuments(Sequence[Document]):
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
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"TFDS {name!r}, split {split!r}, in data_dir {data_dir!r}: {reason} Expected a set prepared with "
                f"`tfds build {name} --file_format=array_record`; change name, split or data_dir"
            ) from error
        if field not in first:
            raise UserError(f"TFDS {name!r} has no feature {field!r}; it has {sorted(first)}. Change the field's name")
        self._records, self._field, self._name = records, field, name

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Document]:
        return map(self.__getitem__, range(len(self)))  # past its end TFDS raises another error than a list

    def __getitem__(self, index: Any) -> Any:
        where = f"TFDS {self._name!r}, example {index}"
        text = self._records[index][self._field]
        return Document(clean_text(decode(text, where) if isinstance(text, bytes) else str(text)), where)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TokenisedText(DocumentFields, SourceConfig, abstract=True):
    """What sources of text share that tokenise it at the start."""

    field: str = "text"
    """Name under which a row has its text."""
    limit_megabytes: int = 256
    """Most text that is tokenised at the start; larger corpora are converted to shards."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit_megabytes < 1:
            raise ValueError(f"source.limit_megabytes must be at least 1, got {self.limit_megabytes}")

    def build(self, tokenizer: Tokenizer, segment_tokens: int, seed: int) -> Source:
        """Reads and tokenises all text."""

        def arrays() -> Iterator[np.ndarray]:
            read = 0
            for document in self.documents():
                read += len(document.text)
                self.check_size(read)
                yield token_array(tokenizer, document.text, document.where)

        documents = MemoryDocuments(arrays(), tokenizer.eos_id, tokenizer.pad_id)
        return DocumentSource(documents, segment_tokens, self, seed, self.title)

    def corpus(self, seed: int) -> list[str]:
        """About 4 MB out of all parts of the text, the same for the same seed."""
        # Texts are read twice, so that memory holds the sample only.
        lengths = [len(document.text) for document in self.documents()]
        share = max(10_000, _CORPUS_CHARACTERS // max(1, len(lengths)))
        chosen: dict[int, str] = {}
        size = 0
        for index in shuffled(len(lengths), seed, "corpus").tolist():
            if size >= _CORPUS_CHARACTERS:
                break
            chosen[index] = ""
            size += min(lengths[index], share)
        for index, document in enumerate(self.documents()):
            if index in chosen:
                chosen[index] = document.text[:share]
        return list(chosen.values())

    def documents(self) -> Iterable[Document]:
        """The documents in their order."""
        raise NotImplementedError

    def check_size(self, characters: int) -> None:
        """Refuses more text than `limit_megabytes`."""
        if characters > self.limit_megabytes * 1_000_000:
            raise UserError(
                f"{self.title}: more than data.source.limit_megabytes={self.limit_megabytes} MB of text, too much to "
                f"tokenise at each start: convert it once with `python -m lm2_jax.data.convert --out OUT "
                f"{self.convert_flags}` and read the shards, or raise the limit"
            )

    @property
    def title(self) -> str:
        """The field and value that name the text, for messages."""
        raise NotImplementedError

    @property
    def convert_flags(self) -> str:
        """How the converter is given the same text."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFiles(_TokenisedText):
    """Text files, tokenised at the start: a document for each .txt or .md file, and for each row of the others."""

    kind: ClassVar[str] = "text"

    path: str
    """A file, a folder (searched to any depth), or a glob pattern; .txt, .md, .jsonl, .json and .parquet files."""
    field: str = "text"
    """Name under which a row of a .jsonl, .json or .parquet file has its text."""
    document_characters: Annotated[int | None, Since(2)] = None
    """Longer documents are cut into documents of at most this many characters, at the end of a paragraph where one
    ends; None: never. A text of few documents needs it, since held-out text consists of complete documents."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.document_characters is not None and self.document_characters < 1:
            raise ValueError(f"source.document_characters must be at least 1 or None, got {self.document_characters}")

    def documents(self) -> Iterator[Document]:
        """The documents of all files, cut where they are longer than `document_characters`."""
        for document in read_documents(self.path, self.field):
            yield from cut_document(document, self.document_characters)

    @property
    def title(self) -> str:
        """The field and value that name the text, for messages."""
        return f"data.source.path={self.path!r}"

    @property
    def convert_flags(self) -> str:
        """How the converter is given the same text."""
        return f"--text {self.path}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsText(_TokenisedText):
    """A text set of tensorflow-datasets, prepared in the ArrayRecord format, tokenised at the start."""

    kind: ClassVar[str] = "tfds"

    name: str
    """Name in TFDS, with config and version if needed."""
    split: str = "train"
    """Split in TFDS's notation, such as "train[:10%]"."""
    data_dir: str | None = None
    """Folder in which it was prepared; None: TFDS's default."""
    field: str = "text"
    """Feature that holds the text."""

    def documents(self) -> "TfdsDocuments":
        """The examples of the split."""
        return TfdsDocuments(self.name, self.split, self.data_dir, self.field)

    @property
    def title(self) -> str:
        """The field and value that name the text, for messages."""
        return f"data.source.name={self.name!r}"

    @property
    def convert_flags(self) -> str:
        """How the converter is given the same text."""
        return f"--tfds {self.name}"
