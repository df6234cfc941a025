"""The perplexity suite: how well a run predicts held-out text, read document by document as a stream."""

import collections
import dataclasses
import functools
import hashlib
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
from lm2_jax.evaluation.answers import AnswerLog, identity_of
from lm2_jax.evaluation.suite import Evaluation, Output, Suite

BUFFERED_BATCHES = 8  # batches that are sorted by length together, so that their rows end at about the same token


class Scored(NamedTuple):
    """A text as the model reads it."""

    tokens: np.ndarray  # with the token that ends a document
    bytes: int  # UTF-8 bytes of what is predicted: the text after its first token
    words: int  # of the text: what blanks separate


class Totals:
    """Sums over the scores of documents, see `score`."""

    def __init__(self) -> None:
        self.documents = 0
        self._sums: dict[str, float] = dict.fromkeys(("tokens", "bytes", "words", "nats"), 0)
        self._by_segment: dict[int, np.ndarray] = collections.defaultdict(lambda: np.zeros(2))

    def add(self, scores: Mapping[str, Any]) -> None:
        """Counts one document."""
        self.documents += 1
        for name in self._sums:
            self._sums[name] += scores[name]
        for first, nats, count in scores["by_segment"]:
            self._by_segment[first] += (nats, count)

    def document(self) -> dict[str, Any]:
        """The numbers of perplexity.json."""
        tokens, size, words, nats = (self._sums[name] for name in ("tokens", "bytes", "words", "nats"))
        return {
            "documents": self.documents,
            "tokens": tokens,
            "bytes": size,
            "words": words,
            "loss": nats / tokens,
            "perplexity": _exp(nats / tokens),
            "bits_per_byte": nats / math.log(2) / size if size else None,
            "byte_perplexity": _exp(nats / size) if size else None,
            "word_perplexity": _exp(nats / words) if words else None,
            "by_segment": [
                {
                    "first": first,
                    "last": max(2 * first - 1, first),
                    "tokens": int(count),
                    "perplexity": _exp(nats / count),
                }
                for first, (nats, count) in sorted(self._by_segment.items())
            ],
        }


def score(document: Scored, losses: np.ndarray, segment_tokens: int) -> dict[str, Any]:
    """The scores of one document, a line of the log.

    Args:
      document: the document.
      losses: of its tokens, the first one excepted.
      segment_tokens: tokens of a segment.
    Returns:
      Its counts, the sum of its losses, and by groups of segments (0, 1, 2-3, 4-7, ...) the first segment, the sum of
      the losses and the number of tokens.
    """
    segment = np.arange(len(losses)) // segment_tokens
    group = np.where(segment > 0, 2 ** np.floor(np.log2(np.maximum(segment, 1))).astype(int), 0)
    return {
        "tokens": len(losses),
        "bytes": document.bytes,
        "words": document.words,
        "nats": float(losses.sum()),
        "by_segment": [
            [int(first), float(losses[group == first].sum()), int((group == first).sum())] for first in np.unique(group)
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


def measure(
    answerer: RunAnswerer, documents: Iterator[Scored], batch_rows: int, log: AnswerLog
) -> tuple[Totals, list[str]]:
    """Reads all documents that are not in the log, several at a time, each from a new state.

    Every token is predicted from those before it; the first one of a document is given, and the token that ends a
    document is predicted as in training.

    Args:
      answerer: the run.
      documents: read as needed.
      batch_rows: documents of a batch.
      log: keeps the scores of each document.
    Returns:
      The sums, and the ids of the scores in the log.
    """
    totals, all_ids, segment_tokens = Totals(), [], answerer.run.model.config.segment_tokens
    while buffered := list(itertools.islice(documents, BUFFERED_BATCHES * batch_rows)):
        ids = [
            log.id(number=len(all_ids) + index, tokens=hashlib.sha256(document.tokens.tobytes()).hexdigest())
            for index, document in enumerate(buffered)
        ]
        for batch in even_batches([len(document.tokens) for document in buffered], batch_rows):
            if all(ids[index] in log for index in batch):
                continue
            losses = answerer.losses([buffered[index].tokens for index in batch], rows=batch_rows)
            scores = {
                ids[index]: score(buffered[index], loss, segment_tokens)
                for index, loss in zip(batch, losses, strict=True)
                if ids[index] not in log
            }
            log.append(scores)
        for id in ids:
            totals.add(log[id])
        all_ids += ids
    return totals, all_ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity(Suite):
    """Perplexity of held-out text, per token, byte and word. Writes perplexity.json, .md and perplexity.jsonl.

    The scores of each document are in perplexity.jsonl as soon as it is read. The same command resumes.
    """

    kind: ClassVar[str] = "perplexity"

    workdir: str
    """Workdir of the run, a folder or a bucket."""
    text: str | None = None
    """Text to read: a file, a folder or a glob pattern; default: the documents that the run held out."""
    field: str = "text"
    """Name under which a row of a .jsonl, .json or .parquet file has its text."""
    documents: int | None = None
    """Maximum number of documents; default: all."""
    resume: bool = True
    """Whether scores that an earlier call left in perplexity.jsonl are used; --no-resume reads all documents again."""

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
        log = AnswerLog(output.folder / "perplexity.jsonl", identity_of(run), self.resume)
        totals, ids = measure(answerer, documents, self.batch_rows, log)
        numbers = totals.document()
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
        return {
            "perplexity.json": report.to_json(document),
            "perplexity.md": text.encode(),
            "perplexity.jsonl": log.final(ids),
        }


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
