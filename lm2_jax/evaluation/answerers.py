"""Ways to put a prompt to a run: as it is, or shortened first. `--answerer KIND` of a suite chooses one."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

from lm2_jax.config_file import to_dict
from lm2_jax.evaluation.answerer import Answer, Answerer, Prompt
from lm2_jax.registry import Family


@dataclasses.dataclass(frozen=True)
class AnswererConfig(Family):
    """Base of the ways in which a run is asked."""

    def build(self, run: Answerer) -> Answerer:
        """What answers prompts with a run, through the same engine as the run alone.

        Raises:
          UserError: a package or a file is missing, or an option does not fit the run.
        """
        raise NotImplementedError

    def label(self, model: str) -> str:
        """The name in tables of a model that is asked in this way."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What answers depend on besides the run and the question: part of each answer's id in an answer log."""
        return {"answerer": to_dict(self)}


@dataclasses.dataclass(frozen=True)
class Direct(AnswererConfig):
    """The run reads the prompt as it is."""

    kind: ClassVar[str] = "direct"

    def build(self, run: Answerer) -> Answerer:
        return run

    def label(self, model: str) -> str:
        return model

    def identity(self) -> dict[str, Any]:
        return {}


class ShorteningAnswerer:
    """An answerer that gives another one shorter prompts. Answers are returned with the original prompts.

    Args:
      inner: answers the shorter prompts.
      shorten: the shorter prompts of some prompts, which are processed together; its second argument is `rows`.
      together: prompts in one call of `shorten`, which are taken as there is room; None: for a `shorten` that uses the
        devices itself. It gets `rows` prompts, and these are answered before the next are taken.
    """

    def __init__(
        self, inner: Answerer, shorten: Callable[[Sequence[Prompt], int], list[Prompt]], together: int | None = None
    ):
        self._inner, self._shorten, self._together = inner, shorten, together

    def answers(self, prompts: Iterable[Prompt], max_new_tokens: int, rows: int) -> Iterator[Answer]:
        """See `Answerer.answers`."""
        waiting: dict[int, Prompt] = {}

        def shorter(numbered: Iterable[tuple[int, Prompt]], size: int) -> Iterator[Prompt]:
            for batch in _batches(numbered, size):
                waiting.update(batch)
                yield from self._shorten([prompt for _, prompt in batch], rows)

        def answered(shortened: Iterable[Prompt], first: int) -> Iterator[Answer]:
            for answer in self._inner.answers(shortened, max_new_tokens, rows):
                number = first + answer.number
                yield Answer(number, waiting.pop(number), answer.text)

        if self._together is not None:
            yield from answered(shorter(enumerate(prompts), self._together), 0)
            return
        for batch in _batches(enumerate(prompts), rows):
            yield from answered(list(shorter(batch, rows)), batch[0][0])

    def loglikelihood(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        """See `Answerer.loglikelihood`."""
        shorter = self._shorten([prompt for prompt, _ in pairs], max(1, len(pairs)))
        return self._inner.loglikelihood([(prompt, text) for prompt, (_, text) in zip(shorter, pairs, strict=True)])


def _batches(items: Iterable[tuple[int, Prompt]], size: int) -> Iterator[list[tuple[int, Prompt]]]:
    batch: list[tuple[int, Prompt]] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
