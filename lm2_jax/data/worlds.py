"""Simulator of the bAbI worlds of qa1 to qa5: stories that are distributed like the files of bAbI v1.2.

The rules were derived from statistics of the files (tests/data/test_worlds.py compares both):

- Everybody and everything begins somewhere, unknown to the reader. Somebody does something: a random person and a
  random action, drawn again until they are possible. Moving picks one of six places, so it sometimes fails.
- A gift picks neither person nor thing at random: see _FileWorld.
- After every two statements a question is asked if one can be: about one of the last five statements. It must have
  exactly the number of supporting facts that its task is named after. A story ends with its fifth question.
- qa4 is a line of three rooms: the two outer ones are described relative to the middle one.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from lm2_jax.data.babi import (
    OBJECTS,
    PERSONS_OF,
    PLACES,
    QUESTION_KINDS,
    VERBS,
    Event,
    Line,
    Query,
    Sample,
    samples_of,
    write_question,
    write_statement,
)
from lm2_jax.data.philox import Draws

QUESTIONS = 5  # of a story; qa4 has one
_STATEMENTS = 2  # before each try to ask
_RECENT = 5  # statements that a question may be about
ACTIONS = {
    "qa1": ("move",),
    "qa2": ("move", "take", "drop"),
    "qa3": ("move", "take", "drop"),
    "qa5": ("move", "take", "drop", "give"),
}
_GIVEN_FIRST = ("apple", "football", "milk")  # what is given where several things could be, and to whom
_RECEIVES_FIRST = ("Mary", "Fred", "Bill", "Jeff")
_TAKE_THERE = {"qa2": 1.0, "qa3": 0.2, "qa5": 1.0}  # how often "there" ends the statement
_DROP_THERE = 0.2
_OUTER_FIRST = 2 / 3  # qa4: how often the outer room is the subject
_AXES = (("north", "south"), ("east", "west"))


class World:
    """Who is where, and who holds what.

    Args:
      draws: decides everything.
      persons: who acts.
      things: what can be carried.
      actions: what can be done; what is named more often is done more often.
      starts: where persons and things may be in the beginning.
    """

    def __init__(
        self,
        draws: Draws,
        persons: Sequence[str],
        things: Sequence[str],
        actions: Sequence[str],
        starts: Sequence[str] = PLACES,
    ):
        self._draws, self._persons, self._actions = draws, persons, actions
        self.place = {person: draws.choice(starts) for person in persons}
        self.lying = {thing: draws.choice(starts) for thing in things}  # where things are that nobody holds
        self.holder: dict[str, str] = {}
        self._open: Sequence[str] = PLACES  # where one can go
        self._try = {"move": self._move, "take": self._take, "drop": self._drop, "give": self._give}

    def act(self, active: Sequence[str], places: Sequence[str] = PLACES) -> Event:
        """One of the active persons does something that is possible; who moves goes to one of at least two places."""
        self._open = places
        while True:
            event = self._try[self._draws.choice(self._actions)](self._draws.choice(active))
            if event is not None:
                return event

    def _held_by(self, person: str) -> list[str]:
        return [thing for thing, holder in self.holder.items() if holder == person]

    def _move(self, person: str) -> Event | None:
        place = self._draws.choice(self._open)
        if place == self.place[person]:
            return None
        self.place[person] = place
        return Event("move", (person, place))

    def _take(self, person: str) -> Event | None:
        here = [thing for thing, place in self.lying.items() if place == self.place[person]]
        if not here:
            return None
        thing = self._draws.choice(here)
        del self.lying[thing]
        self.holder[thing] = person
        return Event("take", (person, thing))

    def _drop(self, person: str) -> Event | None:
        held = self._held_by(person)
        if not held:
            return None
        thing = self._draws.choice(held)
        del self.holder[thing]
        self.lying[thing] = self.place[person]
        return Event("drop", (person, thing))

    def _give(self, person: str) -> Event | None:
        held = self._held_by(person)
        company = [p for p in self._persons if p != person and self.place[p] == self.place[person]]
        if not held or not company:
            return None
        thing, other = self._draws.choice(held), self._draws.choice(company)
        self.holder[thing] = other
        return Event("give", (person, thing, other))


class _FileWorld(World):
    """A world with a habit of the files of qa5: when something is given, it is the first thing to the first person."""

    def _give(self, person: str) -> Event | None:
        for thing in _GIVEN_FIRST:
            holder = self.holder.get(thing)
            for other in _RECEIVES_FIRST:
                if holder not in (None, other) and self.place[holder] == self.place[other]:
                    self.holder[thing] = other
                    return Event("give", (holder, thing, other))
        return None


def word(event: Event, take_there: float, draws: Draws) -> str:
    """The statement of an event, its verb drawn; a take ends in "there" with the given chance."""
    verbs = VERBS.get(event.kind)
    chance = {"take": take_there, "drop": _DROP_THERE}.get(event.kind, 0.0)
    return write_statement(event, draws.choice(verbs) if verbs else "", draws.chance(chance))


class _Asked(NamedTuple):
    query: Query
    answer: str
    support: tuple[int, ...]  # indices into the history


class _History:
    """The events of a story so far."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.numbers: list[int] = []  # line number of each event
        self.moves: dict[str, list[int]] = {}  # person -> indices of moves
        self.touched: dict[str, int] = {}  # thing -> index of the latest take, drop or give
        self.carried: dict[str, int] = {}  # thing -> index of the take that began its latest journey
        self.given: dict[str, int] = {}  # thing -> index of the latest give

    def add(self, event: Event, number: int) -> None:
        index = len(self.events)
        self.events.append(event)
        self.numbers.append(number)
        if event.kind == "move":
            self.moves.setdefault(event.words[0], []).append(index)
            return
        thing = event.words[1]
        self.touched[thing] = index
        if event.kind == "take":
            self.carried[thing] = index
        if event.kind == "give":
            self.given[thing] = index

    def destination(self, index: int) -> str:
        return self.events[index].words[1]


def _ask_person(history: _History, index: int, draws: Draws) -> _Asked | None:
    del draws
    person = history.events[index].words[0]
    last = history.moves[person][-1]
    return _Asked(Query("where_person", (person,)), history.destination(last), (last,))


def _ask_object(history: _History, index: int, draws: Draws) -> _Asked | None:
    """A dropped thing is where its dropper was; a carried one counts after its carrier moved with it."""
    del draws
    event = history.events[index]
    if event.kind == "move" or history.touched[event.words[1]] != index:
        return None
    person, thing = event.words
    moves = history.moves.get(person, [])
    fitting = [m for m in moves if (m < index) == (event.kind == "drop")]
    if not fitting:
        return None
    return _Asked(Query("where_object", (thing,)), history.destination(fitting[-1]), (index, fitting[-1]))


def _ask_before(history: _History, index: int, draws: Draws) -> _Asked | None:
    """Two moves in a row with the thing in hand, to a place that it did not see again on that journey."""
    event = history.events[index]
    if event.kind == "move" or history.touched[event.words[1]] != index:
        return None
    person, thing = event.words
    end = index if event.kind == "drop" else len(history.events)
    start = history.carried.get(thing, end)
    moves = [m for m in history.moves.get(person, []) if start < m < end]
    places = [history.destination(m) for m in moves]
    fitting = [i for i in range(1, len(moves)) if places[i] not in places[i + 1 :]]
    if not fitting:
        return None
    i = draws.choice(fitting)
    return _Asked(Query("before", (thing, places[i])), places[i - 1], (index, moves[i], moves[i - 1]))


def _ask_gift(history: _History, index: int, draws: Draws) -> _Asked | None:
    event = history.events[index]
    if event.kind != "give" or history.given[event.words[1]] != index:
        return None
    person, thing, other = event.words
    later = history.events[index + 1 :]
    if any(e.kind == "give" and (e.words[0], e.words[2]) == (person, other) for e in later):
        group = draws.below(2)  # "What did A give to B?" would have two answers
    else:
        group = draws.below(3)
    short = draws.chance(0.5)
    query, answer = (
        (Query("giver", (thing,)) if short else Query("giver_to", (thing, other)), person),
        (Query("receiver", (thing,)) if short else Query("receiver_from", (person, thing)), other),
        (Query("what_given", (person, other)), thing),
    )[group]
    return _Asked(query, answer, (index,))


_ASK: dict[str, Callable[[_History, int, Draws], _Asked | None]] = {
    "qa1": _ask_person,
    "qa2": _ask_object,
    "qa3": _ask_before,
    "qa5": _ask_gift,
}


def _acted_story(task: str, draws: Draws) -> list[Line]:
    persons = PERSONS_OF[task]
    world = _FileWorld(draws, persons, OBJECTS if task != "qa1" else (), ACTIONS[task])
    history = _History()
    lines: list[Line] = []
    questions = 0
    while questions < QUESTIONS:
        for _ in range(_STATEMENTS):
            event = world.act(persons)
            history.add(event, len(lines) + 1)
            lines.append(Line(len(lines) + 1, word(event, _TAKE_THERE.get(task, 0.0), draws)))
        recent = range(max(0, len(history.events) - _RECENT), len(history.events))
        tries = (_ASK[task](history, index, draws) for index in draws.subset(recent, len(recent)))
        asked = next((found for found in tries if found is not None), None)
        if asked is not None:
            support = tuple(history.numbers[index] for index in asked.support)
            lines.append(Line(len(lines) + 1, write_question(asked.query), asked.answer, support))
            questions += 1
    return lines


def _line_of_rooms(draws: Draws) -> list[Line]:
    """A story of qa4."""
    middle, *outer = draws.subset(PLACES, 3)
    sides = draws.choice(_AXES)
    if draws.chance(0.5):
        sides = sides[::-1]
    events = []
    for room, side, other_side in zip(outer, sides, sides[::-1], strict=True):
        from_outer = draws.chance(_OUTER_FIRST)
        events.append(Event("relation", (room, side, middle) if from_outer else (middle, other_side, room)))
    number = draws.below(2)
    subject, direction, known = events[number].words
    opposite = {a: b for pair in _AXES for a, b in (pair, pair[::-1])}
    query = draws.choice((Query("which_is", (direction, known)), Query("is_of", (known, opposite[direction]))))
    statements = [Line(i + 1, write_statement(event)) for i, event in enumerate(events)]
    return [*statements, Line(3, write_question(query), subject, (number + 1,))]


def simulate_story(task: str, draws: Draws) -> list[Line]:
    """One story of qa1 to qa5 with its questions, as in a bAbI file."""
    assert task in QUESTION_KINDS, task
    return _line_of_rooms(draws) if task == "qa4" else _acted_story(task, draws)


def simulate_sample(task: str, draws: Draws) -> Sample:
    """One question of one story of qa1 to qa5, with the statements before it."""
    return draws.choice(list(samples_of(simulate_story(task, draws))))
