"""What a config field declares besides its type: its range, its history, and whether a resumed run may change it.

    rows: Annotated[int, Range(1, 2**20)] = 32                      # checked when the config is made
    z_loss: Annotated[float, Range(0, 1), Since(3, old=0.0)] = 1e-4   # runs of format 2 had none
    log_every: Annotated[int, Range(1, 10**9), FREE] = 10           # a resumed run may have another value

A numeric field without a `Range` takes the first rule of `DEFAULT_RANGES` that matches its name.
"""

import dataclasses
import fnmatch
import functools
import math
import reprlib
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, Literal

NUMBERS = (int, float)


@dataclasses.dataclass(frozen=True)
class Range:
    """Values that a numeric field may have; each element of a tuple is checked."""

    min: float
    max: float
    above: bool = False
    """Whether `min` itself is outside."""
    below: bool = False
    """Whether `max` itself is outside."""
    infinite: bool = False
    """Whether plus infinity is legal, as "no limit"."""

    def holds(self, value: float) -> bool:
        """Whether `value` is inside; NaN never is."""
        if self.infinite and value == math.inf:
            return True
        lowest = self.min < value if self.above else self.min <= value
        highest = value < self.max if self.below else value <= self.max
        return lowest and highest  # both are False for NaN

    def problem(self, value: float) -> str:
        """What `value`, which is outside, must be instead: the bound that it crosses, or both."""
        low = f"{'above' if self.above else 'at least'} {_number(self.min)}"
        high = f"{'below' if self.below else 'at most'} {_number(self.max)}"
        if self.max <= 1 or value != value:  # NaN
            is_closed = not self.above and not self.below
            return (
                f"must lie between {_number(self.min)} and {_number(self.max)}"
                if is_closed
                else (f"must be {low} and {high}")
            )
        if value > self.min:
            return f"must be {high}"
        if self.min == 0:
            return "must be positive" if self.above else "must not be negative"
        return f"must be {low}"


@dataclasses.dataclass(frozen=True)
class Since:
    """A field that did not exist before a format of config.json.

    Attributes:
      format: the first format with the field.
      old: the value that reproduces what a run did before, or a function of the older table that gives it; ...: the
        field's default.
    """

    format: int
    old: Any = ...

    def value(self, cls: type, name: str, table: dict[str, Any]) -> Any:
        """What the field of a class is for an older run, of which `table` has the other fields."""
        if callable(self.old):
            return self.old(table)
        if self.old is not ...:
            return self.old
        return next(field.default for field in dataclasses.fields(cls) if field.name == name)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class Resume:
    """What a resumed run may do with a field; a field without this mark must stay as it was."""

    rule: Literal["free", "grows"]


FREE = Resume("free")
"""The field changes nothing of what a run computes or reads back."""
GROWS = Resume("grows")
"""The value may become larger."""

# The first pattern that matches the name of a field decides.
DEFAULT_RANGES: tuple[tuple[str, type, Range], ...] = (
    ("*seed", int, Range(0, 2**31 - 1)),
    ("*layers", int, Range(0, 9_999)),  # numbers of blocks
    ("num_*", int, Range(0, 2**20)),
    ("*width", int, Range(1, 2**20)),
    ("depth", int, Range(1, 100)),
    ("expansion", int, Range(1, 1000)),
    ("*steps", int, Range(0, 10**9)),
    ("*", int, Range(0, 2**24)),
    ("*bias", float, Range(-100, 100)),
    ("learning_rate", float, Range(0, 1e3, above=True)),
    ("weight_decay", float, Range(0, 1e4)),
    ("beta[0-9]", float, Range(0, 1, below=True)),
    ("momentum", float, Range(0, 1, below=True)),
    ("*_decay", float, Range(0, 1, below=True)),
    ("*epsilon", float, Range(0, 1, above=True)),
    ("*smoothing", float, Range(0, 1, above=True)),
    ("*fraction", float, Range(0, 1)),
    ("*multiplier", float, Range(0, 1e4)),
    ("*clip_norm", float, Range(0, 1e6, above=True, infinite=True)),
    ("*", float, Range(0, 1e6)),
)


class FieldError(ValueError):
    """A value outside its field's range; the message names the field as a flag does."""

    def __init__(self, owner: type, name: str, problem: str):
        super().__init__(owner, name, problem)
        self.owner, self.name, self.problem = owner, name, problem

    def __str__(self) -> str:
        return f"{' or '.join(self.places())} {self.problem}"

    def places(self) -> list[str]:
        """The field with dots, from the root config; more than one where its class is used twice."""
        return [f"{place}.{self.name}".lstrip(".") for place in flag_paths(self.owner) or [self.owner.__name__]]


class Checked:
    """Base of configs: every numeric field is checked against its range before the class's own `__post_init__`."""

    _root: ClassVar[type | None] = None  # the class whose fields the command line sets

    def __init_subclass__(cls, root: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if root:
            Checked._root = cls
        own = getattr(cls, "__post_init__", None)
        if own is None or not getattr(own, "checks_ranges", False):
            setattr(cls, "__post_init__", _checking(own))  # noqa: B010 (a type checker knows no such method here)


def _checking(own: Callable[[Any], None] | None) -> Callable[[Any], None]:
    def post_init(self: Any) -> None:
        check_ranges(self)
        if own is not None:
            own(self)

    setattr(post_init, "checks_ranges", True)  # noqa: B010
    return post_init


def check_ranges(config: Any) -> None:
    """Checks the numeric fields of a config and of the configs in it that do not check themselves.

    Raises:
      FieldError: a value is outside the range, or has another type.
    """
    for name, hint in hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value) and not isinstance(value, Checked):
            check_ranges(value)
        found = number_type(hint)
        if found is None or value is None:
            continue
        allowed = range_of(type(config), name)
        items: Any = value if isinstance(value, tuple) else (value,)
        for item in items:
            number = isinstance(item, int if found is int else NUMBERS) and not isinstance(item, bool)
            if not number or not allowed.holds(item):
                problem = allowed.problem(item) if number else f"must be {'an integer' if found is int else 'a number'}"
                raise FieldError(type(config), name, f"{problem}, got {shown(value)}")


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Field name -> annotation, with its metadata."""
    known = typing.get_type_hints(cls, include_extras=True)
    return {field.name: known[field.name] for field in dataclasses.fields(cls)}


def bare(hint: Any) -> Any:
    """An annotation without metadata and without `| None`."""
    if typing.get_origin(hint) is Annotated:
        return bare(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return bare(rest[0]) if len(rest) == 1 else hint
    return hint


def group(hint: Any) -> Any:
    """The config class or family whose fields a field holds; None for a single value."""
    inner = bare(hint)
    is_config = isinstance(inner, type) and (dataclasses.is_dataclass(inner) or issubclass(inner, Checked))
    return inner if is_config else None


def optional(hint: Any) -> bool:
    """Whether None is a value of the annotation."""
    if typing.get_origin(hint) is Annotated:
        return optional(typing.get_args(hint)[0])
    return type(None) in typing.get_args(hint)


def number_type(hint: Any) -> type | None:
    """Int or float for a numeric field or a tuple of such, else None."""
    hint = bare(hint)
    if typing.get_origin(hint) is tuple:
        hint = bare(typing.get_args(hint)[0])
    return hint if hint in NUMBERS else None


def marks(hint: Any, kind: type) -> Any:
    """The first mark of a kind in an annotation's metadata, or None."""
    metadata = getattr(hint, "__metadata__", ())
    return next((mark for mark in metadata if isinstance(mark, kind)), None)


def range_of(cls: type, name: str) -> Range:
    """The range of a numeric field: declared there, or by its name."""
    hint = hints(cls)[name]
    declared, found = marks(hint, Range), number_type(hint)
    if declared is not None:
        return declared
    return next(
        allowed for pattern, kind, allowed in DEFAULT_RANGES if kind is found and fnmatch.fnmatch(name, pattern)
    )


def flag_paths(cls: type) -> list[str]:
    """Where a config class is found in the root config, as flags name it: the shortest paths."""
    found = [path for path, there in _walk(Checked._root, "", ()) if there is cls] if Checked._root else []
    return [path for path in found if path.count(".") == min(other.count(".") for other in found)]


def _walk(cls: type, path: str, above: tuple[type, ...]) -> Iterator[tuple[str, type]]:
    """Every config class below one, with its path; a class inside itself is entered once."""
    for member in members(cls):
        if member in above:
            continue
        yield path, member
        for name, hint in hints(member).items():
            inner = bare(hint)
            repeated = typing.get_origin(inner) is tuple
            inner = bare(typing.get_args(inner)[0]) if repeated else inner
            if group(inner):
                yield from _walk(group(inner), f"{path}.{name}{'.*' * repeated}".lstrip("."), (*above, member))


def members(cls: type) -> list[type]:
    """The concrete classes of a family, or the class itself."""
    return list(vars(cls)["registry"].values()) if "registry" in vars(cls) else [cls]


def config_classes() -> list[type]:
    """Every class of the root config's tree."""
    return list(dict.fromkeys(cls for _, cls in _walk(Checked._root, "", ()))) if Checked._root else []


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:g}"


def shown(value: Any) -> str:
    """A value in a message: only the beginning of a long or deep one."""
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value[:6]))}{',' * (len(value) == 1)}{', ...' * (len(value) > 6)})"
    return "a number of over 30 digits" if isinstance(value, int) and abs(value) > 10**30 else reprlib.repr(value)
