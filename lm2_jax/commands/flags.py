"""Command-line flags as changes to the tables of a config: `--model.memory titans --optim.learning-rate 1e-3`.

A config is held as the table that `to_dict` writes. Flags change the table, and `from_dict` checks the result once, so
that flags and config files share one way in. A flag that names a family (`--model.memory`) replaces the kind and keeps
the fields that both kinds have.
"""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from lm2_jax.config_file import Source, convert, follow_renames, to_dict
from lm2_jax.errors import UserError
from lm2_jax.fields import bare, group, hints, marks, number_type, optional, shown
from lm2_jax.registry import Family, near_misses

# What other programs call a field.
ALSO_CALLED = {
    "lr": "optim.learning_rate",
    "batch_size": "data.rows",
    "max_steps": "optim.steps",
    "num_steps": "optim.steps",
    "output_dir": "workdir",
    "out_dir": "workdir",
    "resume_from": "init.from",
    "hidden_size": "model.decoder.width",
    "d_model": "model.decoder.width",
    "n_layer": "model.decoder.num_layers",
    "n_head": "model.decoder.num_heads",
    "block_size": "model.segment_tokens",
    "seq_len": "model.segment_tokens",
}
FLAGS = Source(status=2)


class Flat:
    """Mark of a field whose own fields are flags without its name in front."""


@dataclasses.dataclass(frozen=True)
class Bare:
    """Mark of a field that a flag without a value sets to `value`."""

    value: Any


class Flag(NamedTuple):
    """One flag as typed."""

    name: str  # with underscores and without dashes
    words: list[str]
    typed: str


class Field(NamedTuple):
    """A place that a flag sets."""

    table: Any  # a dict, or a list of a tuple field
    key: Any
    hint: Any


def split(arguments: Sequence[str]) -> tuple[list[str], list[Flag]]:
    """The words before the first flag, and the flags with the words after each."""
    first: list[str] = []
    flags: list[Flag] = []
    for word in arguments:
        if word.startswith("--") and len(word) > 2:
            typed, equals, value = word.partition("=")
            flags.append(Flag(typed[2:].replace("-", "_"), [value] if equals else [], typed))
        elif flags:
            flags[-1].words.append(word)
        else:
            first.append(word)
    return first, flags


def apply(roots: Sequence[tuple[type, dict[str, Any]]], flags: Sequence[Flag]) -> None:
    """Sets what the flags say in the tables, kinds of families first.

    Args:
      roots: each class of top-level fields with its table.
      flags: as typed; where one is given twice the last counts.
    Raises:
      UserError: no such flag, with what may have been meant, or a value that is none of the field's type.
    """
    problems = apply_all(roots, flags)
    if problems:
        raise problems[0]


def apply_all(roots: Sequence[tuple[type, dict[str, Any]]], flags: Sequence[Flag]) -> list[UserError]:
    """`apply`, which leaves wrong flags out and gives the errors about them."""
    problems: list[UserError] = []
    values: list[Flag] = []

    def attempt(flag: Flag) -> None:
        try:
            _apply_one(roots, flag)
        except UserError as error:
            problems.append(error)

    for flag in sorted(flags, key=lambda flag: flag.name.count(".")):  # a kind decides which fields are below it
        field = find(roots, flag.name)
        if field is not None and group(field.hint):
            attempt(flag)
        else:
            values.append(flag)
    for flag in values:
        attempt(flag)
    return problems


def _apply_one(roots: Sequence[tuple[type, dict[str, Any]]], flag: Flag) -> None:
    field = find(roots, flag.name)
    if field is not None:
        field.table[field.key] = _choose(field, flag) if group(field.hint) else parse(field.hint, flag)
        return
    section, _, last = flag.name.rpartition(".")
    field = find(roots, f"{section}.{last.removeprefix('no_')}".lstrip(".")) if last.startswith("no_") else None
    if field is None or bare(field.hint) is not bool or flag.words:
        raise UserError(f"{flag.typed}: no such option.{suggestion(roots, flag.name)}")
    field.table[field.key] = False


def find(roots: Iterable[tuple[type, dict[str, Any]]], name: str) -> Field | None:
    """The place of a dotted name, or None."""
    return next((field for cls, table in roots if (field := _find(cls, table, name.split(".")))), None)


def _find(cls: type, table: dict[str, Any], names: list[str]) -> Field | None:
    cls = _class(cls, table)
    known = {name.rstrip("_"): (name, hint) for name, hint in hints(cls).items()}
    for name, hint in hints(cls).items():
        if marks(hint, Flat) and (found := _find(bare(hint), table[name], names)):
            return found
    if names[0] not in known or marks(known[names[0]][1], Flat):
        return None
    name, hint = known[names[0]]
    if len(names) == 1:
        return Field(table, name, hint)
    inner, rest = bare(hint), names[1:]
    if typing.get_origin(inner) is tuple:
        items = table.get(name, [])
        if not rest[0].isdecimal() or int(rest[0]) >= len(items):
            return None
        inner = bare(typing.get_args(inner)[0])
        if len(rest) == 1:
            return Field(items, int(rest[0]), inner)
        return _find(group(inner), items[int(rest[0])], rest[1:]) if group(inner) else None
    inner = group(hint)
    if inner is None:
        return None
    if table.get(name) is None:  # an optional group is switched on by a flag of it
        fresh = default_table(_class(inner, {}))
        found = _find(inner, fresh, rest)
        if found is not None:
            table[name] = fresh
        return found
    return _find(inner, table[name], rest)


def _class(cls: type, table: dict[str, Any]) -> type:
    """The class of a table: for a family, the kind that it names, or the one of tables that name none."""
    kind = table.get("kind", cls.first_kind) if issubclass(cls, Family) else None
    return cls if kind is None else cls.find(kind)


def default_table(cls: Any) -> dict[str, Any]:
    """A class's defaults as a table; fields without a default are left out."""
    table: dict[str, Any] = {"kind": cls.kind} if issubclass(cls, Family) else {}
    for field in dataclasses.fields(typing.cast(Any, cls)):
        if field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            continue
        table[field.name] = plain(value)
    return table


def plain(value: Any) -> Any:
    """A field's value as JSON types."""
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def change_kind(family: type[Family], table: dict[str, Any] | None, kind: str, name: str) -> dict[str, Any]:
    """The table of another kind, with what both have taken over.

    Args:
      family: of the field.
      table: of the present kind.
      kind: the one that is wanted.
      name: of the field, for messages.
    Raises:
      UserError: there is no such kind.
    """
    try:
        cls = family.find(kind)
    except UserError as error:
        raise UserError(f"{name}: {str(error).partition(': ')[2]}") from error
    if table is not None and family.find(table["kind"]) is cls:
        return table
    new = default_table(cls)
    for field, hint in hints(cls).items():
        if table is not None and field in table and not group(hint):
            try:
                convert(hint, table[field], field, FLAGS)
            except UserError:
                continue  # the same name, but of another type
            new[field] = table[field]
    return new


def _choose(field: Field, flag: Flag) -> Any:
    """The table after a flag that names a group of fields: another kind, or None for an optional group."""
    cls, table = bare(field.hint), field.table[field.key]
    if len(flag.words) == 1:
        (word,) = flag.words
        if word.lower() == "none" and optional(field.hint):
            return None
        if issubclass(cls, Family):
            return change_kind(cls, table, word, flag.typed)
        if "kind" in hints(cls):
            return table | {"kind": parse(hints(cls)["kind"], flag)}
    names = [f"{flag.typed}.{name}".replace("_", "-") for name in hints(_class(cls, table or {}))]
    if issubclass(cls, Family):
        raise UserError(f"{flag.typed}: expected one kind of {sorted(cls.registry)}, got {flag.words}")
    raise UserError(f"{flag.typed} is a group of options; set one of {', '.join(names)}")


def parse(hint: Any, flag: Flag) -> Any:
    """The words of a flag as a value of a field.

    Raises:
      UserError: they are none of its type.
    """
    none = ("None",) if bare(hint) is str else ("None", "none", "NONE")  # a folder may be called `none`
    if optional(hint) and len(flag.words) == 1 and flag.words[0] in none:
        return None
    mark, hint = marks(hint, Bare), bare(hint)
    if mark is not None and not flag.words:
        return mark.value
    if typing.get_origin(hint) is tuple:
        words = flag.words
        if number_type(hint):
            words = [part for word in words for part in word.split(",") if part]
        return [_word(bare(typing.get_args(hint)[0]), word, flag.typed) for word in words]
    if hint is bool and not flag.words:
        return True
    if len(flag.words) != 1:
        got = f"{len(flag.words)}: {' '.join(flag.words)}" if flag.words else "none"
        raise UserError(f"{flag.typed}: expected one value, got {got}")
    return _word(hint, flag.words[0], flag.typed)


def _word(hint: Any, word: str, typed: str) -> Any:
    if typing.get_origin(hint) is Literal:
        choices = {str(choice): choice for choice in typing.get_args(hint)}
        if word not in choices:
            raise UserError(f"{typed}: expected one of {list(choices)}, got {word!r}.{near_misses(word, choices)}")
        return choices[word]
    if hint is bool:
        if word.lower() not in ("true", "false"):
            raise UserError(f"{typed}: expected True or False, got {word!r}")
        return word.lower() == "true"
    names = {int: "a whole number", float: "a number"}
    try:
        return hint(word)
    except ValueError:
        raise UserError(f"{typed}: expected {names.get(hint, hint)}, got {shown(word)}") from None


def all_flags(roots: Iterable[tuple[type, dict[str, Any]]]) -> Iterator[tuple[str, Any, Any]]:
    """Every flag's name, annotation and present value, in order of the fields."""
    for cls, table in roots:
        yield from _flags(cls, table, "")


def _flags(cls: type, table: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any, Any]]:
    for field, hint in hints(_class(cls, table)).items():
        inner, value = bare(hint), table.get(field)
        name = f"{prefix}{field.rstrip('_')}"
        if marks(hint, Flat):
            yield from _flags(inner, table[field], prefix)
            continue
        yield name, hint, value
        if isinstance(value, dict):
            yield from _flags(inner, value, f"{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, item in enumerate(value):
                yield from _flags(bare(typing.get_args(inner)[0]), item, f"{name}.{index}.")


def is_group(hint: Any) -> bool:
    """Whether a field only holds other fields, and has no kind to choose."""
    cls = group(hint)
    return cls is not None and not issubclass(cls, Family)


def suggestion(roots: Sequence[tuple[type, dict[str, Any]]], name: str) -> str:
    """What an unknown flag may have meant: of another kind, the usual name elsewhere, or one spelled alike."""
    known = [flag for flag, hint, _ in all_flags(roots) if not is_group(hint)]
    family, colon, kind = name.partition(":")
    if colon and family in known:
        return f" Did you mean --{family.replace('_', '-')} {kind}?"
    section, _, last = name.rpartition(".")
    kind = _of_another_kind(roots, section, last)
    if kind:
        return kind
    last = last.removeprefix("no_")
    ends = {flag: flag.rpartition(".")[2] for flag in known}
    initials = {flag: "".join(part[0] for part in end.split("_") if part) for flag, end in ends.items()}
    close = [ALSO_CALLED[last]] if last in ALSO_CALLED else []
    close += [flag for flag, end in ends.items() if end == last or flag == f"{name}_"]
    close += [flag for flag in known if initials[flag] == last and flag.startswith(section)]
    close += difflib.get_close_matches(name, known, n=3, cutoff=0.75)
    near_ends = difflib.get_close_matches(last, list(dict.fromkeys(ends.values())), n=2, cutoff=0.75)
    close += [flag for end in near_ends for flag in known if ends[flag] == end]
    close = [flag for flag in dict.fromkeys(close) if flag in known][:3]
    if not close:
        return " --help lists all."
    return f" Did you mean {' or '.join('--' + flag.replace('_', '-') for flag in close)}?"


def _of_another_kind(roots: Sequence[tuple[type, dict[str, Any]]], section: str, last: str) -> str:
    """Says so where the field exists under another kind of the same family."""
    field = find(roots, section) if section else None
    family = group(field.hint) if field else None
    if field is None or family is None or not issubclass(family, Family):
        return ""
    kinds = [kind for kind, cls in family.registry.items() if last in hints(cls)]
    if not kinds:
        return ""
    typed, now = f"--{section.replace('_', '-')}", (field.table[field.key] or {}).get("kind", "None")
    return f" That is a field of {', '.join(map(repr, kinds))}, but {typed} is {now!r}; add {typed} {kinds[0]}."


def merge(cls: type, table: dict[str, Any], part: Any, path: str, source: Source) -> None:
    """Puts the fields of a partial table into a full one.

    Raises:
      UserError: a field that does not exist, or a table where a value is expected.
    """
    if not isinstance(part, dict):
        raise UserError(f"{path}: expected a table of fields, got {shown(part)}", source.status)
    cls, part = _class(cls, table), dict(part)
    follow_renames(cls, part)
    known = hints(cls)
    for key, value in part.items():
        if key == "kind" and key not in known:
            continue
        if key not in known:
            misses = near_misses(str(key), known)
            raise UserError(f"{path}: unknown {shown(key)}; known: {list(known)}.{misses}", source.status)
        inner = group(known[key])
        if inner is not None and isinstance(value, dict):
            if issubclass(inner, Family) and "kind" in value:
                table[key] = change_kind(inner, table.get(key), str(value["kind"]), f"{path}.{key}.kind")
            if table.get(key) is None:
                table[key] = default_table(_class(inner, value))
            merge(inner, table[key], value, f"{path}.{key}", source)
        else:
            convert(known[key], value, f"{path}.{key}", source)
            table[key] = value
