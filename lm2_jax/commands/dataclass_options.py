"""Programs whose options are the fields of one dataclass: `lm2 import`, `export`, `compare` and `convert`."""

import sys
from collections.abc import Sequence
from typing import TypeVar

from lm2_jax.commands import flags
from lm2_jax.commands.usage import show_help
from lm2_jax.config import from_dict
from lm2_jax.errors import UserError
from lm2_jax.fields import hints, marks

T = TypeVar("T")


class First:
    """Mark of the field that the words before the first option set."""


def parse(cls: type[T], program: str, about: str, arguments: Sequence[str] | None = None) -> T:
    """The options of this process.

    Args:
      cls: dataclass of the options; at most one field is marked with `First`.
      program: how it is called, for help and messages.
      about: what the help begins with.
      arguments: of the program; None: those of the process.
    Returns:
      The options; after `--help` the process ends.
    Raises:
      UserError: an option that does not exist, is missing or has a wrong value.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    words, typed = flags.split([word for word in arguments if word not in ("-h", "--help")])
    table = flags.default_table(cls)
    roots = [(cls, table)]
    place = next((name for name, hint in hints(cls).items() if marks(hint, First)), None)
    if len(words) < len(arguments) and {"-h", "--help"} & {*arguments}:
        print(f"{about.strip()}\n")
        first = f" {place.upper()}" if place else ""
        show_help(f"{program}{first} [--option VALUE ...]", roots, flags.apply_all(roots, typed))
        sys.exit(0)
    if words and place is None:
        raise UserError(f"{program}: expected options (--name VALUE), got {' '.join(words)!r}")
    if place is not None:
        typed = [flags.Flag(place, words, place.upper())] * bool(words) + typed
        if not words and place not in table and place not in {flag.name for flag in typed}:
            raise UserError(f"expected {place.upper()}, as in `{program} {place.upper()}`; {program} --help says more")
    flags.apply(roots, typed)
    return from_dict(cls, table, "", flags.FLAGS)
