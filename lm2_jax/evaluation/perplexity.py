"""The perplexity suite: how well a run predicts held-out text, read document by document as a stream."""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from lm2_jax.data.base import Tokenizer
from lm2_jax.data.documents import DocumentFields, DocumentSource
from lm2_jax.data.text_files import read_documents
from lm2_jax.data.tokenizers import token_array
from lm2_jax.errors import UserError
from lm2_jax.evaluation import report
from lm2_jax.evaluation.answerer import RunAnswerer, even_batches
from lm2_jax.evaluation.suite import Evaluation, Output, Suite

BUFFERED_BATCHES = 8  # batches that are sorted by length together, so that their rows end at about the same token


class Scored(NamedTuple):
    """A text as the model reads it."""

    tokens: np.ndarray  # with the token that ends a document
    bytes: int  # UTF-8 bytes of what is predicted: the text after its first token
    words: int  # of the text: what blanks separate


@dataclasses.dataclass
class Totals:
    """Sums over documents."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    words: int = 0
    nats: float = 0.0
    by_segment: dict[int, np.ndarray] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(lambda: np.zeros(2))
    )
    """Sum of losses and number of tokens, by the first segment of each group of segments: 0, 1, 2-3, 4-7, ..."""

    def add(self, document: Scored, losses: np.ndarray, segment_tokens: int) -> None:
        """Counts one document.

        Args:
          document: the document.
          losses: of its tokens, the first one excepted.
          segment_tokens: tokens of a segment.
        """
        self.documents += 1
        self.tokens += len(losses)
        self.bytes += document.bytes
        self.words += document.words
        self.nats += float(losses.sum())
        segment = np.arange(len(losses)) // segment_tokens
        group = np.where(segment > 0, 2 ** np.floor(np.log2(np.maximum(segment, 1))).astype(int), 0)
        for first in np.unique(group):
            here = losses[group == first]
            self.by_segment[int(first)] += (here.sum(), len(here))

    def document(self) -> dict[str, Any]:
        """The numbers of perplexity.json."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "words": self.words,
            "loss": self.nats / self.tokens,
            "perplexity": _exp(self.nats / self.tokens),
            "bits_per_byte": self.nats / math.log(2) / self.bytes if self.bytes else None,
            "byte_perplexity": _exp(self.nats / self.bytes) if self.bytes else None,
            "word_perplexity": _exp(self.nats / self.words) if self.words else None,
            "by_segment": [
                {
                    "first": first,
                    "last": max(2 * first - 1, first),
                    "tokens": int(count),
                    "perplexity": _exp(nats / count),
                }
                for first, (nats, count) in sorted(self.by_segment.items())
            ],
        }


def _exp(loss: float) -> float | None:
    """e^loss; None where that is no finite number, which JSON cannot hold."""
    return math.exp(loss) if loss < 700 else None


def text_documents(path: str, field: str, tokenizer: Tokenizer) -> Iterator[Scored]:
    """The documents of text files; those without a token are left out.

    Args:
      path: a file, a folder or a pattern, see `read_documents`.
      field: name under which a row has its text.
      tokenizer: makes their tokens.
    Raises:
      UserError: nothing there, or a file or text that cannot be read.
    """
    for text, where in read_documents(path, field):
        tokens = token_array(tokenizer, text, where)
        if len(tokens):
            yield _scored(tokens, text, tokenizer)


def token_documents(documents: Iterable[np.ndarray], tokenizer: Tokenizer) -> Iterator[Scored]:
    """Tokenised documents; their text is decoded to count bytes and words."""
    for tokens in documents:
        yield _scored(tokens, tokenizer.decode(tokens.tolist()), tokenizer)


def _scored(tokens: np.ndarray, text: str, tokenizer: Tokenizer) -> Scored:
    first = len(tokenizer.decode(tokens[:1].tolist()).encode(errors="replace"))
    ended = np.append(tokens.astype(np.int32), np.int32(tokenizer.eos_id))
    return Scored(ended, max(len(text.encode(errors="replace")) - first, 0), len(text.split()))


def measure(answerer: RunAnswerer, documents: Iterator[Scored], batch_rows: int) -> Totals:
    """Reads all documents, several at a time, each from a new state.

    Every token is predicted from those before it; the first one of a document is given, and the token that ends a
    document is predicted as in training.

    Args:
      answerer: the run.
      documents: read as needed.
      batch_rows: documents of a batch.
    """
    totals, segment_tokens = Totals(), answerer.run.model.config.segment_tokens
    while buffered := list(itertools.islice(documents, BUFFERED_BATCHES * batch_rows)):
        for batch in even_batches([len(document.tokens) for document in buffered], batch_rows):
            chosen = [buffered[index] for index in batch]
            losses = answerer.losses([document.tokens for document in chosen], rows=batch_rows)
            for document, loss in zip(chosen, losses, strict=True):
                totals.add(document, loss, segment_tokens)
    return totals


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity(Suite):
    """Perplexity of held-out text, per token, byte and word. Writes perplexity.json and .md."""

    kind: ClassVar[str] = "perplexity"

    workdir: str
    """Workdir of the run, a folder or a bucket."""
    text: str | None = None
    """Text to read: a file, a folder or a glob pattern; default: the documents that the run held out."""
    field: str = "text"
    """Name under which a row of a .jsonl, .json or .parquet file has its text."""
    documents: int | None = None
    """Maximum number of documents; default: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.documents is not None:
            self.check_positive("documents")

    def evaluated(self) -> tuple[str, ...]:
        return (self.workdir,)

    def plan(self, answerers: Sequence[RunAnswerer]) -> Evaluation:
        (answerer,) = answerers
        documents = self.read(answerer)
        first = next(documents, None)
        if first is None:
            raise UserError(f"perplexity: {self.data(answerer)} has no text", status=1)
        chosen = itertools.islice(itertools.chain([first], documents), self.documents)
        return functools.partial(self._evaluate, answerer, chosen)

    def read(self, answerer: RunAnswerer) -> Iterator[Scored]:
        """The documents, read as they are needed."""
        run = answerer.run
        if self.text is not None:
            return text_documents(self.text, self.field, run.tokenizer)
        data = run.config.data
        if not isinstance(data.source, DocumentFields):
            raise UserError(
                f"perplexity: {run.config.name!r} was trained on data.source.kind={data.source.kind!r}, which has no "
                "text documents; name a text with --text"
            )
        source = data.source.build(run.tokenizer, run.config.model.segment_tokens, data.seed)
        assert isinstance(source, DocumentSource)
        return token_documents(source.held_out_documents(), run.tokenizer)

    def data(self, answerer: RunAnswerer) -> str:
        """Where the text comes from, in words."""
        return self.text if self.text is not None else f"held-out documents of {answerer.run.config.name}"

    def _evaluate(self, answerer: RunAnswerer, documents: Iterator[Scored], output: Output) -> Mapping[str, bytes]:
        run = answerer.run
        numbers = measure(answerer, documents, self.batch_rows).document()
        document = {
            "suite": "perplexity",
            "preset": run.config.name,
            "step": int(run.step),
            "segment_tokens": run.model.config.segment_tokens,
            "data": self.data(answerer),
            **numbers,
        }
        text = f"# Perplexity: {run.config.name}, step {run.step}\n\nData: {document['data']}.\n\n{_markdown(numbers)}"
        output.show(text)
        return {"perplexity.json": report.to_json(document), "perplexity.md": text.encode()}


def _markdown(numbers: Mapping[str, Any]) -> str:
    """The numbers as two tables."""
    shown = {
        "documents": f"{numbers['documents']:,}",
        "tokens": f"{numbers['tokens']:,}",
        "bytes": f"{numbers['bytes']:,}",
        "words": f"{numbers['words']:,}",
        "loss per token (nats)": f"{numbers['loss']:.4f}",
        "perplexity per token": _number(numbers["perplexity"]),
        "bits per byte": _number(numbers["bits_per_byte"]),
        "perplexity per byte": _number(numbers["byte_perplexity"]),
        "perplexity per word": _number(numbers["word_perplexity"]),
    }
    lines = ["| measure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in shown.items())]
    lines += ["", "By position in the document:", "", "| segments | tokens | perplexity |", "|---|---|---|"]
    for row in numbers["by_segment"]:
        span = f"{row['first']}" if row["first"] == row["last"] else f"{row['first']}-{row['last']}"
        lines.append(f"| {span} | {row['tokens']:,} | {_number(row['perplexity'])} |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}" if value >= 1000 else f"{value:.4f}"
