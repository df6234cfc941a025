"""What a reader of bAbI statements knows: follows the events and answers questions of qa1 to qa5.

It reads statements only and shares no state with the simulator, so each can check the other.
"""

from typing import NamedTuple

from lm2_jax.data.babi import QUESTION_KINDS, Event, Query

OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


class Known(NamedTuple):
    """An answer that follows from the statements."""

    answer: str
    latest: int  # position of the latest statement that it follows from


class StoryTracker:
    """The knowledge of a reader who takes all statements as one continuous story; later ones override.

    `known[kind][words]` answers every question that has an answer now.
    """

    def __init__(self) -> None:
        self.known: dict[str, dict[tuple[str, ...], Known]] = {
            kind: {} for kinds in QUESTION_KINDS.values() for kind in kinds
        }
        # Person -> objects as keys, in the order in which they were taken: that of a set differs between processes.
        self._carried: dict[str, dict[str, None]] = {}
        self._relations: dict[tuple[str, str, str], int] = {}  # (a, direction, b), north and east only -> position
        self._apply = {
            "move": self._move,
            "take": self._take,
            "drop": self._drop,
            "give": self._give,
            "relation": self._relation,
        }

    def add(self, event: Event, at: int) -> None:
        """Adds one event at position `at` (a line, a token: anything that grows)."""
        self._apply[event.kind](at, *event.words)

    def answer(self, query: Query) -> Known | None:
        """The answer and the position of its latest statement; None where the statements do not determine it."""
        return self.known[query.kind].get(query.words)

    def _place(self, person: str) -> str | None:
        known = self.known["where_person"].get((person,))
        return known.answer if known else None

    def _mention(self, person: str, at: int) -> str | None:
        """Counts every statement about a person as a mention: with others it may give the place."""
        place = self._place(person)
        if place is not None:
            self.known["where_person"][person,] = Known(place, at)
        return place

    def _settle(self, thing: str, place: str | None, at: int) -> None:
        """An object is where the person is who touches it; if it was in another place, its past places are dropped."""
        before = self.known["where_object"].pop((thing,), None)
        if place is None or (before is not None and before.answer != place):
            self._forget_past(thing)
        if place is not None:
            self.known["where_object"][thing,] = Known(place, at)

    def _forget_past(self, thing: str) -> None:
        past = self.known["before"]
        for words in [words for words in past if words[0] == thing]:
            del past[words]

    def _move(self, at: int, person: str, place: str) -> None:
        self.known["where_person"][person,] = Known(place, at)
        for thing in self._carried.get(person, ()):
            before = self.known["where_object"].get((thing,))
            if before is not None and before.answer != place:
                self.known["before"][thing, place] = Known(before.answer, at)
            self.known["where_object"][thing,] = Known(place, at)

    def _hand(self, thing: str, person: str | None) -> None:
        for things in self._carried.values():
            things.pop(thing, None)
        if person is not None:
            self._carried.setdefault(person, {})[thing] = None

    def _take(self, at: int, person: str, thing: str) -> None:
        self._settle(thing, self._mention(person, at), at)
        self._hand(thing, person)

    def _drop(self, at: int, person: str, thing: str) -> None:
        self._settle(thing, self._mention(person, at), at)
        self._hand(thing, None)

    def _give(self, at: int, person: str, thing: str, other: str) -> None:
        here, there = self._mention(person, at), self._mention(other, at)
        if here is not None and there is not None and here != there:
            # Two chained stories contradict each other: the place of these two is unknown.
            for lost in (person, other):
                del self.known["where_person"][lost,]
                for carried in self._carried.get(lost, ()):
                    self._settle(carried, None, at)
            here = None
        self._settle(thing, here, at)
        self._hand(thing, other)
        known = self.known
        known["what_given"][person, other] = Known(thing, at)
        known["giver"][thing,] = known["giver_to"][thing, other] = Known(person, at)
        known["receiver"][thing,] = known["receiver_from"][person, thing] = Known(other, at)

    def _relation(self, at: int, place: str, direction: str, other: str) -> None:
        if direction in ("south", "west"):
            place, direction, other = other, OPPOSITE[direction], place
        pair = {place, other}
        self._relations = {
            (a, way, b): position
            for (a, way, b), position in self._relations.items()
            if {a, b} != pair and (a, way) != (place, direction) and (way, b) != (direction, other)
        }
        self._relations[place, direction, other] = at
        which, of = self.known["which_is"], self.known["is_of"]
        which.clear()
        of.clear()
        for (a, way, b), position in self._relations.items():
            which[way, b] = of[b, OPPOSITE[way]] = Known(a, position)
            which[OPPOSITE[way], a] = of[a, way] = Known(b, position)
