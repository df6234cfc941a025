"""Families of configs: `kind` names a class, and a class registers itself by being defined."""

import difflib
from typing import Any, ClassVar, Self

from lm2_jax.errors import UserError


def near_misses(name: str, known: list[str]) -> str:
    """` Did you mean 'a' or 'b'?`, or nothing when no known name is close."""
    close = difflib.get_close_matches(name, known, n=3)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


class Family:
    """Base of a family of frozen config dataclasses.

    A direct subclass (`class MemoryConfig(Family)`) opens a family with an empty `registry`; every class below it
    must set `kind` and is entered under it, unless it is declared with `abstract=True` as a base of several. A kind
    that is taken already is an error.
    """

    kind: ClassVar[str]
    registry: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(cls, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Family in cls.__bases__:
            cls.registry = {}
        elif not abstract and cls.registry.setdefault(cls.kind, cls).__qualname__ != cls.__qualname__:
            raise ValueError(f"{cls.__name__}: kind {cls.kind!r} is taken by {cls.registry[cls.kind].__name__}")

    @classmethod
    def find(cls, kind: str) -> type[Self]:
        """The config class registered as `kind`."""
        if kind not in cls.registry:
            known = sorted(cls.registry)
            raise UserError(f"{cls.__name__}: unknown kind {kind!r}; known: {known}.{near_misses(kind, known)}")
        return cls.registry[kind]
