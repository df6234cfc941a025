"""Single values out of a table of JSON types, with a message where they are something else."""

from collections.abc import Mapping
from typing import Any

from lm2_jax.errors import UserError


def an_integer(plain: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    """A field that is 0 or a positive integer; absent or null: `default`, which is needed if that is None."""
    value = plain.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"{where}: {name}: expected a positive integer, got {value!r}", status=1)
    return value


def a_number(plain: Mapping[str, Any], name: str, where: str, default: float | None = None) -> float:
    """A field that is a number; absent or null: `default`, which is needed if that is None."""
    value = plain.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"{where}: {name}: expected a number, got {value!r}", status=1)
    return float(value)


def a_switch(plain: Mapping[str, Any], name: str, where: str) -> bool:
    """A field that is true or false."""
    value = plain.get(name)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {name}: expected true or false, got {value!r}", status=1)
    return value
