"""The help of a program, made from field docstrings: the options most people change first, then all by group."""

import ast
import dataclasses
import functools
import inspect
import shutil
import textwrap
import typing
from collections.abc import Sequence
from typing import Any, Literal

from lm2_jax.commands import flags
from lm2_jax.errors import UserError
from lm2_jax.fields import bare, hints, optional
from lm2_jax.registry import Family

FIRST = (
    "workdir",
    "text",
    "optim.steps",
    "optim.learning_rate",
    "data.rows",
    "data.segments",
    "model.segment_tokens",
    "model.decoder.width",
    "model.decoder.num_layers",
    "model.memory",
)


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Field name -> docstring, of a dataclass and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for node, after in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
                docs[node.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    return docs


def show_help(usage: str, roots: Sequence[tuple[type, dict[str, Any]]], problems: Sequence[UserError] = ()) -> None:
    """Prints the options of a program with their present values.

    Args:
      usage: first line.
      roots: each class of top-level fields with its table, as changed by the options of this call.
      problems: options of this call that are wrong.
    Raises:
      UserError: after the help, if there are problems.
    """
    groups: dict[str, list[str]] = {}
    lines: dict[str, str] = {}
    for name, hint, value in flags.all_flags(roots):
        if flags.is_group(hint) and value is not None:
            continue
        lines[name] = _option(name, hint, value, _doc(roots, name))
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    first = [name for name in FIRST if name in lines]
    first = first if len(first) > 2 else []  # a program of few options needs no choice of them
    print(f"usage: {usage}\n")
    for title, names in {"most used": first, **groups}.items():
        if names:
            print(f"{title or 'this call'}:")
            print("\n".join(lines[name] for name in names) + "\n")
    if problems:
        raise UserError("\n".join(map(str, problems)))


def _doc(roots: Sequence[tuple[type, dict[str, Any]]], name: str) -> str:
    for cls, table in roots:
        owner = _owner(cls, table, name.split("."))
        if owner is not None:
            return owner
    return ""


def _owner(cls: type, table: dict[str, Any], names: list[str]) -> str | None:
    """The docstring of the field that a name leads to."""
    cls = cls.find(table["kind"]) if issubclass(cls, Family) and "kind" in table else cls
    for field, hint in hints(cls).items():
        inner = bare(hint)
        if flags.marks(hint, flags.Flat) and (found := _owner(inner, table[field], names)) is not None:
            return found
        if field.rstrip("_") != names[0]:
            continue
        if len(names) == 1:
            return field_docs(cls).get(field, "")
        value = table.get(field)
        if isinstance(value, list):
            return _owner(bare(typing.get_args(inner)[0]), value[int(names[1])], names[2:])
        return _owner(inner, value, names[1:]) if isinstance(value, dict) else None
    return None


def _option(name: str, hint: Any, value: Any, doc: str) -> str:
    width = min(shutil.get_terminal_size().columns, 110)
    inner = bare(hint)
    if isinstance(value, dict):
        value = value["kind"]
    shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    head = f"  --{name.replace('_', '-')} {_values(inner, optional(hint))}".rstrip()
    head += "  (required)" if value is None and not optional(hint) else f"  (now {shown or 'empty'})"
    return textwrap.fill(doc, width, initial_indent=" " * 6, subsequent_indent=" " * 6).join([f"{head}\n", ""])


def _values(hint: Any, or_none: bool) -> str:
    """What a value looks like."""
    if isinstance(hint, type) and issubclass(hint, Family):
        return "{" + ",".join(sorted(hint.registry)) + "}"
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    if typing.get_origin(hint) is tuple:
        return f"{_values(bare(typing.get_args(hint)[0]), False)} ..."
    if hint is bool:
        return ""
    names = {int: "INT", float: "FLOAT", str: "TEXT"}
    return names.get(hint, "GROUP") + ("|None" if or_none else "")
