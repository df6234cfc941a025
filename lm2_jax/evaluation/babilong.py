"""The BABILong suite: asks a model questions about facts hidden in long text, and judges its answers twice."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from etils import epath

from lm2_jax import babilong
from lm2_jax.babilong import Sample
from lm2_jax.config_file import to_dict
from lm2_jax.data.babilong_source import BabilongSource
from lm2_jax.data.base import Tokenizer
from lm2_jax.data.files import decode
from lm2_jax.data.tokenizers import token_array
from lm2_jax.errors import UserError
from lm2_jax.evaluation import report
from lm2_jax.evaluation.answerer import Answerer, Prompt, RunAnswerer
from lm2_jax.evaluation.answerers import AnswererConfig, Direct
from lm2_jax.evaluation.answers import AnswerLog, identity_of
from lm2_jax.evaluation.gpt2 import find_gpt2
from lm2_jax.evaluation.names import distinct_names
from lm2_jax.evaluation.questions import QuestionSet, built_sets, published_sets
from lm2_jax.evaluation.suite import Evaluation, Output, Suite

DEFAULT_TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5")  # of a run that was not trained on tasks
DEFAULT_LENGTHS = ("0k", "1k", "2k", "4k")


class SetResult(NamedTuple):
    """The result of one set; accuracies are fractions."""

    task: str
    length: str
    accuracy: float  # the official verdict
    accuracy_strict: float
    samples: int
    mean_tokens: float  # of a prompt, in the run's tokenizer
    mean_gpt2_tokens: float | None  # the same in GPT-2's, None where it was not available


@dataclasses.dataclass(frozen=True)
class Asking:
    """How questions are put to one model."""

    answerer: Answerer
    tokenizer: Tokenizer
    """Makes the prompts."""
    log: AnswerLog
    """Where answers are kept."""
    batch_rows: int = 32
    max_new_tokens: int = 20
    gpt2: Tokenizer | None = None
    """Counts the prompts as the published lengths do."""
    instructions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Of some tasks, the text before the context."""

    def ask(self, questions: QuestionSet) -> list[str]:
        """Asks the questions of a set that are not answered yet; returns the ids of all answers.

        An answer does not depend on those that are given at the same time, so an interrupted evaluation gives the same
        answers.

        Raises:
          UserError: the set is empty.
        """
        samples = questions.samples()
        if not samples:
            raise UserError(f"babilong: the set {questions.task} at {questions.length} holds no samples", status=1)
        instruction = self.instructions.get(questions.task, "")
        more = {"instruction": instruction} if instruction else {}
        ids = [
            self.log.id(task=questions.task, length=questions.length, number=number, **sample._asdict(), **more)
            for number, sample in enumerate(samples)
        ]
        # The longest first, so that no long one is left alone at the end.
        missing = sorted((i for i in range(len(ids)) if ids[i] not in self.log), key=lambda i: -len(samples[i].input))
        prompts = (
            Prompt(self.tokenizer, samples[index].input, samples[index].question, instruction) for index in missing
        )
        for number, prompt, output in self.answerer.answers(
            prompts, self.max_new_tokens, min(self.batch_rows, len(samples))
        ):
            index = missing[number]
            self.log.append({ids[index]: self._row(questions, samples[index], prompt, output)})
        return ids

    def _row(self, questions: QuestionSet, sample: Sample, prompt: Prompt, output: str) -> dict[str, Any]:
        """A line of the answer log."""
        judge = functools.partial(babilong.is_correct, sample.target, output, sample.question, questions.task)
        text = f"{sample.input} {sample.question}".strip()
        return {
            "task": questions.task,
            "length": questions.length,
            "question": sample.question,
            "target": sample.target,
            "output": output,
            "correct": judge(),
            "correct_strict": judge(strict=True),
            "prompt_tokens": len(prompt.tokens),
            "gpt2_tokens": None if self.gpt2 is None else len(token_array(self.gpt2, text)),
        }


def evaluate(
    asking: Asking, sets: Iterable[QuestionSet], on_result: Callable[[SetResult, float], None]
) -> tuple[list[SetResult], list[str]]:
    """Asks all questions of all sets.

    Args:
      asking: the model and how it is asked.
      sets: read one at a time.
      on_result: called after each set, with its result and the seconds it took.
    Returns:
      The results by set, and the ids of all answers in the log.
    """
    results, all_ids = [], []
    for questions in sets:
        start = time.monotonic()
        ids = asking.ask(questions)
        answers = [asking.log[id] for id in ids]
        counts = [answer["gpt2_tokens"] for answer in answers]
        result = SetResult(
            task=questions.task,
            length=questions.length,
            accuracy=float(np.mean([answer["correct"] for answer in answers])),
            accuracy_strict=float(np.mean([answer["correct_strict"] for answer in answers])),
            samples=len(answers),
            mean_tokens=float(np.mean([answer["prompt_tokens"] for answer in answers])),
            mean_gpt2_tokens=None if None in counts else float(np.mean(counts)),
        )
        results.append(result)
        all_ids += ids
        on_result(result, time.monotonic() - start)
    return results, all_ids


class ModelResults(NamedTuple):
    """The results of one model."""

    name: str
    preset: str
    step: int
    segment_tokens: int
    results: list[SetResult]
    answerer: AnswererConfig = Direct()

    def cells(self) -> tuple[report.Cells, report.Cells]:
        """Per cent by (task, length), by the official and by the strict verdict."""
        ordered = sorted(self.results, key=lambda result: babilong.length_tokens(result.length))
        ordered.sort(key=lambda result: babilong.TASKS.index(result.task))
        official = {(result.task, result.length): 100 * result.accuracy for result in ordered}
        return official, {(result.task, result.length): 100 * result.accuracy_strict for result in ordered}

    def document(self) -> dict[str, Any]:
        """The part of babilong.json about this model."""
        return {
            "preset": self.preset,
            "model": self.name,
            "step": self.step,
            "segment_tokens": self.segment_tokens,
            "answerer": to_dict(self.answerer),
            "results": [result._asdict() for result in self.results],
        }


def result_files(models: Sequence[ModelResults], data: str, max_new_tokens: int) -> dict[str, bytes]:
    """babilong.json, babilong.md and babilong.png.

    Args:
      models: the evaluated model, and possibly a baseline.
      data: where the sets come from.
      max_new_tokens: maximum length of an answer.
    """
    first = models[0]
    document = {"suite": "babilong", **first.document(), "max_new_tokens": max_new_tokens, "data": data}
    if len(models) > 1:
        document["baseline"] = models[1].document()
    counts = sorted({result.samples for result in first.results})
    number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    note = f"{number} questions per cell, greedy decoding, segments of {first.segment_tokens} tokens"
    parts = [f"# BABILong\n\nAccuracy in per cent, official verdict / strict verdict; {note}.\nData: {data}.\n"]
    for model in models:
        table = report.markdown_table(*model.cells(), "task")
        parts.append(f"## {model.name} ({model.preset}, step {model.step})\n\n{table}")
    parts.append(f"{_prompt_lengths(first)}\n")
    panels = {f"{model.name}\n{model.preset}, step {model.step}": model.cells() for model in models}
    picture = report.heat_map(panels, "BABILong, accuracy in per cent", f"{note}\nData: {data}", ("task", "length"))
    return {
        "babilong.json": report.to_json(document),
        "babilong.md": "\n".join(parts).encode(),
        "babilong.png": picture,
    }


def _prompt_lengths(model: ModelResults) -> str:
    """The mean lengths of prompts, in GPT-2's tokens where they were counted and in the run's own."""
    lines = ["| length | mean GPT-2 tokens | mean tokens of this model |", "|---|---|---|"]
    for length in dict.fromkeys(result.length for result in model.results):
        here = [result for result in model.results if result.length == length]
        own = np.mean([result.mean_tokens for result in here])
        published = [result.mean_gpt2_tokens for result in here]
        shown = "not counted" if None in published else f"{np.mean([n for n in published if n is not None]):,.0f}"
        lines.append(f"| {length} | {shown} | ({own:,.0f}) |")
    return "\n".join(lines)


class AskedRun(NamedTuple):
    """A run and how it is asked."""

    run: RunAnswerer
    name: str
    config: AnswererConfig
    answerer: Answerer
    identity: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Babilong(Suite):
    """BABILong: questions about facts hidden in long text. Writes babilong.json, .md, .png and answers.jsonl.

    Every answer is in answers.jsonl as soon as it is given. The same command resumes an interrupted evaluation.
    """

    kind: ClassVar[str] = "babilong"

    workdir: str
    """Workdir of the run, a folder or a bucket."""
    baseline: str | None = None
    """Workdir of a second run that is asked the same questions and shown next to the first."""
    answerer: AnswererConfig = Direct()
    """How the run is asked: directly, after retrieval, or with a running summary."""
    baseline_answerer: AnswererConfig = Direct()
    """How the baseline is asked; the baseline may be the same run."""
    instructions: str | None = None
    """Folder of `<task>.txt`: instruction and examples that are put before each context of the task; default: none."""
    tasks: tuple[str, ...] = ()
    """Tasks, qa1 to qa20; default: all in data-dir, or else those of the run's training (qa1 to qa5)."""
    lengths: tuple[str, ...] = ()
    """Lengths such as 0k 4k 1M 4096; default: all in data-dir, or else 0k 1k 2k 4k."""
    samples: int = 100
    """Questions of each task and length; a published set with fewer rows gives all it has."""
    data_dir: str | None = None
    """Folder of published sets, in any layout of the hub, such as <length>/<task>.json or <task>/<length>.json (also
    .jsonl and .parquet); default: sets are built."""
    babi_dir: str | None = None
    """Folder of bAbI's files, whose test questions are used for sets that are built; default: the simulator (qa1 to
    qa5)."""
    books_dir: str | None = None
    """Folder of books (.txt), the background of sets that are built; default: generated prose."""
    count_in: Literal["gpt2", "own"] | None = None
    """Tokenizer that measures the lengths of sets that are built: GPT-2's as in the published sets, or the run's own;
    default: GPT-2's where it is found."""
    gpt2_dir: str | None = None
    """Folder of GPT-2's vocab.json and merges.txt; default: tokenizers/gpt2 in $LM2_JAX_DATA (../shared/data)."""
    max_new_tokens: int = 20
    """Maximum length of an answer, in tokens."""
    seed: int = 0
    """Chooses the questions and the background of sets that are built."""
    resume: bool = True
    """Whether answers that an earlier call left in answers.jsonl are used; --no-resume asks all questions again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("samples", "max_new_tokens")
        if self.baseline is None and self.baseline_answerer != Direct():
            raise ValueError("baseline_answerer is how the baseline is asked: set baseline")
        if self.data_dir is not None and (self.babi_dir or self.books_dir or self.count_in):
            raise ValueError(
                "data_dir holds finished sets: babi_dir, books_dir and count_in are for sets that are built"
            )

    def evaluated(self) -> tuple[str, ...]:
        return (self.workdir,) if self.baseline is None else (self.workdir, self.baseline)

    def plan(self, answerers: Sequence[RunAnswerer]) -> Evaluation:
        gpt2 = find_gpt2(self.gpt2_dir)
        if self.count_in == "gpt2" and gpt2 is None:
            raise UserError("count_in='gpt2': GPT-2's tokenizer was not found; set gpt2_dir, or count_in to 'own'")
        sets = self.sets(answerers[0], gpt2)
        return functools.partial(self._evaluate, self._asked(answerers), sets, gpt2, self._instructions(sets))

    def _asked(self, answerers: Sequence[RunAnswerer]) -> list[AskedRun]:
        """The runs with how they are asked; packages and files are checked."""
        configs = (self.answerer, self.baseline_answerer)
        labels = [config.label for config in configs[: len(answerers)]]
        names = distinct_names([answerer.run.config for answerer in answerers], self.evaluated(), labels)
        return [
            AskedRun(run, name, config, config.build(run), config.identity())
            for run, name, config in zip(answerers, names, configs, strict=False)
        ]

    def _instructions(self, sets: Sequence[QuestionSet]) -> dict[str, str]:
        """By task, the text before its contexts."""
        if self.instructions is None:
            return {}
        folder = epath.Path(self.instructions)
        tasks = dict.fromkeys(questions.task for questions in sets)
        missing = [f"{task}.txt" for task in tasks if not (folder / f"{task}.txt").is_file()]
        if missing:
            raise UserError(f"instructions={self.instructions!r}: expected a folder with {', '.join(missing)}")
        return {task: decode((folder / f"{task}.txt").read_bytes(), f"{folder / task}.txt") for task in tasks}

    def sets(self, answerer: RunAnswerer, gpt2: Tokenizer | None) -> list[QuestionSet]:
        """The sets to ask; all names, folders and files are checked."""
        if self.data_dir is not None:
            return published_sets(self.data_dir, self.tasks, self.lengths, self.samples)
        run = answerer.run
        source = run.config.data.source
        trained = source.tasks if isinstance(source, BabilongSource) else DEFAULT_TASKS
        return built_sets(
            run.tokenizer if gpt2 is None or self.count_in == "own" else gpt2,
            self.tasks or trained,
            self.lengths or DEFAULT_LENGTHS,
            self.samples,
            babi_dir=self.babi_dir,
            books_dir=self.books_dir,
            seed=self.seed,
        )

    def data(self, gpt2: Tokenizer | None) -> str:
        """Where the sets come from, in words."""
        if self.data_dir is not None:
            return f"files of {self.data_dir}"
        facts = "simulated facts" if self.babi_dir is None else f"test questions of {self.babi_dir}"
        background = "generated prose" if self.books_dir is None else f"books of {self.books_dir}"
        unit = "the model's own" if gpt2 is None or self.count_in == "own" else "GPT-2"
        return f"{facts} in {background}, seed {self.seed}; lengths in {unit} tokens"

    def _evaluate(
        self,
        asked_runs: Sequence[AskedRun],
        sets: Sequence[QuestionSet],
        gpt2: Tokenizer | None,
        instructions: Mapping[str, str],
        output: Output,
    ) -> Mapping[str, bytes]:
        """Asks each model all questions, one set after the other."""
        models, files = [], {}
        for asked, file in zip(asked_runs, ("answers.jsonl", "answers_baseline.jsonl"), strict=False):
            run = asked.run.run
            identity = identity_of(run, max_new_tokens=self.max_new_tokens, **asked.identity)
            log = AnswerLog(output.folder / file, identity, self.resume)
            asking = Asking(
                asked.answerer, run.tokenizer, log, self.batch_rows, self.max_new_tokens, gpt2, instructions
            )
            output.show(f"\n{asked.name} ({run.config.name}, step {run.step})")
            results, ids = evaluate(asking, sets, functools.partial(_show, output))
            segment_tokens = run.config.model.segment_tokens
            model = ModelResults(asked.name, run.config.name, int(run.step), segment_tokens, results, asked.config)
            models.append(model)
            files[file] = log.final(ids)
            for verdict, cells in zip(("official verdict", "strict verdict"), model.cells(), strict=True):
                output.show(f"\nBABILong, {verdict} (accuracy in per cent)")
                output.show(report.console_table(cells, "task"))
        return {**result_files(models, self.data(gpt2), self.max_new_tokens), **files}


def _show(output: Output, result: SetResult, seconds: float) -> None:
    """Prints the result of one set."""
    tokens = f"{result.mean_tokens:.0f} tokens"
    if result.mean_gpt2_tokens is not None:
        tokens = f"{result.mean_gpt2_tokens:.0f} GPT-2 tokens ({result.mean_tokens:.0f} of this model)"
    output.show(
        f"{result.task} {result.length}: {100 * result.accuracy:.1f} (strict {100 * result.accuracy_strict:.1f}), "
        f"{result.samples} questions of {tokens}, {seconds:.1f} s"
    )
