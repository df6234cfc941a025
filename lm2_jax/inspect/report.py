"""The report about one text: what is shown depends on what the model reveals."""

from collections.abc import Sequence

import numpy as np

from lm2_jax.data.text_tokens import Encoder
from lm2_jax.errors import UserError
from lm2_jax.evaluation.answerer import RunAnswerer
from lm2_jax.evaluation.recall import measure, result_files
from lm2_jax.inference.engine import Engine, Request
from lm2_jax.inference.snapshot import MemorySnapshot, empty_memory
from lm2_jax.inspect import pictures
from lm2_jax.inspect.collect import STATE_NORM, Reading, TokenReads, ask
from lm2_jax.inspect.page import Page
from lm2_jax.inspect.sentences import Sentence, rank_sentences, token_texts
from lm2_jax.runs import Run
from lm2_jax.state import state_floats

SENTENCES = 10  # that surprised most
_MARKED = 5  # of them in the picture
_ANSWER_TOKENS = 12
_LIKELY = 5  # next tokens after the question
_LONGEST = 300  # characters of a sentence in a table
_RECALL_SEGMENTS = 16


def make_report(run: Run, reading: Reading, name: str, question: str | None, recall_rows: int) -> Page:
    """The report.

    Args:
      run: the model.
      reading: from `collect.read_text`.
      name: of the text.
      question: about the text, or None.
      recall_rows: held-out rows for accuracy by distance; 0: none.
    """
    page = Page(f"{run.config.name}, step {run.step}: what it kept of {name}")
    _facts(page, run, reading)
    texts = token_texts(run.tokenizer, reading.tokens)
    _reads(page, run, reading, texts)
    if question is not None:
        _question(page, run, reading.memory, question)
    _slots(page, run, reading)
    _gates(page, run, reading)
    _surprise(page, run, reading, texts)
    _forgetting(page, run, reading)
    _recall(page, run, recall_rows)
    return page


def _facts(page: Page, run: Run, reading: Reading) -> None:
    model, memory = run.config.model, reading.memory
    page.table(
        ("", ""),
        (
            ("memory and join", f"{_memory_name(run)}"),
            ("text", f"{len(reading.tokens):,} tokens, {reading.segments:,} segments of {model.segment_tokens}"),
            ("not yet written", f"{memory.position} tokens after the last segment border"),
            ("state", f"{state_floats(memory.state):,} values that cross a segment border"),
        ),
    )


def _memory_name(run: Run) -> str:
    model = run.config.model
    return f"{model.memory.kind}, {model.join.kind}" if model.has_memory else "no memory"


def _missing(page: Page, run: Run, what: str, reason: str) -> None:
    page.paragraph(f"Not shown for this model ({_memory_name(run)}): {what}, because {reason}.", "missing")


def _reads(page: Page, run: Run, reading: Reading, texts: Sequence[str]) -> None:
    T, at = run.config.model.segment_tokens, reading.segment
    page.section(
        "Which slots each token reads",
        f"Segment {at} (from 0), tokens {at * T:,} to {(at + 1) * T - 1:,}. Before the update: the memory that the "
        "tokens read when the segment came. After: the same tokens read the memory that has taken the segment "
        "(as in figures 6 and 7 of the LM2 paper, arXiv:2502.06049). Mean over heads.",
    )
    if not reading.segment_reads.before:
        _missing(page, run, "read weights", "it reveals none: no token reads slots with weights of its own")
        return
    part = texts[at * T : (at + 1) * T]
    png = pictures.token_reads(reading.segment_reads, part, ("before the update", "after the update"))
    _clipped(page, part)
    page.picture(
        "reads", png,
        "Share of each slot (columns) in what each token (rows) reads from the memory. Blocks without slots are left "
        "out.",
    )  # fmt: skip


def _clipped(page: Page, texts: Sequence[str]) -> None:
    if len(texts) > pictures.MOST_TOKENS:
        page.paragraph(f"The last {pictures.MOST_TOKENS} of {len(texts)} tokens are shown.", "note")


def _question(page: Page, run: Run, memory: MemorySnapshot, question: str) -> None:
    page.section("The question", question)
    tokens = np.array(Encoder(run.tokenizer).question(question), np.int32)
    empty = empty_memory(run)
    before, after = ask(empty, tokens), ask(memory, tokens)
    answers = [_answer(run, kept, tokens) for kept in (memory, empty)]
    page.table(("", "answer", "most likely next tokens"), (
        ("after the text", answers[0], _likely(run, after.probabilities)),
        ("without the text", answers[1], _likely(run, before.probabilities)),
    ))  # fmt: skip
    if not after.weights:
        _missing(page, run, "which slots the question reads", "it reveals no read weights")
        return
    texts = token_texts(run.tokenizer, tokens)
    reads = TokenReads(tokens, before.weights, after.weights)
    png = pictures.token_reads(reads, texts, ("before the text", "after the text"))
    _clipped(page, texts)
    page.picture("question", png, "Share of each slot in what each token of the question reads from the memory.")


def _answer(run: Run, memory: MemorySnapshot, tokens: np.ndarray) -> str:
    pieces = Engine(run, memory, 1).generate([Request(tokens, max_new_tokens=_ANSWER_TOKENS)])
    return "".join(piece.text for piece in pieces).strip()


def _likely(run: Run, probabilities: np.ndarray) -> str:
    best = np.argsort(-probabilities, kind="stable")[:_LIKELY]
    return ", ".join(f"{run.tokenizer.decode([int(token)])!r} {probabilities[token]:.0%}" for token in best)


def _slots(page: Page, run: Run, reading: Reading) -> None:
    page.section("Use of the slots along the text")
    T = run.config.model.segment_tokens
    if reading.usage:
        usage = {f"block {block}": values for block, values in reading.usage.items()}
        png = pictures.slots_over_text(usage, T, "share of the reads, mean over the tokens of a segment")
        page.picture("usage", png, "How much each slot was read. A slot that stays dark is not used.")
    else:
        _missing(page, run, "how much each slot is read", "it reveals no read weights")
    if reading.changes:
        png = pictures.slots_over_text(reading.changes, T, "distance that a slot moved in a segment", 1)
        page.picture("writes", png, "What each segment changed: the distance between a slot before and after it.")
    elif any("slot" in axis for axis in _state_axes(run)):
        page.paragraph("The text has one segment, so there is no change between two to show.", "missing")
    else:
        _missing(page, run, "what each slot took", "its state has no slots")


def _state_axes(run: Run) -> set[str]:
    import jax

    axes = jax.tree.leaves(run.model.state_axes())  # the names themselves are the leaves
    return {name for name in axes if name}


def _gates(page: Page, run: Run, reading: Reading) -> None:
    page.section("Gates and other diagnostics along the text")
    metrics = {name: values for name, values in reading.metrics.items() if name != STATE_NORM}
    if not metrics:
        _missing(page, run, "gates", "its forward pass records no diagnostics")
        return
    png = pictures.metrics_over_text(metrics, run.config.model.segment_tokens)
    page.picture(
        "gates", png,
        "What training logs as memory/NAME, here for each segment; a line for each memory that records it. "
        "docs/inspect.md explains the names.",
    )  # fmt: skip


def _surprise(page: Page, run: Run, reading: Reading, texts: Sequence[str]) -> None:
    T, at = run.config.model.segment_tokens, reading.segment
    mean = float(np.nanmean(reading.losses))
    page.section("Surprise along the text", f"Mean loss {mean:.3f} nats per token (perplexity {np.exp(mean):,.1f}).")
    if run.config.loss.text_weight == 0:
        page.paragraph(
            "This run was trained to answer questions alone (loss.text_weight=0). It never learned to predict text, so "
            "its surprise says little.",
            "missing",
        )
    ranked = rank_sentences(texts, reading.losses)[:SENTENCES]
    png = pictures.surprise(reading.losses, T, [sentence.first for sentence in ranked[:_MARKED]])
    page.picture("surprise", png, f"Loss of each segment; red: where the {_MARKED} most surprising sentences begin.")
    page.paragraph("The sentences with the highest mean loss per token:")
    page.table(("loss", "first token", "sentence"), [_row(sentence) for sentence in ranked])
    page.paragraph(f"Tokens of segment {at}, the darker the more surprising:")
    here = slice(at * T, (at + 1) * T)
    page.shaded(texts[here], reading.losses[here])


def _row(sentence: Sentence) -> tuple[float, int, str]:
    text = sentence.text
    return sentence.loss, sentence.first, text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


def _forgetting(page: Page, run: Run, reading: Reading) -> None:
    page.section("What forgetting left")
    if not reading.norms:
        _missing(page, run, "what is left of the state", "nothing but the last tokens crosses a segment border")
        return
    T = run.config.model.segment_tokens
    png = pictures.forgetting(reading.norms, reading.kept_at, reading.similarity, T)
    page.picture(
        "forgetting", png,
        "Above: the norm of the state along the text. Below: the cosine between the state at that place and the state "
        "at the end. A curve that is high from early on means that little of the memory changed since.",
    )  # fmt: skip
    rows = []
    for name, values in reading.norms.items():
        kept = reading.similarity[name]
        middle = kept[len(kept) // 2]
        rows.append((name, float(values[0]), float(values[-1]), float(kept[0]), float(middle)))
    page.table(("state", "norm, first segment", "norm, end", "cosine, first segment", "cosine, middle"), rows)


def _recall(page: Page, run: Run, rows: int) -> None:
    page.section("Accuracy by distance")
    if not rows:
        page.paragraph("Not measured (--recall-rows 0).", "missing")
        return
    segments = max(_RECALL_SEGMENTS, *run.config.data.segments)
    try:
        result = measure(RunAnswerer(run), segments, rows, batch_rows=min(rows, 64))
    except UserError as error:
        page.paragraph(f"Not measured on this run's data: {error}", "missing")
        return
    page.picture(
        "recall", result_files([result])["recall.png"],
        f"Held-out rows of the run's own data, {segments} segments long: correct answers by the number of segments "
        "since the fact was last stated. Distances with fewer than 20 questions are left out.",
    )  # fmt: skip
    correct, asked = int(result.counts.correct.sum()), int(result.counts.asked.sum())
    page.paragraph(f"{correct:,} of {asked:,} answers are correct ({correct / asked:.1%}).")
