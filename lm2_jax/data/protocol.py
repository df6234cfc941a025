"""BABILong samples as they are published: facts of bAbI, in order, between sentences of a book.

The protocol (booydar/babilong; arXiv:2406.10149): the background has as many tokens as the sample should have, minus
those of the facts; its last sentence is cut to fit exactly. The place of each fact among the background sentences is
drawn with replacement, and the places are sorted: the order of the facts is kept, and facts may be adjacent. Question
and answer are not counted.
"""

import logging
from collections.abc import Iterator
from typing import NamedTuple

from lm2_jax.data.babi import TASKS, WORLD_TASKS, Sample, read_samples
from lm2_jax.data.background import open_background
from lm2_jax.data.base import Tokenizer
from lm2_jax.data.philox import Draws
from lm2_jax.data.text_tokens import Encoder, noise
from lm2_jax.data.worlds import simulate_sample
from lm2_jax.errors import UserError

MIN_SENTENCE_TOKENS = 10  # of background sentences, as published
_SET = 3  # stream of draws

_log = logging.getLogger(__name__)


class Placed(NamedTuple):
    """A sample as text and as tokens."""

    text: str
    tokens: list[int]
    question: str
    target: str
    latest: int  # position in `tokens` of the last token of the latest supporting fact

    def row(self) -> dict[str, str]:
        """The sample in the layout of the published data set."""
        return {"input": self.text, "question": self.question, "target": self.target}


def facts_tokens(sample: Sample, encode: Encoder) -> int:
    """Tokens of the facts of a sample."""
    return sum(len(encode(fact)) for fact in sample.facts)


def babilong_sample(
    sample: Sample, background: Iterator[tuple[str, list[int]]], encode: Encoder, total_tokens: int, draws: Draws
) -> Placed:
    """Scatters the facts of a sample over background text.

    Args:
      sample: facts, question and answer.
      background: sentences with their tokens, see `text_tokens.noise`.
      encode: the encoder.
      total_tokens: tokens of facts and background together. Where the facts alone have as many, there is no
        background; 0 asks for the facts only.
      draws: chooses the places.
    Returns:
      The sample.
    """
    budget = total_tokens - facts_tokens(sample, encode)
    sentences: list[tuple[str, list[int]]] = []
    while budget > 0:
        sentence, ids = next(background)
        if len(ids) > budget:
            sentence, ids = encode.cut(ids, budget), ids[:budget]
        sentences.append((sentence, ids))
        budget -= len(ids)
    places = sorted(draws.below(len(sentences) + 1) for _ in sample.facts)
    texts: list[str] = []
    tokens: list[int] = []
    latest = done = 0
    for index, (fact, place) in enumerate(zip(sample.facts, places, strict=True)):
        for sentence, ids in sentences[done:place]:
            texts.append(sentence)
            tokens += ids
        done = place
        texts.append(fact)
        tokens += encode(fact)
        if index in sample.support:
            latest = len(tokens) - 1
    for sentence, ids in sentences[done:]:
        texts.append(sentence)
        tokens += ids
    return Placed(" ".join(texts), tokens, sample.question, sample.answer, latest)


def within_limit(sample: Sample, max_facts: int | None) -> bool:
    """Whether a sample passes the published filter, which counts the question as one more fact."""
    return max_facts is None or len(sample.facts) + 1 <= max_facts


def limit_facts(samples: list[Sample], max_facts: int | None, task: str) -> list[Sample]:
    """The samples that pass the filter; how many are dropped is logged, for it changes the task."""
    if max_facts is None:
        return samples
    kept = [sample for sample in samples if within_limit(sample, max_facts)]
    if not kept:
        raise UserError(
            f"max_facts={max_facts}: all {len(samples)} samples of {task} have more facts (with the question), "
            f"the smallest {1 + min(len(sample.facts) for sample in samples)}; raise max_facts"
        )
    if len(kept) < len(samples):
        _log.info(
            "%s: %d of %d samples dropped by max_facts=%d", task, len(samples) - len(kept), len(samples), max_facts
        )
    return kept


def build_babilong_set(
    task: str,
    length_tokens: int,
    samples: int,
    tokenizer: Tokenizer,
    *,
    babi_dir: str | None = None,
    books_dir: str | None = None,
    split: str = "test",
    max_facts: int | None = None,
    seed: int = 0,
) -> list[dict[str, str]]:
    """A BABILong set in the published layout, made here.

    Args:
      task: "qa1" to "qa20"; without `babi_dir` to "qa5".
      length_tokens: tokens of each input; 0: the facts only, no background.
      samples: how many.
      tokenizer: counts the tokens.
      babi_dir: folder of real bAbI files; None: the simulator.
      books_dir: folder of .txt books; None: generated prose. The part is read that training never reads.
      split: "test" or "train" of the bAbI files.
      max_facts: samples with more facts are dropped, where the question counts as a fact, as published.
      seed: another seed gives another set.
    Returns:
      Rows {"input": text, "question": question, "target": answer}; the same ones for the same arguments.
    Raises:
      UserError: for a missing folder or file, an unknown task, or more samples than there are.
    """
    known = WORLD_TASKS if babi_dir is None else TASKS
    if task not in known:
        raise UserError(f"task {task!r} is not among {list(known)}; tasks beyond qa5 need real files (babi_dir)")
    key = (seed, _SET, TASKS.index(task), length_tokens)
    draws = Draws(*key)
    if babi_dir is None:
        chosen = _simulated(task, samples, max_facts, seed)
    else:
        found = limit_facts(read_samples(babi_dir, task, split), max_facts, task)
        if samples > len(found):
            raise UserError(
                f"samples={samples}: {babi_dir!r} has {len(found)} {split} samples of {task}"
                f"{'' if max_facts is None else f' with at most {max_facts} facts'}; ask for fewer"
            )
        # The same questions at every length, so that lengths can be compared.
        chosen = Draws(seed, _SET, TASKS.index(task)).subset(found, samples)
    encode = Encoder(tokenizer)
    background = open_background(books_dir)
    rows = []
    for sample in chosen:
        sentences = noise(background, encode, draws, True, (MIN_SENTENCE_TOKENS, None))
        rows.append(babilong_sample(sample, sentences, encode, length_tokens, draws).row())
    return rows


def _simulated(task: str, samples: int, max_facts: int | None, seed: int) -> list[Sample]:
    """Simulated samples; their draws are used by no training row."""
    chosen: list[Sample] = []
    tries = 0
    while len(chosen) < samples:
        sample = simulate_sample(task, Draws(seed, _SET, TASKS.index(task), 0, tries))
        tries += 1
        if within_limit(sample, max_facts):
            chosen.append(sample)
        elif tries > 1000 * samples:
            raise UserError(f"max_facts={max_facts}: hardly any sample of {task} has so few facts; raise max_facts")
    if tries > samples:
        _log.info("%s: %d of %d samples dropped by max_facts=%s", task, tries - samples, tries, max_facts)
    return chosen
