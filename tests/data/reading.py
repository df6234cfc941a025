"""A tokenizer of words, and a reader that answers bAbI questions from plain sentences: both for tests only.

The reader knows nothing of the project's grammar and tracker: it looks at words, and searches the text anew for each
question.
"""

import re

MOVED = ("went", "journeyed", "travelled", "moved")
TOOK = ("picked", "grabbed", "got", "took")
GAVE = ("passed", "gave", "handed")
AGAINST = {"north": "south", "south": "north", "east": "west", "west": "east"}


class WordTokenizer:
    """Words with the blanks before them, in the order of their first use; nothing is lost."""

    vocab_size = 1_000_000
    pad_id, eos_id = 0, 1

    def __init__(self, answer_id: int | None = 2):
        self.answer_id = answer_id
        self._words = ["<pad>", "<eos>", "<answer>"]
        self._ids = {word: i for i, word in enumerate(self._words)}

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in re.findall(r"\s*[\w'-]+|\s*[^\w\s]|\s+$", text):
            if word not in self._ids:
                self._ids[word] = len(self._words)
                self._words.append(word)
            ids.append(self._ids[word])
        return ids

    def decode(self, ids: list[int]) -> str:
        return "".join(self._words[int(i)] for i in ids if i > 2)


def words_of(sentence: str) -> list[str]:
    return sentence.replace("?", "").replace(".", "").split()


def is_move(words: list[str]) -> bool:
    return words[1] in MOVED


def last_move(facts: list[list[str]], person: str, end: int) -> int | None:
    return next((i for i in reversed(range(end)) if facts[i][0] == person and is_move(facts[i])), None)


def thing_in(words: list[str]) -> str | None:
    return next((w for w in words if w in ("milk", "football", "apple")), None)


def where_person(facts: list[list[str]], person: str) -> tuple[str, int] | None:
    move = last_move(facts, person, len(facts))
    if move is None:
        return None
    return facts[move][-1], max(i for i, words in enumerate(facts) if person in words)


def where_thing(facts: list[list[str]], thing: str) -> tuple[str, int] | None:
    touched = [i for i, words in enumerate(facts) if thing in words]
    if not touched:
        return None
    at = touched[-1]
    words = facts[at]
    there = last_move(facts, words[0], at)  # where the one who touches it is
    holder = words[-1] if words[1] in GAVE else words[0] if words[1] in TOOK else None
    later = last_move(facts, holder, len(facts)) if holder else None
    if later is not None and later > at:
        return facts[later][-1], later
    return None if there is None else (facts[there][-1], at)


def before(facts: list[list[str]], thing: str, place: str) -> tuple[str, int] | None:
    """The last arrival of the carried thing at `place` from a known other place."""
    found = None
    for i in range(1, len(facts) + 1):
        old, new = where_thing(facts[: i - 1], thing), where_thing(facts[:i], thing)
        if is_move(facts[i - 1]) and old and new and old[0] != new[0] and new[0] == place:
            found = old[0], i - 1
    return found


def gift(facts: list[list[str]], giver: str | None, thing: str | None, taker: str | None, part: int):
    for i in reversed(range(len(facts))):
        words = facts[i]
        told = (words[0], thing_in(words), words[-1])
        if words[1] in GAVE and all(
            sought in (None, word) for sought, word in zip((giver, thing, taker), told, strict=True)
        ):
            return told[part], i
    return None


def relation(facts: list[list[str]], direction: str, room: str) -> tuple[str, int] | None:
    """The room that is `direction` of `room`, if no later statement contradicts the one that says so."""
    told = [(w[1], w[3], w[6], i) for i, w in enumerate(facts) if w[0] == "The"]
    both = [t for a, way, b, i in told for t in ((a, way, b, i), (b, AGAINST[way], a, i))]
    for a, way, b, i in both:
        if (way, b) == (direction, room):
            later = [t for t in both if t[3] > i]
            if not any({x, y} == {a, b} or (x, d) == (a, way) or (d, y) == (way, b) for x, d, y, _ in later):
                return a, i
    return None


def read_answer(sentences: list[str], question: str) -> tuple[str, int] | None:
    """The answer and the index of the latest statement it can be read from."""
    facts = [words_of(sentence) for sentence in sentences]
    match words_of(question):
        case ["Where", "is", "the", thing]:
            return where_thing(facts, thing)
        case ["Where", "is", person]:
            return where_person(facts, person)
        case ["Where", "was", "the", thing, "before", "the", place]:
            return before(facts, thing, place)
        case ["What", "is", "the", room, direction, "of"]:
            return relation(facts, AGAINST[direction], room)
        case ["What", "is", direction, "of", "the", room]:
            return relation(facts, direction, room)
        case ["What", "did", giver, "give", "to", taker]:
            return gift(facts, giver, None, taker, 1)
        case ["Who", "gave", "the", thing, "to", taker]:
            return gift(facts, None, thing, taker, 0)
        case ["Who", "gave", "the", thing]:
            return gift(facts, None, thing, None, 0)
        case ["Who", "received", "the", thing]:
            return gift(facts, None, thing, None, 2)
        case ["Who", "did", giver, "give", "the", thing, "to"]:
            return gift(facts, giver, thing, None, 2)
    raise AssertionError(question)
