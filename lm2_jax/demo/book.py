"""A long text with facts in it: generated prose in which four persons move from time to time."""

from collections.abc import Iterator
from typing import NamedTuple

from lm2_jax.data.babi import PERSONS_OF, PLACES, Event, Query, write_question
from lm2_jax.data.background import Prose
from lm2_jax.data.philox import Draws
from lm2_jax.data.text_tokens import Encoder
from lm2_jax.data.worlds import word

PERSONS = PERSONS_OF["qa1"]
_STREAM = 15  # of draws, so that this text is like none of training


class Known(NamedTuple):
    """What a reader knows of a person."""

    place: str
    tokens_ago: int  # since the statement


class Part(NamedTuple):
    """A part of the text."""

    text: str  # with a leading blank, so that parts can be joined
    tokens: int
    moves: int
    known: dict[str, Known]  # at its end, of every person


def question(person: str) -> str:
    """Where a person is, as a question."""
    return write_question(Query("where_person", (person,))).strip()


def write_parts(encode: Encoder, part_tokens: int, every: int, seed: int) -> Iterator[Part]:
    """The text part by part, without end; the same for the same arguments.

    Args:
      encode: counts tokens.
      part_tokens: least tokens of a part.
      every: tokens of prose between two moves, on average.
      seed: of the text.
    """
    draws = Draws(seed, _STREAM)
    prose = Prose().sentences(draws, held_out=True)
    place: dict[str, str] = {}
    at: dict[str, int] = {}  # token after the last statement about a person
    written, waiting = 0, 0
    while True:
        sentences: list[str] = []
        start, moves = written, 0
        while written - start < part_tokens or len(at) < len(PERSONS):
            if waiting <= 0:
                # All persons first, then whoever moves; in the end a part tells of each several times.
                missing = [person for person in PERSONS if person not in place]
                person = draws.choice(missing or PERSONS)
                place[person] = draws.choice([other for other in PLACES if other != place.get(person)])
                sentence = word(Event("move", (person, place[person])), 0.0, draws)
                written += len(encode(sentence))
                at[person], moves = written, moves + 1
                waiting = int(2 * every * draws.uniform())
            else:
                sentence = next(prose)
                written += len(encode(sentence))
                waiting -= len(encode(sentence))
            sentences.append(sentence)
        known = {person: Known(place[person], written - at[person]) for person in PERSONS}
        yield Part("".join(f" {sentence}" for sentence in sentences), written - start, moves, known)
