"""The BABILong suite: asks a model the questions, judges its answers twice, writes table, JSON and picture."""

import dataclasses
import datetime
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import rich.console
from etils import epath

from lm2_jax import babilong
from lm2_jax.babilong import Sample
from lm2_jax.data.babilong_source import BabilongSource
from lm2_jax.data.base import Tokenizer
from lm2_jax.data.protocol import build_babilong_set
from lm2_jax.data.text_tokens import Encoder
from lm2_jax.errors import UserError
from lm2_jax.evaluation import report
from lm2_jax.evaluation.generate import greedy
from lm2_jax.evaluation.published import read_set, select_files
from lm2_jax.evaluation.suite import Suite
from lm2_jax.folders import prepare_folder

DEFAULT_TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5")  # of a run that was not trained on tasks
DEFAULT_LENGTHS = ("0k", "1k", "2k", "4k")


class QuestionSet(NamedTuple):
    """The samples of one task at one length."""

    task: str
    length: str
    samples: list[Sample]


class SetResult(NamedTuple):
    """How one set went; accuracies are fractions."""

    task: str
    length: str
    accuracy: float  # the official verdict
    accuracy_strict: float
    samples: int
    mean_tokens: float  # of the whole prompt, in the run's tokenizer
    seconds: float


class Answer(NamedTuple):
    """One answer and its verdicts; a line of answers.jsonl."""

    task: str
    length: str
    question: str
    target: str
    output: str
    correct: bool
    correct_strict: bool
    prompt_tokens: int


class Evaluation(NamedTuple):
    """What `evaluate` found."""

    document: dict[str, Any]  # babilong.json
    results: list[SetResult]
    answers: list[Answer]


def evaluate(
    run: Any,
    sets: Iterable[QuestionSet],
    batch_rows: int = 32,
    max_new_tokens: int = 20,
    data: str = "given by the caller",
    on_result: Callable[[SetResult], None] = lambda result: None,
) -> Evaluation:
    """Asks a run all questions of all sets.

    Args:
      run: what `lm2_jax.load_run` gives.
      sets: read one at a time, so a generator keeps only one in memory.
      batch_rows: most prompts read side by side.
      max_new_tokens: most tokens of an answer.
      data: where the sets come from, for the report.
      on_result: called after each set.
    Returns:
      Accuracy by task and length, and every answer.
    """
    results: list[SetResult] = []
    answers: list[Answer] = []
    for questions in sets:
        began = time.monotonic()
        given = ask(run, questions, batch_rows, max_new_tokens)
        result = SetResult(
            task=questions.task,
            length=questions.length,
            accuracy=float(np.mean([answer.correct for answer in given])),
            accuracy_strict=float(np.mean([answer.correct_strict for answer in given])),
            samples=len(given),
            mean_tokens=float(np.mean([answer.prompt_tokens for answer in given])),
            seconds=round(time.monotonic() - began, 3),
        )
        results.append(result)
        answers.extend(given)
        on_result(result)
    document = {
        "suite": "babilong",
        "preset": run.config.name,
        "step": int(run.step),
        "segment_tokens": run.config.model.segment_tokens,
        "max_new_tokens": max_new_tokens,
        "data": data,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "results": [result._asdict() for result in results],
    }
    return Evaluation(document, results, answers)


def ask(run: Any, questions: QuestionSet, batch_rows: int = 32, max_new_tokens: int = 20) -> list[Answer]:
    """The run's answers to one set, in its order."""
    if not questions.samples:
        raise UserError(f"babilong: the set {questions.task} at {questions.length} holds no samples", status=1)
    prompts = [prompt_tokens(run.tokenizer, sample) for sample in questions.samples]
    outputs = greedy(run.model, run.params, run.tokenizer, prompts, max_new_tokens, batch_rows)
    return [
        Answer(
            task=questions.task,
            length=questions.length,
            question=sample.question,
            target=sample.target,
            output=output,
            correct=babilong.is_correct(sample.target, output, sample.question, questions.task),
            correct_strict=babilong.is_correct(sample.target, output, sample.question, questions.task, strict=True),
            prompt_tokens=len(prompt),
        )
        for sample, output, prompt in zip(questions.samples, outputs, prompts, strict=True)
    ]


def prompt_tokens(tokenizer: Tokenizer, sample: Sample) -> list[int]:
    """The prompt of one sample: context, question, and the marker that stands before an answer in training.

    Training text has one blank between words and a blank before each sentence, so line breaks become blanks here.
    """
    context = " ".join(sample.input.split())
    return tokenizer.encode(f" {context}" if context else "") + Encoder(tokenizer).question(sample.question)


def published_sets(
    data_dir: epath.PathLike, tasks: tuple[str, ...] = (), lengths: tuple[str, ...] = (), samples: int = 100
) -> Iterator[QuestionSet]:
    """The first `samples` rows of each file in the published layout; names are checked before the first is read."""
    files = select_files(data_dir, tasks, lengths)
    return (QuestionSet(task, length, read_set(paths)[:samples]) for (task, length), paths in files.items())


def built_sets(
    tokenizer: Tokenizer,
    tasks: tuple[str, ...],
    lengths: tuple[str, ...] = DEFAULT_LENGTHS,
    samples: int = 100,
    *,
    babi_dir: str | None = None,
    books_dir: str | None = None,
    seed: int = 0,
) -> Iterator[QuestionSet]:
    """Sets made here, from text that training never reads; names are checked before the first is made.

    Args:
      tokenizer: counts the tokens of the contexts.
      tasks: `qa1` to `qa20`; without `babi_dir` to `qa5`.
      lengths: see `lm2_jax.babilong.length_tokens`.
      samples: questions of each set; the same ones at every length.
      babi_dir: bAbI's files, of which the test questions are asked; None: the simulator.
      books_dir: books for the background; None: generated prose.
      seed: another seed gives other sets.
    """
    for task in tasks:
        babilong.labels(task)
    wanted = [(task, length, babilong.length_tokens(length)) for length in lengths for task in tasks]
    for name, folder in {"babi_dir": babi_dir, "books_dir": books_dir}.items():
        if folder is not None and not epath.Path(folder).is_dir():
            raise UserError(f"{name}={folder!r}: no such folder")

    def build(task: str, tokens: int) -> list[Sample]:
        rows = build_babilong_set(task, tokens, samples, tokenizer, babi_dir=babi_dir, books_dir=books_dir, seed=seed)
        return [Sample(**row) for row in rows]

    return (QuestionSet(task, length, build(task, tokens)) for task, length, tokens in wanted)


def write_report(evaluation: Evaluation, out: epath.PathLike) -> list[epath.Path]:
    """Writes babilong.json, babilong.md, babilong.png and answers.jsonl below `out`, all or none.

    Returns:
      Their paths.
    """
    official, strict = _cells(evaluation)
    document = evaluation.document
    who = f"{document['preset']}, step {document['step']}"
    lengths = {result.length: result for result in evaluation.results}
    tokens = ", ".join(f"{length} {result.mean_tokens:.0f}" for length, result in lengths.items())
    counts = sorted({result.samples for result in evaluation.results})
    asked = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    note = f"{asked} questions a cell; greedy; segments of {document['segment_tokens']} tokens"
    text = (
        f"# BABILong: {who}\n\nAccuracy in per cent, official verdict / strict verdict; {note}.\n"
        f"Data: {document['data']}.\n\n"
        f"{report.markdown_table(official, strict, 'task')}\nPrompt tokens by length (last task): {tokens}.\n"
    )
    picture = report.heat_map(official, strict, f"BABILong: {who}", f"accuracy in per cent; {note}", ("task", "length"))
    return report.write_files(
        prepare_folder(out),
        {
            "babilong.json": report.to_json(document),
            "babilong.md": text.encode(),
            "babilong.png": picture,
            "answers.jsonl": report.to_jsonl(answer._asdict() for answer in evaluation.answers),
        },
    )


def _cells(evaluation: Evaluation) -> tuple[report.Cells, report.Cells]:
    """Per cent by (task, length), by the official and by the strict verdict."""
    ordered = sorted(evaluation.results, key=lambda result: babilong.length_tokens(result.length))
    ordered.sort(key=lambda result: babilong.TASKS.index(result.task))
    official = {(result.task, result.length): 100 * result.accuracy for result in ordered}
    return official, {(result.task, result.length): 100 * result.accuracy_strict for result in ordered}


def print_tables(evaluation: Evaluation, console: rich.console.Console) -> None:
    """The results by both verdicts."""
    official, strict = _cells(evaluation)
    who = f"{evaluation.document['preset']}, step {evaluation.document['step']}"
    console.print(f"\nBABILong, official verdict ({who})")
    console.print(report.console_table(official, "task"))
    console.print("Strict verdict: labels as whole words")
    console.print(report.console_table(strict, "task"))


@dataclasses.dataclass(frozen=True)
class Babilong(Suite):
    """BABILong: questions about facts hidden in long text. Writes babilong.json, .md, .png and answers.jsonl."""

    kind: ClassVar[str] = "babilong"

    workdir: str
    """Workdir of the run, a folder or a bucket."""
    tasks: tuple[str, ...] = ()
    """Tasks, qa1 to qa20; default: all in data-dir, or else those of the run's training (qa1 to qa5)."""
    lengths: tuple[str, ...] = ()
    """Lengths such as 0k 4k 1M; default: all in data-dir, or else 0k 1k 2k 4k."""
    samples: int = 100
    """Questions of each task and length; a published file with fewer rows gives all it has."""
    data_dir: str | None = None
    """Sets in the published layout, DATA_DIR/<length>/<task>.json (.jsonl, .parquet); default: sets are built."""
    babi_dir: str | None = None
    """Folder of bAbI's files, whose test questions sets are built from; default: the simulator (qa1 to qa5)."""
    books_dir: str | None = None
    """Folder of books (.txt), the background of sets that are built; default: generated prose."""
    out: str | None = None
    """Where the report goes; default: WORKDIR/eval."""
    batch_rows: int = 32
    """Most prompts read side by side."""
    max_new_tokens: int = 20
    """Most tokens of an answer."""
    seed: int = 0
    """Chooses the questions and the background of sets that are built."""

    def __post_init__(self) -> None:
        for name in ("samples", "batch_rows", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.data_dir is not None and (self.babi_dir or self.books_dir):
            raise ValueError("data_dir holds finished sets: babi_dir and books_dir are for sets that are built")

    def sets(self, run: Any) -> Iterator[QuestionSet]:
        """The sets to ask; names and folders are checked at once, files read and sets built one by one."""
        if self.data_dir is not None:
            return published_sets(self.data_dir, self.tasks, self.lengths, self.samples)
        source = run.config.data.source
        trained = source.tasks if isinstance(source, BabilongSource) else DEFAULT_TASKS
        return built_sets(
            run.tokenizer,
            self.tasks or trained,
            self.lengths or DEFAULT_LENGTHS,
            self.samples,
            babi_dir=self.babi_dir,
            books_dir=self.books_dir,
            seed=self.seed,
        )

    @property
    def data(self) -> str:
        """Where the sets come from, in words."""
        if self.data_dir is not None:
            return f"files of {self.data_dir}"
        facts = "simulator" if self.babi_dir is None else f"test questions of {self.babi_dir}"
        background = "generated prose" if self.books_dir is None else f"books of {self.books_dir}"
        return f"built: {facts}, {background}, seed {self.seed}"

    def main(self) -> None:
        """Evaluates the run of the workdir and writes the report."""
        import lm2_jax

        run = lm2_jax.load_run(self.workdir)
        sets = self.sets(run)
        # A mistyped workdir or set has failed by now, so no folder is made for it.
        out = prepare_folder(epath.Path(self.workdir) / "eval" if self.out is None else self.out)
        console = rich.console.Console(highlight=False)

        def show(result: SetResult) -> None:
            official, strict = 100 * result.accuracy, 100 * result.accuracy_strict
            console.print(
                f"{result.task} {result.length}: {official:.1f} (strict {strict:.1f}), "
                f"{result.samples} questions of {result.mean_tokens:.0f} tokens, {result.seconds:.1f} s"
            )

        evaluation = evaluate(run, sets, self.batch_rows, self.max_new_tokens, self.data, show)
        print_tables(evaluation, console)
        for path in write_report(evaluation, out):
            console.print(f"wrote {path}", soft_wrap=True)
