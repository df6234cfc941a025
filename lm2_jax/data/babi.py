"""The bAbI language: one table of sentence forms that writes and reads qa1 to qa5, and the reader of bAbI files.

bAbI v1.2 (Weston et al., arXiv:1502.05698) is plain text. A line is `number sentence`, or for a question
`number question<TAB>answer<TAB>numbers of the supporting lines`; the number 1 begins a new story.
"""

import functools
import itertools
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lm2_jax.data.files import clean_text, read_text
from lm2_jax.errors import UserError

PERSONS = ("Mary", "John", "Daniel", "Sandra", "Fred", "Bill", "Jeff")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("milk", "football", "apple")
DIRECTIONS = ("north", "south", "east", "west")
VERBS = {
    "move": ("went to", "went back to", "journeyed to", "travelled to", "moved to"),
    "take": ("picked up", "grabbed", "got", "took"),
    "drop": ("put down", "dropped", "left", "discarded"),
    "give": ("passed", "gave", "handed"),
}
TASKS = tuple(f"qa{i}" for i in range(1, 21))
WORLD_TASKS = TASKS[:5]  # the tasks whose language is written down here

_WORDS = {
    "person": PERSONS,
    "other_person": PERSONS,
    "place": PLACES,
    "other_place": PLACES,
    "object": OBJECTS,
    "direction": DIRECTIONS,
}
STATEMENT_FORMS = {
    "move": "{person} {verb} the {place}.",
    "take": "{person} {verb} the {object}{there}.",
    "drop": "{person} {verb} the {object}{there}.",
    "give": "{person} {verb} the {object} to {other_person}.",
    "relation": "The {place} is {direction} of the {other_place}.",
}
QUESTION_FORMS = {  # the trailing blank is in the files, except in qa4
    "where_person": "Where is {person}? ",
    "where_object": "Where is the {object}? ",
    "before": "Where was the {object} before the {place}? ",
    "which_is": "What is {direction} of the {place}?",
    "is_of": "What is the {place} {direction} of?",
    "what_given": "What did {person} give to {other_person}? ",
    "giver": "Who gave the {object}? ",
    "giver_to": "Who gave the {object} to {person}? ",
    "receiver": "Who received the {object}? ",
    "receiver_from": "Who did {person} give the {object} to? ",
}
PERSONS_OF = {  # who acts in a task
    "qa1": PERSONS[:4],
    "qa2": PERSONS[:4],
    "qa3": PERSONS[:4],
    "qa4": (),
    "qa5": ("Mary", "Fred", "Bill", "Jeff"),
}
QUESTION_KINDS = {
    "qa1": ("where_person",),
    "qa2": ("where_object",),
    "qa3": ("before",),
    "qa4": ("which_is", "is_of"),
    "qa5": ("what_given", "giver", "giver_to", "receiver", "receiver_from"),
}


class Event(NamedTuple):
    """What a statement says: its kind, and the words that fill its form, in order."""

    kind: str
    words: tuple[str, ...]


class Query(NamedTuple):
    """What a question asks: its kind, and the words that fill its form, in order."""

    kind: str
    words: tuple[str, ...]


class Line(NamedTuple):
    """One line of a story: a statement, or a question with its answer and its support."""

    number: int
    text: str
    answer: str | None = None  # None: a statement
    support: tuple[int, ...] = ()  # numbers of the lines the answer follows from


class Sample(NamedTuple):
    """One question with all statements before it."""

    facts: tuple[str, ...]
    question: str
    answer: str
    support: tuple[int, ...]  # indices into facts


@functools.cache
def _slots(form: str) -> tuple[str, ...]:
    return tuple(name for name in re.findall(r"{(\w+)}", form) if name in _WORDS)


def _pattern(form: str, verbs: Sequence[str] = ()) -> re.Pattern[str]:
    """The regular expression that reads what `form` writes."""
    groups = {name: f"(?P<{name}>{'|'.join(words)})" for name, words in _WORDS.items()}
    groups |= {"verb": f"(?:{'|'.join(verbs)})", "there": "(?: there)?"}
    pieces = re.split(r"{(\w+)}", form.strip())
    return re.compile("".join(groups[piece] if i % 2 else re.escape(piece) for i, piece in enumerate(pieces)))


_STATEMENTS = {kind: _pattern(form, VERBS.get(kind, ())) for kind, form in STATEMENT_FORMS.items()}
_QUESTIONS = {kind: _pattern(form) for kind, form in QUESTION_FORMS.items()}


@functools.lru_cache(maxsize=65536)
def parse_statement(text: str) -> Event:
    """The event that a statement of qa1 to qa5 describes; any other sentence is a `UserError`."""
    for kind, pattern in _STATEMENTS.items():
        match = pattern.fullmatch(text)
        if match:
            return Event(kind, match.groups())
    raise UserError(f"not a statement of bAbI qa1 to qa5: {text!r}", status=1)


@functools.lru_cache(maxsize=4096)
def parse_question(text: str) -> Query:
    """What a question of qa1 to qa5 asks; any other question is a `UserError`. Trailing blanks do not matter."""
    for kind, pattern in _QUESTIONS.items():
        match = pattern.fullmatch(text.strip())
        if match:
            return Query(kind, match.groups())
    raise UserError(f"not a question of bAbI qa1 to qa5: {text!r}", status=1)


@functools.cache
def write_statement(event: Event, verb: str = "", there: bool = False) -> str:
    """The statement that describes `event`, with one of VERBS[event.kind] and with or without a closing "there"."""
    form = STATEMENT_FORMS[event.kind]
    words = dict(zip(_slots(form), event.words, strict=True))
    return form.format(verb=verb, there=" there" if there else "", **words)


@functools.cache
def write_question(query: Query) -> str:
    """The question as the files have it, trailing blank included."""
    form = QUESTION_FORMS[query.kind]
    return form.format(**dict(zip(_slots(form), query.words, strict=True)))


def answers_of(task: str) -> list[str]:
    """Every answer that questions of qa1 to qa5 can have."""
    named = {"what_given": OBJECTS, **dict.fromkeys(QUESTION_KINDS["qa5"][1:], PERSONS_OF[task])}
    return sorted({word for kind in QUESTION_KINDS[task] for word in named.get(kind, PLACES)})


def all_queries(task: str) -> list[Query]:
    """Every question of qa1 to qa5 that can be written, those without an answer in any world included."""
    words = {**_WORDS, "person": PERSONS_OF[task], "other_person": PERSONS_OF[task]}
    return [
        Query(kind, chosen)
        for kind in QUESTION_KINDS[task]
        for chosen in itertools.product(*(words[slot] for slot in _slots(QUESTION_FORMS[kind])))
    ]


def find_file(folder: str, task: str, split: str) -> pathlib.Path:
    """The file of a task, `{task}_*_{split}.txt` or `{task}_{split}.txt`.

    Raises:
      UserError: if the folder or the file is not there.
    """
    root = pathlib.Path(os.path.expanduser(folder))
    if not root.is_dir():
        raise UserError(f"babi_dir: expected a folder of bAbI files, got {folder!r}, which is not a folder")
    found = sorted(root.glob(f"{task}_*_{split}.txt")) + sorted(root.glob(f"{task}_{split}.txt"))
    if not found:
        raise UserError(
            f"babi_dir: expected a file named {task}_*_{split}.txt in {folder!r} (such as bAbI v1.2's en-10k folder), "
            "found none; change babi_dir or tasks"
        )
    return found[0]


_NUMBER = "[0-9]{1,9}"
_LINE = re.compile(rf"({_NUMBER}) ([^\t]+)(?:\t([^\t]+)\t *((?:{_NUMBER}(?: +|$))*))?")


def _line(text: str, path: pathlib.Path, row: int) -> Line:
    match = _LINE.fullmatch(text)
    if not match:
        raise UserError(
            f"{path}: line {row} is not a line of a bAbI file: {text[:80]!r}; expected `number sentence`, or `number "
            "question<TAB>answer<TAB>numbers of lines`",
            status=1,
        )
    number, sentence, answer, support = match.groups()
    if answer is None:
        return Line(int(number), sentence.strip())
    return Line(int(number), sentence, answer.strip(), tuple(int(n) for n in support.split()))


def read_stories(folder: str, task: str, split: str) -> list[list[Line]]:
    """All stories of one file, in order.

    Args:
      folder: folder of bAbI files.
      task: "qa1" to "qa20".
      split: "train" or "test".
    Returns:
      The lines of each story.
    Raises:
      UserError: if the file is missing or damaged.
    """
    path = find_file(folder, task, split)
    stories: list[list[Line]] = []
    for row, text in enumerate(clean_text(read_text(path)).splitlines(), start=1):
        if not text.strip():
            continue
        line = _line(text, path, row)
        if line.number == 1:
            stories.append([])
        if not stories:
            raise UserError(
                f"{path}: line {row} is numbered {line.number}, expected a story that begins at 1", status=1
            )
        stories[-1].append(line)
    if not stories:
        raise UserError(f"{path}: expected bAbI stories, the file is empty", status=1)
    return stories


def samples_of(story: Sequence[Line]) -> Iterator[Sample]:
    """One sample for each question: all statements before it, the questions before it left out (BABILong's rule)."""
    facts: list[str] = []
    places: dict[int, int] = {}
    for line in story:
        if line.answer is None:
            places[line.number] = len(facts)
            facts.append(line.text)
        else:
            support = tuple(places[number] for number in line.support if number in places)
            yield Sample(tuple(facts), line.text, line.answer, support)


def read_samples(folder: str, task: str, split: str) -> list[Sample]:
    """Every question of one file as a sample; arguments and errors as in `read_stories`."""
    return [sample for story in read_stories(folder, task, split) for sample in samples_of(story)]
