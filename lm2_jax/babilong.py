"""BABILong: the labels of its twenty tasks, the verdict on an answer, and the names of lengths.

There is no model code here; `lm2_jax.evaluation.babilong` evaluates a model. The reader of published files is
`lm2_jax.evaluation.published`; its functions are available here as well.
"""

import importlib
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from lm2_jax.errors import UserError
from lm2_jax.registry import near_misses

if TYPE_CHECKING:
    from lm2_jax.evaluation.published import published_files as published_files
    from lm2_jax.evaluation.published import read_samples as read_samples
    from lm2_jax.evaluation.published import select_files as select_files

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
_UNITS = {"": 1, "k": 1_000, "m": 1_000_000}
_ENDS = (".", "<context>", "<example>")  # the answer ends at the first of these


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

    Both verdicts ignore case and read the output up to its first full stop (or `<context>`, `<example>`). They
    collect the labels of the task that occur there, drop labels that occur in the question, and require that exactly
    the labels of the target remain.

    The official verdict is the one of the published leaderboard. A label occurs where its letters occur, also inside
    a word. This has known consequences, which are kept: in qa7 "none" is never correct (it contains "one"); in qa6,
    qa9, qa17 and qa18 "I do not know" is correct where the answer is "no"; and a target that occurs in the question,
    even inside another word, is never correct.

    The strict verdict differs in three points:

    - a label must be a separate word: no letter, digit or underscore next to it, and for the paths of qa19 no comma
      with a further step;
    - a label of the target counts even if it occurs in the question;
    - blanks around the commas of a target with several labels are ignored.

    Args:
      target: the correct answer; several labels are joined by commas.
      output: the answer of the model.
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
    """`text` up to the first string that ends an answer."""
    for end in _ENDS:
        text = text.split(end, 1)[0]
    return text


def _is_word(label: str, text: str) -> bool:
    """Whether `label` occurs in `text` as a separate word."""
    touching = r"[\w,]" if "," in label else r"\w"
    return re.search(rf"(?<!{touching}){re.escape(label)}(?!{touching})", text) is not None


def length_tokens(length: str) -> int:
    """Tokens of a length by its name: "4k" is 4,000, "1M" is a million, "4096" is 4,096; "0k" is the facts alone.

    Upper and lower case do not matter. The published sets were cut with GPT-2's tokenizer, 300 tokens below the
    length to leave room for a prompt.

    Raises:
      UserError: `length` is not such a name.
    """
    match = re.fullmatch(r"([0-9]{1,9})([kKmM]?)", length)
    if match is None:
        raise UserError(f"lengths: expected names such as 0k, 4k, 128k, 1M or 4096 (tokens), got {length!r}")
    tokens = int(match[1]) * _UNITS[match[2].lower()]
    if not match[2] and 0 < tokens < 100:
        raise UserError(f"lengths: {length!r} would be {length} tokens; write {length}k for thousands of tokens")
    return tokens


def length_name(length: str) -> str:
    """The published name of a length: "16K" is "16k", "1m" and "1000k" are "1M", "4096" stays.

    Raises:
      UserError: as `length_tokens`.
    """
    tokens = length_tokens(length)
    for unit in ("M", "k"):
        if tokens and tokens % _UNITS[unit.lower()] == 0:
            return f"{tokens // _UNITS[unit.lower()]}{unit}"
    return str(tokens) if tokens else "0k"


def __getattr__(name: str) -> Any:
    # Loaded at first use: `lm2_jax.evaluation` imports this module.
    if name in ("published_files", "select_files", "read_samples"):
        return getattr(importlib.import_module("lm2_jax.evaluation.published"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
