"""`make demo`: a model of 0.2 million parameters reads a long text once, keeps its memory in files, and answers.

The text is synthetic: generated prose in which four persons move. Questions ask for the place of a person.
"""

import itertools
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lm2_jax.arguments import ArgumentParser
from lm2_jax.errors import UserError
from lm2_jax.folders import prepare_folder

if TYPE_CHECKING:
    from lm2_jax.demo.book import Part
    from lm2_jax.inference.snapshot import MemorySnapshot
    from lm2_jax.runs import Run

PARTS, QUESTIONS = 5, 10
EVERY = 80  # tokens of prose between two moves, on average
SEED = 2502_06049
BINS = (0, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # borders of groups by tokens since the statement
LEAST_ASKED = 20  # questions of a group that is shown
_MEASURED_TOKENS = 400  # between two points where the second text is asked about all persons


class Asked(NamedTuple):
    """A question and what was answered."""

    part: int
    person: str
    place: str
    tokens_ago: int
    answers: dict[str, str]  # by model
    seconds: float  # of the model with memory: loading the file, reading the question, answering


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the text, reads it, asks, and shows what was answered."""
    parser = ArgumentParser(prog="lm2 demo", description=__doc__)
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="folder of all files (%(default)s)")
    parser.add_argument("--tokens", type=int, default=100_000, metavar="N", help="length of the text (%(default)s)")
    options = parser.parse_args(arguments)
    if options.tokens < 1000:
        raise UserError(f"--tokens {options.tokens}: expected at least 1000, so that each part has facts")
    out = pathlib.Path(prepare_folder(options.out, "--out"))
    from lm2_jax.demo.models import MODELS, load_model

    runs = {name: load_model(name) for name in MODELS}
    parts = _write_book(runs["lm2"], out, options.tokens)
    _read_book(runs, parts, out)
    asked = _ask(runs, parts, out)
    _show(asked)
    counts = _by_distance(runs, options.tokens)
    _write(asked, counts, _show_distance(counts, options.tokens), out)
    memory = _memory_path(out, "lm2", PARTS)
    print(f"What a memory file holds: {pathlib.Path(sys.executable)} -m lm2_jax.memory_file inspect {memory}")
    _write_report(runs["lm2"], out / f"part_{PARTS}.txt", asked[-1].person, out / "report")


def _write_book(run: "Run", out: pathlib.Path, tokens: int) -> "list[Part]":
    from lm2_jax.data.text_tokens import Encoder
    from lm2_jax.demo.book import write_parts

    parts = list(itertools.islice(write_parts(Encoder(run.tokenizer), tokens // PARTS, EVERY, SEED), PARTS))
    for number, part in enumerate(parts, start=1):
        (out / f"part_{number}.txt").write_text(part.text)
    total, moves = sum(part.tokens for part in parts), sum(part.moves for part in parts)
    words = sum(len(part.text.split()) for part in parts)
    print(
        f"A synthetic text of {total:,} tokens ({words:,} words) in {PARTS} parts: generated prose with {moves:,} "
        f'facts in it,\nof the form "Mary moved to the office." No question and no answer is in the text.'
    )
    return parts


def _read_book(runs: "dict[str, Run]", parts: "list[Part]", out: pathlib.Path) -> None:
    """Each model reads all parts once, and keeps its memory after each of them."""
    from lm2_jax.demo.models import MODELS
    from lm2_jax.inference.reading import TextFile, read_files
    from lm2_jax.inference.snapshot import empty_memory

    for name, run in runs.items():
        memory, began = empty_memory(run), time.monotonic()
        for number in range(1, len(parts) + 1):
            memory = read_files(memory, [TextFile.open(out / f"part_{number}.txt")])
            memory.save(_memory_path(out, name, number))
        seconds = time.monotonic() - began
        size = _memory_path(out, name, len(parts)).stat().st_size
        print(
            f"{MODELS[name]}: read once in {seconds:.1f} s, {memory.tokens_read / seconds:,.0f} tokens/s; "
            f"{len(parts)} memory files of {size / 1024:.0f} KiB"
        )


def _memory_path(out: pathlib.Path, name: str, part: int) -> pathlib.Path:
    return out / f"{name}_part_{part}.memory"


def _ask(runs: "dict[str, Run]", parts: "list[Part]", out: pathlib.Path) -> list[Asked]:
    """Ten questions, two about the end of each part; memories come from their files."""
    from lm2_jax.data.philox import Draws
    from lm2_jax.demo.book import PERSONS
    from lm2_jax.memory_file import load_memory

    draws, asked = Draws(SEED, 1), []
    for name, run in runs.items():  # the first answer compiles the programs
        answer(run, load_memory(_memory_path(out, name, 1), run), PERSONS[:1])
    for number, part in enumerate(parts, start=1):
        for person in draws.subset(PERSONS, QUESTIONS // PARTS):
            answers, seconds = {}, 0.0
            for name, run in runs.items():
                began = time.monotonic()
                answers[name] = answer(run, load_memory(_memory_path(out, name, number), run), [person])[0]
                seconds = seconds or time.monotonic() - began
            asked.append(Asked(number, person, *part.known[person], answers, seconds))
    return asked


def answer(run: "Run", memory: "MemorySnapshot", persons: Sequence[str]) -> list[str]:
    """Where each person is, as far as a model remembers."""
    from lm2_jax.data.text_tokens import Encoder
    from lm2_jax.demo.book import PERSONS, question
    from lm2_jax.inference.engine import Engine, Request

    encode, found = Encoder(run.tokenizer), [""] * len(persons)
    requests = [
        Request(np.array(encode.question(question(person)), np.int32), index, max_new_tokens=1)
        for index, person in enumerate(persons)
    ]
    # Always as many rows, so that the same compiled programs answer one question and four.
    for piece in Engine(run, memory, len(PERSONS)).generate(requests):
        found[piece.index] += piece.text
    return [text.strip() for text in found]


def _show(asked: Sequence[Asked]) -> None:
    """Prints the questions and the answers."""
    from lm2_jax.demo.book import question
    from lm2_jax.demo.models import MODELS

    print("\nafter part  question            stated            answer of LM2         baseline              seconds")
    for one in asked:
        shown = {name: f"{text} ({'correct' if text == one.place else 'wrong'})" for name, text in one.answers.items()}
        ago = f"{one.tokens_ago:,} tokens ago"
        print(
            f"{one.part:>10}  {question(one.person):<18}  {ago:<18}{shown['lm2']:<22}{shown['none']:<22}"
            f"{one.seconds:.2f}"
        )
    right = {name: sum(one.answers[name] == one.place for one in asked) for name in MODELS}
    print("\n" + "; ".join(f"{MODELS[name]}: {count} of {len(asked)} correct" for name, count in right.items()))


def _by_distance(runs: "dict[str, Run]", tokens: int) -> dict[str, np.ndarray]:
    """Another text, asked about all persons again and again: [bins 2] correct answers and questions, by model."""
    from lm2_jax.data.text_tokens import Encoder
    from lm2_jax.demo.book import PERSONS, write_parts

    counts = {name: np.zeros((len(BINS) - 1, 2), int) for name in runs}
    parts = write_parts(Encoder(runs["lm2"].tokenizer), _MEASURED_TOKENS, EVERY, SEED + 1)
    chosen = list(itertools.islice(parts, max(2, tokens // _MEASURED_TOKENS)))
    for name, run in runs.items():
        memory = None
        for part in chosen:
            memory = run.read(part.text, memory)
            for person, text in zip(PERSONS, answer(run, memory, PERSONS), strict=True):
                place, ago = part.known[person]
                group = min(int(np.searchsorted(BINS, ago, "right")), len(BINS) - 1) - 1
                counts[name][group] += (text == place, 1)
    return counts


def _show_distance(counts: dict[str, np.ndarray], tokens: int) -> bytes:
    """Prints accuracy by distance; returns the picture."""
    from lm2_jax.demo.models import MODELS
    from lm2_jax.evaluation import report

    asked = next(iter(counts.values()))[:, 1]
    shown = np.flatnonzero(asked >= LEAST_ASKED).tolist()
    print(f"\nAnother text of {tokens:,} tokens, asked about all persons again and again: accuracy by distance")
    print(f"{'tokens since the fact':<26}" + "".join(f"{_group(int(i)):>12}" for i in shown))
    for name, found in counts.items():
        print(f"{MODELS[name]:<26}" + "".join(f"{100 * found[i, 0] / found[i, 1]:11.0f}%" for i in shown))
    print(f"{'questions':<26}" + "".join(f"{asked[i]:>12,}" for i in shown))
    if len(shown) < np.count_nonzero(asked):
        print(f"(groups of fewer than {LEAST_ASKED} questions are left out; {asked.sum():,} questions in all)")
    middle = np.sqrt(np.maximum(BINS[:-1], 8) * np.array(BINS[1:]))
    curves = {MODELS[name]: report.Curve(middle[shown], *found[shown].T) for name, found in counts.items()}
    return report.accuracy_plot(
        curves,
        report.Marks(chance=100 / 6, chance_name="one of six places"),
        "What is remembered of a long text",
        ("tokens since the fact was stated", "correct answers, %"),
        f"A text of {tokens:,} tokens, read once. Bands are 95% confidence intervals.",
        log_x=True,
    )


def _group(index: int) -> str:
    return f"{BINS[index]:,}-{BINS[index + 1] - 1:,}"


def _write(asked: Sequence[Asked], counts: dict[str, np.ndarray], picture: bytes, out: pathlib.Path) -> None:
    """The picture, and the figures as JSON."""
    from lm2_jax.evaluation import report

    by_distance = {
        name: [{"from_tokens": BINS[i], "correct": int(c), "asked": int(a)} for i, (c, a) in enumerate(found)]
        for name, found in counts.items()
    }
    (out / "demo.png").write_bytes(picture)
    (out / "demo.json").write_bytes(
        report.to_json({"asked": [one._asdict() for one in asked], "by_distance": by_distance})
    )
    print(f"\nPicture: {out / 'demo.png'}; figures: {out / 'demo.json'}; the text and the memory files: {out}")


def _write_report(run: "Run", text: pathlib.Path, person: str, out: pathlib.Path) -> None:
    """The report of `lm2 inspect` about one part alone."""
    from lm2_jax.demo.book import question
    from lm2_jax.inference.reading import TextFile
    from lm2_jax.inspect.program import write_report

    written = write_report(run, TextFile.open(text), question(person), out)
    print(f"Which slots are read and written in {text.name}, read alone: {written}")
