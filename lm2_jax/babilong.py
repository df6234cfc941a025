"""BABILong: the labels of its twenty tasks, when an answer counts as right, and its published files.

No model code here; `lm2_jax.evaluation.babilong` asks a model.
"""

import io
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath

from lm2_jax.errors import UserError
from lm2_jax.registry import near_misses

_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_YES_NO = ("no", "yes")
# Two steps of a path; one step is never followed by its opposite.
_PATHS = ("e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w")

TASK_LABELS: dict[str, tuple[str, ...]] = {
    "qa1": _PLACES,
    "qa2": _PLACES,
    "qa3": _PLACES,
    "qa4": _PLACES,
    "qa5": ("apple", "bill", "football", "fred", "jeff", "mary", "milk"),
    "qa6": _YES_NO,
    "qa7": ("none", "one", "three", "two"),
    "qa8": ("apple", "football", "milk", "nothing"),
    "qa9": _YES_NO,
    "qa10": ("maybe", "no", "yes"),
    "qa11": _PLACES,
    "qa12": _PLACES,
    "qa13": _PLACES,
    "qa14": ("bedroom", "cinema", "kitchen", "office", "park", "school"),
    "qa15": ("cat", "mouse", "sheep", "wolf"),
    "qa16": ("gray", "green", "white", "yellow"),
    "qa17": _YES_NO,
    "qa18": _YES_NO,
    "qa19": _PATHS,
    "qa20": ("bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"),
}
"""The answers each task can have; qa8's are single objects, of which an answer may join several with commas."""

TASKS = tuple(TASK_LABELS)
_LENGTH = r"(\d+)([kM])"
_ENDS = (".", "<context>", "<example>")  # what follows the first of these is not part of the answer


class Sample(NamedTuple):
    """One row of the published data set."""

    input: str
    question: str
    target: str


def labels(task: str) -> tuple[str, ...]:
    """The labels of `task`; an unknown task is a `UserError`."""
    if task not in TASK_LABELS:
        raise UserError(f"tasks: expected names from qa1 to qa20, got {task!r}.{near_misses(task, list(TASK_LABELS))}")
    return TASK_LABELS[task]


def is_correct(target: str, output: str, question: str, task: str, strict: bool = False) -> bool:
    """Whether `output` answers `question` with `target`.

    Both verdicts ignore case and look at the output up to its first full stop (or `<context>`, `<example>`). They
    collect the task's labels named there, leave out labels that the question names, and ask that exactly the
    target's labels remain.

    The official verdict is the one of the published leaderboard. It takes a label to be named when its letters occur
    anywhere, which has two known consequences, kept here: in qa7 "none" is never right (it contains "one"), and in
    qa6, qa9, qa17 and qa18 "I do not know" is right where the answer is "no". Nor can a target be right that
    occurs in the question, be it inside another word.

    The strict verdict differs in three points:

    - a label is named only as a whole word: no letter, digit or underscore touches it, nor, for the paths of qa19, a
      comma with another step behind or before it;
    - a label of the target counts even where the question names it;
    - blanks around the commas of a target of several labels mean nothing.

    Args:
      target: the right answer; several labels are joined by commas.
      output: what the model said.
      question: the question without its context.
      task: `qa1` to `qa20`.
      strict: the strict verdict instead of the official one.
    Raises:
      UserError: if `task` is unknown.
    """
    target, question = target.lower(), question.lower()
    answer = _first_sentence(output.lower())
    if strict:
        wanted = {target.strip()} if task == "qa19" else {part.strip() for part in target.split(",")}
        named = {label for label in labels(task) if _is_word(label, answer)}
        asked = {label for label in labels(task) if _is_word(label, question)}
        return named - (asked - wanted) == wanted
    # "n,w" is one label of three characters; anything longer with a comma is a list.
    parts = target.split(",") if len(target) > 3 else [target]
    named = {label for label in labels(task) if label in answer and label not in question}
    return named.issuperset(parts) and len(named) == len(parts)


def _first_sentence(text: str) -> str:
    """`text` up to the first mark that ends an answer."""
    for end in _ENDS:
        text = text.split(end, 1)[0]
    return text


def _is_word(label: str, text: str) -> bool:
    """Whether `text` has `label` as a whole word."""
    touching = r"[\w,]" if "," in label else r"\w"
    return re.search(rf"(?<!{touching}){re.escape(label)}(?!{touching})", text) is not None


def length_tokens(length: str) -> int:
    """Tokens of a length by its published name: "4k" is 4,000, "1M" a million, "0k" none but the facts.

    The published sets were cut with GPT-2's tokenizer, 300 tokens short of this to leave room for a prompt. A set
    that is built for a run counts the context (facts and background) in the run's own tokenizer.

    Raises:
      UserError: if `length` is no such name.
    """
    match = re.fullmatch(_LENGTH, length)
    if match is None:
        raise UserError(f"lengths: expected names such as 0k, 4k, 128k or 1M, got {length!r}")
    return int(match[1]) * {"k": 1_000, "M": 1_000_000}[match[2]]


def published_files(data_dir: epath.PathLike) -> dict[str, dict[str, epath.Path]]:
    """The files of a folder in the published layout, `data_dir/<length>/<task>.json` (or .jsonl, .parquet).

    Returns:
      Files by length, shortest first, and by task, in the order of the tasks.
    Raises:
      UserError: if there is no such folder, nothing of that layout in it, or one set in two formats.
    """
    folder = epath.Path(data_dir)
    if not folder.is_dir():
        raise UserError(f"data_dir={str(data_dir)!r}: no such folder")
    lengths = [path.name for path in folder.iterdir() if re.fullmatch(_LENGTH, path.name) and path.is_dir()]
    found: dict[str, dict[str, epath.Path]] = {}
    for length in sorted(lengths, key=length_tokens):
        files: dict[str, epath.Path] = {}
        for path in (folder / length).iterdir():
            if path.suffix in _READERS and path.stem in TASK_LABELS:
                other = files.setdefault(path.stem, path)
                if other != path:
                    raise UserError(f"data_dir: one set in two files, {other} and {path}; remove one of them")
        if files:
            found[length] = {task: files[task] for task in TASKS if task in files}
    if not found:
        raise UserError(
            f"data_dir={str(data_dir)!r}: expected files <length>/<task>{{{','.join(_READERS)}}}, such as "
            f"4k/qa1.json; it holds {sorted(path.name for path in folder.iterdir())[:10]}"
        )
    return found


def select_files(
    data_dir: epath.PathLike, tasks: tuple[str, ...] = (), lengths: tuple[str, ...] = ()
) -> dict[tuple[str, str], epath.Path]:
    """The files of `tasks` and `lengths` below `data_dir`, by (task, length); empty stands for all that are there.

    Raises:
      UserError: as `published_files`, and for a task or length that is not there.
    """
    for task in tasks:
        labels(task)
    for length in lengths:
        length_tokens(length)
    found = published_files(data_dir)
    selected: dict[tuple[str, str], epath.Path] = {}
    for length in lengths or tuple(found):
        if length not in found:
            raise UserError(f"lengths: {data_dir} holds no {length!r}, only {list(found)}")
        for task in tasks or tuple(found[length]):
            if task not in found[length]:
                raise UserError(f"tasks: {data_dir}/{length} holds no {task!r}, only {list(found[length])}")
            selected[task, length] = found[length][task]
    return selected


def read_samples(path: epath.PathLike) -> list[Sample]:
    """The rows of one file in the published layout.

    Args:
      path: a .json file (a list of objects), .jsonl (an object a line) or .parquet; each row has the texts `input`,
        `question` and `target`, and what else it has is ignored.
    Raises:
      UserError: if the file is missing, damaged, empty, or a row lacks a field.
    """
    path = epath.Path(path)
    if path.suffix not in _READERS:
        raise UserError(f"{path}: expected a name that ends in one of {list(_READERS)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    rows = _READERS[path.suffix](path.read_bytes(), str(path))
    if not rows:
        raise UserError(f"{path}: holds no rows", status=1)
    return [_sample(row, f"{path}, row {number}") for number, row in enumerate(rows)]


def _sample(row: Any, where: str) -> Sample:
    """One row of a file as a `Sample`, checked."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with {list(Sample._fields)}, got {row!r:.80}", status=1)
    for field in Sample._fields:
        if field not in row:
            raise UserError(f"{where}: no field {field!r}, only {sorted(row)}", status=1)
        if not isinstance(row[field], str):
            raise UserError(f"{where}: {field!r} must be text, got {row[field]!r:.80}", status=1)
    for field in ("question", "target"):
        if not row[field].strip():
            raise UserError(f"{where}: {field!r} is empty", status=1)
    return Sample(**{field: row[field] for field in Sample._fields})


def _read_json(content: bytes, where: str) -> list[Any]:
    try:
        rows = json.loads(content)
    except ValueError as error:
        hint = " (one object a line? then its name must end in .jsonl)" if "Extra data" in str(error) else ""
        raise UserError(f"{where}: not valid JSON{hint}: {error}", status=1) from error
    if not isinstance(rows, list):
        raise UserError(f"{where}: expected a list of rows, got {type(rows).__name__}", status=1)
    return rows


def _read_jsonl(content: bytes, where: str) -> list[Any]:
    rows = []
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{where}, line {number}: not valid JSON: {error}", status=1) from error
    return rows


def _read_parquet(content: bytes, where: str) -> list[Any]:
    # Only this format needs pyarrow, which is slow to import.
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{where}: Parquet files need the package pyarrow: pip install pyarrow", status=1) from error
    try:
        return parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{where}: not a valid Parquet file: {error}", status=1) from error


_READERS: dict[str, Callable[[bytes, str], list[Any]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
