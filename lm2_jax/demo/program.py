"""`make demo`: a model of 0.2 million parameters reads a long text once, keeps its memory in files, and answers.

The text is synthetic: generated prose in which four persons move. Questions ask for the place of a person.
"""

import argparse
import itertools
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lm2_jax.errors import UserError
from lm2_jax.folders import prepare_folder

if TYPE_CHECKING:
    from lm2_jax.demo.book import Part
    from lm2_jax.inference.snapshot import MemorySnapshot
    from lm2_jax.runs import Run

PARTS, QUESTIONS = 5, 10
EVERY = 150  # tokens of prose between two moves, on average
SEED = 2502_06049
BINS = (0, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # tokens since the statement, for the picture
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
    parser = argparse.ArgumentParser(prog="lm2 demo", description=__doc__)
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
    _show(asked, parts)
    counts = _by_distance(runs, options.tokens)
    _finish(runs, asked, counts, parts, out)


def _write_book(run: "Run", out: pathlib.Path, tokens: int) -> "list[Part]":
    from lm2_jax.data.text_tokens import Encoder
    from lm2_jax.demo.book import write_parts

    parts = list(itertools.islice(write_parts(Encoder(run.tokenizer), tokens // PARTS, EVERY, SEED), PARTS))
    for number, part in enumerate(parts, start=1):
        (out / f"part_{number}.txt").write_text(part.text)
    total, moves = sum(part.tokens for part in parts), sum(part.moves for part in parts)
    words = sum(len(part.text.split()) for part in parts)
    print(
        f"A synthetic text of {total:,} tokens ({words:,} words) in {PARTS} parts: generated prose with {moves:,} facts "
        f'in it,\nof the form "Mary moved to the office." No question and no answer is in the text.'
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
    for run in runs.values():  # the first answer of a program compiles it
        answer(run, load_memory(_memory_path(out, "lm2" if run is runs["lm2"] else "none", 1), run), PERSONS[:1])
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
    from lm2_jax.demo.book import question
    from lm2_jax.inference.engine import Engine, Request

    encode, found = Encoder(run.tokenizer), [""] * len(persons)
    requests = [
        Request(np.array(encode.question(question(person)), np.int32), index, max_new_tokens=1)
        for index, person in enumerate(persons)
    ]
    for piece in Engine(run, memory, len(persons)).generate(requests):
        found[piece.index] += piece.text
    return [text.strip() for text in found]


def _show(asked: Sequence[Asked], parts: "list[Part]") -> None:
    from lm2_jax.demo.book import question
    from lm2_jax.demo.models import MODELS

    print("\nafter part  question            stated      answer of LM2         baseline              seconds")
    for one in asked:
        shown = {name: f"{text} {'(correct)' if text == one.place else '(wrong)'}" for name, text in one.answers.items()}
        ago = f"{one.tokens_ago:,} tokens ago"
        print(
            f"{one.part:>10}  {question(one.person):<18}  {ago:<17}{shown['lm2']:<22}{shown['none']:<22}"
            f"{one.seconds:.2f}"
        )
    right = {name: sum(one.answers[name] == one.place for one in asked) for name in MODELS}
    print("\n" + "; ".join(f"{MODELS[name]}: {count} of {len(asked)} correct" for name, count in right.items()))


def _by_distance(runs: "dict[str, Run]", tokens: int) -> dict[str, np.ndarray]:
    """Another text, asked about all persons again and again: [bins 2] correct answers and questions, by model."""
    from lm2_jax.data.text_tokens import Encoder
    from lm2_jax.demo.book import PERSONS, write_parts

    counts = {name: np.zeros((len(BINS), 2), int) for name in runs}
    parts = write_parts(Encoder(runs["lm2"].tokenizer), _MEASURED_TOKENS, EVERY, SEED + 1)
    chosen = list(itertools.islice(parts, max(2, tokens // _MEASURED_TOKENS)))
    for name, run in runs.items():
        memory = None
        for part in chosen:
            memory = run.read(part.text, memory)
            for person, text in zip(PERSONS, answer(run, memory, PERSONS), strict=True):
                place, ago = part.known[person]
                counts[name][np.searchsorted(BINS, ago, "right") - 1] += (text == place, 1)
    return counts


def _finish(
    runs: "dict[str, Run]", asked: Sequence[Asked], counts: dict[str, np.ndarray], parts: "list[Part]", out: pathlib.Path
) -> None:
    """Prints accuracy by distance, writes the picture and the figures, and names all places."""
    from lm2_jax.demo.book import question
    from lm2_jax.demo.models import FOLDER, MODELS
    from lm2_jax.evaluation import report

    asked_bins = np.flatnonzero(next(iter(counts.values()))[:, 1])
    names = [f"{BINS[i]:,}+" for i in asked_bins]
    print("\nA second text of the same length, asked about all persons again and again: accuracy by distance")
    print(f"{'tokens since the fact':<28}" + "".join(f"{name:>9}" for name in names))
    for name, found in counts.items():
        print(f"{MODELS[name]:<28}" + "".join(f"{100 * found[i, 0] / found[i, 1]:8.0f}%" for i in asked_bins))
    print(f"{'questions':<28}" + "".join(f"{next(iter(counts.values()))[i, 1]:>9,}" for i in asked_bins))
    curves = {
        MODELS[name]: report.Curve(np.array(BINS)[asked_bins] + 1, *found[asked_bins].T) for name, found in counts.items()
    }
    picture = report.accuracy_plot(
        curves, report.Marks(chance=100 / 6, chance_name="one of six places"),
        "What is remembered of a long text", ("tokens since the fact was stated (lower end of each group)", "correct, %"),
        f"A text of {sum(part.tokens for part in parts):,} tokens, read once. Bands are 95% confidence intervals.",
        log_x=True,
    )  # fmt: skip
    (out / "demo.png").write_bytes(picture)
    (out / "demo.json").write_bytes(
        report.to_json({
            "asked": [one._asdict() for one in asked],
            "by_distance": {
                name: [{"from_tokens": BINS[i], "correct": int(c), "asked": int(a)} for i, (c, a) in enumerate(found)]
                for name, found in counts.items()
            },
        })
    )  # fmt: skip
    last, person = out / f"part_{len(parts)}.txt", asked[-1].person
    print(f"\nPicture: {out / 'demo.png'}; figures: {out / 'demo.json'}; text and memory files: {out}")
    print(f"Models: {FOLDER} (trained on the same rows, in the same way)")
    python = pathlib.Path(sys.executable)
    print(f"What a memory file holds: {python} -m lm2_jax.memory_file inspect {_memory_path(out, 'lm2', len(parts))}")
    _write_report(runs["lm2"], last, question(person), out / "report")


def _write_report(run: "Run", text: pathlib.Path, asked: str, out: pathlib.Path) -> None:
    """The report of `lm2 inspect` about the last part."""
    from lm2_jax.inference.reading import TextFile
    from lm2_jax.inspect.program import write_report

    print(f"Which slots are read, what was forgotten: {write_report(run, TextFile.open(text), asked, out)}")
