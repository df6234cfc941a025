"""Recurrent prompts: a decoder without a memory reads a long context in segments and carries a summary as text."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Annotated, ClassVar

from lm2_jax.data.base import Tokenizer
from lm2_jax.evaluation.answerer import Answerer, Prompt
from lm2_jax.evaluation.answerers import AnswererConfig, ShorteningAnswerer
from lm2_jax.fields import Range


@dataclasses.dataclass(frozen=True)
class RecurrentPrompt(AnswererConfig):
    """A running summary: the run writes one after each segment of the context, and reads it before the next segment.

        s_0 = "",  s_i = generate(s_{i-1} x_i ask),  answer = generate(instruction s_{n-1} x_n question)

    x_1 .. x_n are the segments of the context. Every call of the run begins without a memory: all that crosses from
    segment to segment is text. A context of one segment is read as it is. Summaries are greedy, as answers are.
    """

    kind: ClassVar[str] = "recurrent_prompt"
    segment_tokens: Annotated[int, Range(1, 2**24)] = 256
    """Tokens of the context in one call, in full words; a longer word is a segment of its own."""
    summary_tokens: Annotated[int, Range(1, 2**20)] = 64
    """Maximum length of a summary, in tokens."""
    ask: str = "Summary of the text so far:"
    """Text after a segment that asks for the summary."""
    shows_question: bool = False
    """Whether the question is put before `ask`, so that a summary can keep what it needs."""

    def build(self, run: Answerer) -> Answerer:
        def shorten(prompts: Sequence[Prompt], rows: int) -> list[Prompt]:
            return self._shortened(run, prompts, rows)

        return ShorteningAnswerer(run, shorten)

    def label(self, model: str) -> str:
        question = ", sees the question" if self.shows_question else ""
        return f"recurrent prompt ({self.segment_tokens} + {self.summary_tokens} tokens{question}), {model}"

    def segments(self, tokenizer: Tokenizer, context: str) -> list[str]:
        """A context in pieces of at most `segment_tokens`, with blanks normalised; never empty."""
        pieces: list[list[str]] = [[]]
        used, sizes = 0, dict[str, int]()
        for word in context.split():
            if word not in sizes:
                sizes[word] = len(tokenizer.encode(f" {word}"))
            if pieces[-1] and used + sizes[word] > self.segment_tokens:
                pieces.append([])
                used = 0
            pieces[-1].append(word)
            used += sizes[word]
        return [" ".join(piece) for piece in pieces]

    def _shortened(self, run: Answerer, prompts: Sequence[Prompt], rows: int) -> list[Prompt]:
        """Each prompt with its last segment after the summary of the others, in place of the context."""
        texts = [self.segments(prompt.tokenizer, prompt.context) for prompt in prompts]
        summaries = [""] * len(prompts)
        for step in itertools.count():
            active = [index for index, segments in enumerate(texts) if step < len(segments) - 1]
            if not active:
                break
            asked = [self._request(prompts[index], summaries[index], texts[index][step]) for index in active]
            for answer in run.answers(asked, self.summary_tokens, rows):
                summaries[active[answer.number]] = " ".join(answer.text.split())
        return [
            dataclasses.replace(prompt, context=_joined(summary, segments[-1]))
            for prompt, summary, segments in zip(prompts, summaries, texts, strict=True)
        ]

    def _request(self, prompt: Prompt, summary: str, segment: str) -> Prompt:
        """What makes the run write the next summary."""
        question = prompt.question or "" if self.shows_question else ""
        return Prompt(prompt.tokenizer, f" {_joined(summary, segment, question, self.ask)}")


def _joined(*parts: str) -> str:
    """Texts with one blank between words."""
    return " ".join(" ".join(parts).split())
