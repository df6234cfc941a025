"""Endless streams of events, from which rows with interleaved questions are written.

Either one continuous simulated world, in which a few persons act while the others are not mentioned for a while, or
real bAbI stories, one after the other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from lm2_jax.data.babi import (
    DIRECTIONS,
    OBJECTS,
    PERSONS_OF,
    PLACES,
    Event,
    Line,
    Query,
    parse_question,
    parse_statement,
)
from lm2_jax.data.philox import Draws
from lm2_jax.data.worlds import ACTIONS, World, word

_LONGEST_PHASE = 32  # statements during which the other persons do nothing
_RELATING = 0.3  # share of statements about rooms where qa4 is mixed with tasks about persons
_TAKE_THERE = 0.5


class Step(NamedTuple):
    """The next sentence: a statement, or a question that a file asks at this place."""

    text: str
    event: Event | None
    query: Query | None = None


Steps = Callable[[Draws, bool], Iterator[Step]]


def simulated(tasks: Sequence[str]) -> Steps:
    """Steps of one continuous world in which everything happens that the tasks ask about.

    For a random number of statements, 1 to 32 and short times as likely as long ones, only some of the persons act
    and only some of the rooms are related, so that some questions come long after the last mention.
    """
    persons = sorted({person for task in tasks for person in PERSONS_OF[task]})
    actions = sorted({action for task in tasks for action in ACTIONS.get(task, ())})
    actions += ["give"] * 3 * actions.count("give") + ["take"] * actions.count("take")
    things = OBJECTS if len(actions) > 1 else ()
    relating = 1.0 if not persons else _RELATING if "qa4" in tasks else 0.0

    def steps(draws: Draws, held_out: bool) -> Iterator[Step]:
        del held_out  # the draws differ, and so do the worlds
        # Persons and things begin close together, and two persons at most: so something happens in short rows too.
        world = World(draws, persons, things, actions, draws.subset(PLACES, 2))
        crowd = min(2, len(persons)) if things else len(persons)
        while True:
            active = draws.subset(persons, 1 + draws.below(crowd)) if persons else []
            crowd = len(persons)
            places = draws.subset(PLACES, 2 + draws.below(len(PLACES) - 1))
            # For gifts few places are open at a time, because two persons would rarely meet otherwise.
            meeting = places[: 2 + draws.below(2)] if "give" in actions else PLACES
            for _ in range(int(_LONGEST_PHASE ** draws.uniform())):
                if draws.chance(relating):
                    room, other = draws.subset(places, 2)
                    event = Event("relation", (room, draws.choice(DIRECTIONS), other))
                else:
                    event = world.act(active, meeting)
                yield Step(word(event, _TAKE_THERE, draws), event)

    return steps


def chained(
    train: Mapping[str, Sequence[Sequence[Line]]],
    test: Mapping[str, Sequence[Sequence[Line]]],
    weights: Sequence[float],
) -> Steps:
    """Steps of real stories in random order, with the questions of their files.

    Args:
      train: stories of each task.
      test: stories of each task for held-out rows.
      weights: of the tasks, in the order of `train`.
    """
    tasks = list(train)

    def steps(draws: Draws, held_out: bool) -> Iterator[Step]:
        stories = test if held_out else train
        while True:
            for line in draws.choice(stories[draws.weighted(tasks, weights)]):
                if line.answer is None:
                    yield Step(line.text, parse_statement(line.text))
                else:
                    yield Step(line.text, None, parse_question(line.text))

    return steps
