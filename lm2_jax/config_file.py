"""Configs as JSON tables, and back: with a format number, the values of fields that came later, and renames."""

import dataclasses
import json
import os
import re
import typing
from typing import Any, Literal, NamedTuple

from lm2_jax.errors import UserError
from lm2_jax.fields import FieldError, Resume, Since, bare, group, hints, marks, optional, shown
from lm2_jax.registry import Family, near_misses


class Source(NamedTuple):
    """Where a table comes from, for messages and old formats."""

    format: int | None = None  # None: the present one
    status: int = 1  # a damaged file; 2: a wrong command line


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON types; members of a family carry their `kind`, the root config its `format`."""
    plain: dict[str, Any] = {}
    if getattr(config, "format", None) is not None:
        plain["format"] = config.format
    if issubclass(type(config), Family):
        plain["kind"] = config.kind
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        if isinstance(value, tuple):
            value = [to_dict(item) if dataclasses.is_dataclass(item) else item for item in value]
        plain[field.name] = value
    return plain


def from_dict(cls: type[Any], plain: Any, path: str = "config", source: Source = Source()) -> Any:
    """The config that `to_dict` wrote, in this version or an older one.

    A field that a table lacks takes the value it declares for runs that are older than the field (`fields.Since`).

    Args:
      cls: class of the config, or its family.
      plain: the table.
      path: what the table is called in messages.
      source: format and exit status; a root table brings its own format.
    Raises:
      UserError: an unknown or missing key, a wrong type or a value outside its range, named by its path; or a format
        that is newer than this version reads.
    """
    if not isinstance(plain, dict):
        raise _wrong(path, f"expected a table of fields of {cls.__name__}, got {shown(plain)}", source)
    plain = dict(plain)
    if getattr(cls, "format", None) is not None:
        source = source._replace(format=take_format(cls, plain, path, source))
    if issubclass(cls, Family):
        cls = _member(cls, plain.pop("kind", cls.first_kind), path, source)
    follow_renames(cls, plain)
    known = hints(cls)
    for key in plain:
        if key not in known:
            raise _wrong(path, f"unknown {shown(key)}; known: {list(known)}.{near_misses(str(key), known)}", source)
    missing = [name for name, hint in known.items() if name not in plain and not _came_later(hint, source)]
    if missing:
        flags = ", ".join(f"--{_flag(f'{path}.{name}')}" for name in missing)
        raise _wrong(path, f"missing; set {flags}" if source.status == 2 else f"missing {missing}", source)
    values = {
        name: convert(hint, plain[name], f"{path}.{name}".lstrip("."), source)
        if name in plain
        else marks(hint, Since).value(cls, name, plain)
        for name, hint in known.items()
    }
    try:
        return cls(**values)
    except FieldError as error:
        is_here = error.owner is cls
        places = [f"{path}.{error.name}".lstrip(".")] if is_here else error.places()
        if source.status == 2:
            flags = " or ".join(f"--{_flag(place)}" for place in places)
            raise UserError(f"{flags} {error.problem}") from error
        raise UserError(f"{path}.{error.name}: {error.problem}" if is_here else f"{path}: {error}", 1) from error
    except ValueError as error:
        raise _wrong(path, str(error), source) from error


def take_format(cls: Any, plain: dict[str, Any], path: str, source: Source) -> int:
    """Takes format and version out of a root table; the format must be one that this version reads."""
    written, version = plain.pop("format", 1), plain.pop("version", "of a newer version")
    if not isinstance(written, int) or isinstance(written, bool) or written < 1:
        raise _wrong(f"{path}.format", f"expected a positive whole number, got {shown(written)}", source)
    if written > cls.format:
        raise _wrong(
            path,
            f"written in format {written} by lm2_jax {version}; this version reads formats 1 to {cls.format}. "
            "Install the newer version to use it",
            source,
        )
    return written


def _came_later(hint: Any, source: Source) -> bool:
    since = marks(hint, Since)
    return since is not None and source.format is not None and source.format < since.format


def follow_renames(cls: type[Any], plain: dict[str, Any]) -> None:
    """Moves values from the names that older versions used to today's, which may be in a table below."""
    for old, new in getattr(cls, "renamed_fields", {}).items():
        if old in plain and old not in hints(cls):
            table = plain
            *tables, name = new.split(".")
            for step in tables:
                table = table.setdefault(step, {})
            table[name] = plain.pop(old)


def _member(family: type[Family], kind: Any, path: str, source: Source) -> type[Any]:
    """The class that a table's `kind` names."""
    if kind is None:
        raise _wrong(f"{path}.kind", f"missing; known: {sorted(family.registry)}", source)
    if not isinstance(kind, str):
        raise _wrong(f"{path}.kind", f"expected a name, got {shown(kind)}", source)
    try:
        return family.find(family.renamed_kinds.get(kind, kind))
    except UserError as error:
        raise _wrong(f"{path}.kind", str(error), source) from error


def convert(hint: Any, plain: Any, path: str, source: Source) -> Any:
    """`plain` as the annotated type `hint`, of the few kinds that configs use."""
    if plain is None and optional(hint):
        return None
    hint = bare(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if plain not in args:
            misses = near_misses(str(plain), map(str, args))
            raise _wrong(path, f"expected one of {list(args)}, got {shown(plain)}.{misses}", source)
        return plain
    if origin is tuple:
        if not isinstance(plain, list):
            raise _wrong(path, f"expected a list, got {shown(plain)}", source)
        return tuple(convert(args[0], item, f"{path}[{i}]", source) for i, item in enumerate(plain))
    if group(hint):
        return from_dict(group(hint), plain, path, source)
    accepted = (int, float) if hint is float else hint
    if not isinstance(plain, accepted) or (isinstance(plain, bool) and hint is not bool):
        raise _wrong(path, f"expected {hint.__name__}, got {shown(plain)}", source)
    try:
        return float(typing.cast(float, plain)) if hint is float else plain
    except OverflowError:
        raise _wrong(path, f"expected a float, got {shown(plain)}", source) from None


def _flag(path: str) -> str:
    return path.strip("._").replace("_", "-")


def _wrong(path: str, problem: str, source: Source) -> UserError:
    return UserError(f"{path}: {problem}".removeprefix(": "), source.status)


def read_table(path: str | os.PathLike[str], text: str) -> Any:
    """The tables of a JSON or, by its name, YAML file.

    Args:
      path: of the file, for its suffix and messages.
      text: what it holds.
    Raises:
      UserError: it is damaged, or YAML without PyYAML.
    """
    name = os.fspath(path)
    try:
        if name.endswith((".yaml", ".yml")):
            return _yaml(name, text)
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{name}: damaged, not a config file ({problem})", status=1) from error


def _yaml(name: str, text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise UserError(f"{name}: YAML needs PyYAML: `pip install pyyaml`, or write the file as JSON") from error
    try:
        return _numbers(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _numbers(plain: Any) -> Any:
    """YAML takes 1e-3, without a dot, for a text; here it is a number."""
    if isinstance(plain, dict):
        return {key: _numbers(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_numbers(value) for value in plain]
    return float(plain) if isinstance(plain, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", plain, re.I) else plain


class Change(NamedTuple):
    """A field that differs between two configs."""

    name: str  # with dots
    old: Any  # "<absent>" where the config has no such field
    new: Any
    rule: Literal["fixed", "free", "grows"]  # what a resumed run may do with it

    @property
    def allowed(self) -> bool:
        """Whether a run may be resumed with the new value."""
        return self.rule == "free" or (self.rule == "grows" and self.new > self.old)


def changes(old: Any, new: Any) -> list[Change]:
    """The fields that differ between two configs of one class, in order of their names."""
    before, after = _leaves(old, "", None), _leaves(new, "", None)
    absent = ("<absent>", None)
    found = []
    for name in sorted(before.keys() | after.keys()):
        (was, _), (now, rule) = before.get(name, absent), after.get(name, before.get(name, absent))
        now = now if name in after else "<absent>"
        if was != now:
            found.append(Change(name, was, now, "fixed" if rule is None else rule))
    return found


def _leaves(config: Any, path: str, rule: Any) -> dict[str, tuple[Any, Any]]:
    """Field name with dots -> (value, resume rule), where a table's mark holds for all in it."""
    found: dict[str, tuple[Any, Any]] = {}
    if isinstance(config, Family):
        found[f"{path}.kind".lstrip(".")] = config.kind, rule
    for name, hint in hints(type(config)).items():
        value, place = getattr(config, name), f"{path}.{name}".lstrip(".")
        mark = marks(hint, Resume)
        own = mark.rule if mark else rule
        if dataclasses.is_dataclass(value):
            found |= _leaves(value, place, own)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for index, item in enumerate(value):
                found |= _leaves(item, f"{place}.{index}", own)
        else:
            found[place] = value, own
    return found
