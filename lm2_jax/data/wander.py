"""Events without end: what rows of interleaved questions are written about.

Either one continuous simulated world, in which a few persons act while the others stay unmentioned for a while, or
real bAbI stories, one after the other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from lm2_jax.data.babi import (
    DIRECTIONS,
    OBJECTS,
    PERSONS_OF,
    PLACES,
    VERBS,
    Event,
    Line,
    Query,
    parse_question,
    parse_statement,
    write_statement,
)
from lm2_jax.data.philox import Draws

_LONGEST_PHASE = 32  # statements during which the others rest


class Step(NamedTuple):
    """The next thing to write: a statement, or a question that a file asks at this place."""

    text: str
    event: Event | None
    query: Query | None = None


Steps = Callable[[Draws, bool], Iterator[Step]]


class _Walk:
    """One simulated world: who is where, and who holds what."""

    def __init__(self, tasks: Sequence[str], draws: Draws):
        self.draws = draws
        self.persons = sorted({p for task in tasks for p in PERSONS_OF[task]})
        self.things = OBJECTS if {"qa2", "qa3", "qa5"} & set(tasks) else ()
        self.gives = "qa5" in tasks
        self.relates = "qa4" in tasks
        self.place: dict[str, str] = {}
        self.holder: dict[str, str] = {}
        self.left: dict[str, str] = {thing: draws.choice(PLACES) for thing in self.things}

    def move(self, person: str) -> Event:
        here = self.place.get(person)
        company = [p for other, p in self.place.items() if other != person and p != here] if self.gives else []
        # Where things change hands, people seek company: else two would rarely meet.
        place = self.draws.choice(company if company and self.draws.chance(0.5) else [p for p in PLACES if p != here])
        self.place[person] = place
        return Event("move", (person, place))

    def deeds(self, person: str) -> list[Event]:
        """What a person can do besides moving."""
        here = self.place.get(person)
        if here is None:
            return []
        found = [Event("take", (person, thing)) for thing, place in self.left.items() if place == here]
        for thing, holder in self.holder.items():
            if holder == person:
                found.append(Event("drop", (person, thing)))
                if self.gives:
                    others = [p for p in self.persons if p != person and self.place.get(p) == here]
                    found += [Event("give", (person, thing, other)) for other in others]
        return found

    def perform(self, event: Event) -> None:
        """Carries out a deed."""
        person, thing, *others = event.words
        self.left.pop(thing, None)
        self.holder.pop(thing, None)
        if event.kind == "drop":
            self.left[thing] = self.place[person]
        else:
            self.holder[thing] = others[0] if others else person

    def relation(self, places: Sequence[str]) -> Event:
        place, other = self.draws.subset(places, 2)
        return Event("relation", (place, self.draws.choice(DIRECTIONS), other))

    def next(self, persons: Sequence[str], places: Sequence[str]) -> Event:
        """One event among the active persons and places."""
        draws = self.draws
        if self.relates and (not self.persons or draws.chance(0.3)):
            return self.relation(places)
        person = draws.choice(persons)
        deeds = self.deeds(person)
        # Gives are rarer than takes and drops by chance; where they are asked about, they get their share.
        gifts = [event for event in deeds if event.kind == "give"]
        if not deeds or draws.chance(0.55):
            return self.move(person)
        event = draws.choice(gifts if gifts and draws.chance(0.7) else deeds)
        self.perform(event)
        return event


def _worded(event: Event, draws: Draws) -> str:
    verbs = VERBS.get(event.kind)
    there = event.kind in ("take", "drop") and draws.chance(0.5 if event.kind == "take" else 0.2)
    return write_statement(event, draws.choice(verbs) if verbs else "", there)


def simulated(tasks: Sequence[str]) -> Steps:
    """Steps of one continuous world in which everything happens that the tasks ask about.

    For a random number of statements, 1 to 32 and short ones as likely as long ones, only a part of the persons acts,
    so that some questions lie long after the last mention.
    """

    def steps(draws: Draws, held_out: bool) -> Iterator[Step]:
        del held_out  # the draws differ, and so do the worlds
        walk = _Walk(tasks, draws)
        while True:
            persons = draws.subset(walk.persons, 1 + draws.below(len(walk.persons))) if walk.persons else ()
            places = draws.subset(PLACES, 2 + draws.below(len(PLACES) - 1))
            for _ in range(int(_LONGEST_PHASE ** draws.uniform())):
                event = walk.next(persons, places)
                yield Step(_worded(event, draws), event)

    return steps


def chained(
    train: Mapping[str, Sequence[Sequence[Line]]],
    test: Mapping[str, Sequence[Sequence[Line]]],
    weights: Sequence[float],
) -> Steps:
    """Steps of real stories in random order, with their own questions where they stand.

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
