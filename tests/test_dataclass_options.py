"""Options of a program that are the fields of one dataclass."""

import dataclasses
from typing import Annotated

import pytest

from lm2_jax.commands.dataclass_options import First, parse
from lm2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a program."""

    names: Annotated[tuple[str, ...], First()]
    """What is read."""
    out: str
    """Where results go."""
    sizes: tuple[int, ...] | None = None
    """Sizes to try."""
    other: str | None = "here"
    """Another folder."""


def test_words_and_options():
    assert parse(Options, "lm2 x", "", ["a", "b", "--out", "o", "--sizes", "1", "2"]) == Options(
        ("a", "b"), "o", (1, 2)
    )
    assert parse(Options, "lm2 x", "", ["--names", "a", "--out=o"]) == Options(("a",), "o")


def test_a_folder_may_be_called_none():
    """A lower-case `none` was taken for no folder, and an evaluation went without its baseline."""
    words = ["a", "--out", "o", "--other"]
    assert parse(Options, "lm2 x", "", [*words, "none"]).other == "none"
    assert parse(Options, "lm2 x", "", [*words, "None"]).other is None
    assert parse(Options, "lm2 x", "", ["a", "--out", "o", "--sizes", "none"]).sizes is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected NAMES, as in `lm2 x NAMES`"),
        (["a"], "set --out"),
        (["a", "--ot", "o"], r"--ot: no such option\. Did you mean --out\?"),
        (["a", "--out", "o", "--sizes", "x"], "--sizes: expected a whole number, got 'x'"),
    ],
)
def test_wrong_ones_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse(Options, "lm2 x", "", words)


def test_help_shows_what_is_required_and_what_a_value_is_now(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(Options, "lm2 x", "Does something.", ["--help"])
    assert not ended.value.code
    text = capsys.readouterr().out
    assert text.startswith("Does something.\n\nusage: lm2 x NAMES [--option VALUE ...]\n")
    assert "--out TEXT  (required)\n      Where results go." in text
    assert "--sizes INT ...  (now None)" in text
