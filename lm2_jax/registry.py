"""Families of configs: `kind` names a class, and a class registers itself when it is defined."""

import difflib
from collections.abc import Iterable
from typing import Any, ClassVar, Self

from lm2_jax.errors import UserError
from lm2_jax.fields import Checked


def near_misses(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'a' or 'b'?`, or nothing when no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


class Family(Checked):
    """Base of a family of frozen config dataclasses.

    A direct subclass (`class MemoryConfig(Family)`) opens a family with an empty `registry`. Every class below it must
    set `kind` and is registered under it, unless it is declared with `abstract=True` as a base of several. A kind that
    is already taken is an error.

    Attributes:
      kind: name in config files and on the command line.
      also_called: other names that the command line accepts for this kind.
      registry: kind -> class, one table per family.
      renamed_kinds: of a family, kinds that older config files use -> today's.
      first_kind: of a family, the kind of a table without one, as files have that are older than the family.
    """

    kind: ClassVar[str]
    also_called: ClassVar[tuple[str, ...]] = ()
    registry: ClassVar[dict[str, type[Any]]]
    renamed_kinds: ClassVar[dict[str, str]] = {}
    first_kind: ClassVar[str | None] = None

    def __init_subclass__(cls, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Family in cls.__bases__:
            cls.registry = {}
        elif not abstract and cls.registry.setdefault(cls.kind, cls).__qualname__ != cls.__qualname__:
            raise ValueError(f"{cls.__name__}: kind {cls.kind!r} is taken by {cls.registry[cls.kind].__name__}")

    @classmethod
    def find(cls, kind: str) -> type[Self]:
        """The config class registered as `kind`, or under one of its other names."""
        other_names = {name: member for member in cls.registry.values() for name in member.also_called}
        found = cls.registry.get(kind) or other_names.get(kind)
        if found is None:
            known, misses = sorted(cls.registry), near_misses(kind, [*cls.registry, *other_names])
            raise UserError(f"{cls.__name__}: unknown kind {kind!r}.{misses} Known: {', '.join(known)}")
        return found
