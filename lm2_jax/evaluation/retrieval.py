"""Retrieval before reading (RAG): the chunks of a context that fit the question best take the context's place."""

import dataclasses
import hashlib
import importlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from lm2_jax.config_file import to_dict
from lm2_jax.data.background import split_sentences
from lm2_jax.errors import UserError
from lm2_jax.evaluation.answerer import Answerer, Prompt
from lm2_jax.evaluation.answerers import AnswererConfig, ShorteningAnswerer
from lm2_jax.fields import Range
from lm2_jax.registry import Family

Scores = Callable[[str, Sequence[str]], np.ndarray]
"""A question and the chunks of one context -> a score of each chunk; higher fits better."""


@dataclasses.dataclass(frozen=True)
class ChunkScorer(Family):
    """Base of the scores that retrieval ranks chunks by."""

    def open(self) -> Scores:
        """The function that scores the chunks of a context.

        Raises:
          UserError: its package or its files are missing.
        """
        raise NotImplementedError

    def label(self) -> str:
        """The name in tables."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What scores depend on."""
        return to_dict(self)


@dataclasses.dataclass(frozen=True)
class Bm25(ChunkScorer):
    """Okapi BM25 over the words of the chunks of one context, without English stop words (package bm25s)."""

    kind: ClassVar[str] = "bm25"
    k1: Annotated[float, Range(0, 100)] = 1.5
    """How soon further occurrences of a word stop to count."""
    b: Annotated[float, Range(0, 1)] = 0.75
    """How much a longer chunk has to have more of the words."""

    def open(self) -> Scores:
        library = _library("bm25s", "rag")

        def score(question: str, chunks: Sequence[str]) -> np.ndarray:
            words = library.tokenize([*chunks, question], stopwords="en", show_progress=False, return_ids=False)
            *indexed, asked = words
            if not asked or not any(indexed):  # the package refuses both
                return np.zeros(len(chunks))
            index = library.BM25(k1=self.k1, b=self.b)
            index.index(indexed, show_progress=False)
            return np.asarray(index.get_scores(asked), np.float64)

        return score

    def label(self) -> str:
        return "BM25"


@dataclasses.dataclass(frozen=True)
class Embeddings(ChunkScorer):
    """Cosine of the embeddings of question and chunk, by a small static model on this machine (package model2vec)."""

    kind: ClassVar[str] = "embeddings"
    model: str = ""
    """Folder of the model, as model2vec saves it."""

    def open(self) -> Scores:
        folder = self._folder()
        library = _library("model2vec", "embeddings")
        try:
            model = library.StaticModel.from_pretrained(str(folder))
        except Exception as error:  # the package raises those of several formats
            raise UserError(
                f"answerer.scorer.model={self.model!r}: no model that model2vec reads: {type(error).__name__}: "
                f"{str(error)[:200]}",
                status=1,
            ) from error

        def score(question: str, chunks: Sequence[str]) -> np.ndarray:
            vectors = np.asarray(model.encode([*chunks, question], use_multiprocessing=False), np.float64)
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            unit = vectors / np.where(lengths > 0, lengths, 1)
            return unit[:-1] @ unit[-1]

        return score

    def label(self) -> str:
        return f"embeddings of {pathlib.Path(self.model).name}"

    def identity(self) -> dict[str, Any]:
        """The files of the model and not its place."""
        digest = hashlib.sha256()
        for path in sorted(self._folder().iterdir()):
            if path.is_file():
                digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return {"kind": self.kind, "model": digest.hexdigest()}

    def _folder(self) -> pathlib.Path:
        if not self.model:
            raise UserError("answerer.scorer of kind 'embeddings' needs a model: set --answerer.scorer.model FOLDER")
        folder = pathlib.Path(self.model)
        if not folder.is_dir():
            raise UserError(f"answerer.scorer.model={self.model!r}: no such folder")
        return folder


@dataclasses.dataclass(frozen=True)
class Rag(AnswererConfig):
    """Retrieval: the run reads only the chunks that fit the question best, in their order, then the question."""

    kind: ClassVar[str] = "rag"
    top_k: Annotated[int, Range(1, 2**20)] = 5
    """Chunks that are read; a context with fewer is read completely."""
    chunk: Literal["sentences", "words"] = "sentences"
    """What a chunk consists of."""
    chunk_size: Annotated[int, Range(1, 2**20)] = 1
    """Sentences or words of a chunk; the last chunk of a context may have fewer."""
    scorer: ChunkScorer = Bm25()
    """What ranks the chunks."""

    def build(self, run: Answerer) -> Answerer:
        scores = self.scorer.open()

        def shorten(prompts: Sequence[Prompt], rows: int) -> list[Prompt]:
            return [self._shortened(prompt, scores) for prompt in prompts]

        return ShorteningAnswerer(run, shorten, together=1)

    def label(self, model: str) -> str:
        one = self.chunk.removesuffix("s") if self.chunk_size == 1 else f"{self.chunk_size} {self.chunk}"
        return f"RAG ({self.scorer.label()}, {self.top_k} chunks of {'1 ' * (self.chunk_size == 1)}{one}), {model}"

    def identity(self) -> dict[str, Any]:
        return {"answerer": to_dict(self) | {"scorer": self.scorer.identity()}}

    def chunks(self, context: str) -> list[str]:
        """A context in chunks, with blanks normalised."""
        if self.chunk == "words":
            parts = context.split()
        else:
            complete, rest = split_sentences(context)
            parts = [*complete, " ".join(rest.split())] if rest.strip() else complete
        return [" ".join(parts[at : at + self.chunk_size]) for at in range(0, len(parts), self.chunk_size)]

    def select(self, question: str, context: str, scores: Scores) -> list[str]:
        """The `top_k` chunks with the highest scores, in the order of the context; of equal ones the earlier."""
        chunks = self.chunks(context)
        if len(chunks) <= self.top_k:
            return chunks
        best = np.argsort(-scores(question, chunks), kind="stable")[: self.top_k]
        return [chunks[index] for index in sorted(best)]

    def _shortened(self, prompt: Prompt, scores: Scores) -> Prompt:
        if prompt.question is None:
            raise ValueError("retrieval needs prompts with a question")
        return dataclasses.replace(prompt, context=" ".join(self.select(prompt.question, prompt.context, scores)))


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"this retrieval needs the package {name}, which is not installed: pip install {name} (extra [{extra}])"
        ) from error
