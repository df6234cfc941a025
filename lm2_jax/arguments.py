"""Command lines of the programs that are parsed by argparse: a wrong one is a `UserError` like any other."""

import argparse
import re
from typing import NoReturn

from lm2_jax.errors import UserError
from lm2_jax.registry import near_misses

_TYPES = {"int": "a whole number", "float": "a number"}


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one message, with what may have been meant; options are not abbreviated."""

    def __init__(self, **options: object):
        super().__init__(**({"allow_abbrev": False} | options))  # pyright: ignore[reportArgumentType]

    def error(self, message: str) -> NoReturn:
        """Raises the UserError for argparse's message."""
        raise UserError(self._in_our_words(message))

    def _in_our_words(self, message: str) -> str:
        if found := re.fullmatch(r"unrecognized arguments: (.*)", message):
            word = next((word for word in found[1].split() if word.startswith("-")), found[1])
            name = word.partition("=")[0]
            return f"{name}: no such option.{near_misses(name, self._options()) or ' --help lists all.'}"
        if found := re.fullmatch(r"argument (.*): invalid (int|float) value: (.*)", message):
            return f"{found[1]}: expected {_TYPES[found[2]]}, got {found[3]}"
        if found := re.fullmatch(r"argument (.*): invalid choice: '(.*)' \(choose from (.*)\)", message):
            known = re.findall(r"[\w-]+", found[3])
            return f"{found[1]}: expected one of {known}, got {found[2]!r}.{near_misses(found[2], known)}"
        return message.removeprefix("argument ")

    def _options(self) -> list[str]:
        """The options of this parser and of those of its commands."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                known += [name for parser in action.choices.values() for name in parser._options()]
        return list(dict.fromkeys(known))
