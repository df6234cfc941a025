"""Commands of the documentation and of help texts: found, taken apart, and given to the parsers of their programs."""

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import itertools
import json
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn
from unittest import mock

import tyro

import lm2_jax
from lm2_jax.commands import PROGRAMS
from lm2_jax.config import to_dict
from lm2_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.M | re.S)
INDENTED = re.compile(r"(?:^ {4,}\S.*\n)(?:\n*^ {4,}\S.*\n)*", re.M)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
SHELLS = ("bash", "sh", "shell", "console")
OPERATORS = {"&&", "||", ";", "|", "&"}
# What stands for a word of the reader's; other words in capitals are taken as they are.
PLACEHOLDERS = {
    "PRESET": "lm2_tiny",
    "SUITE": "perplexity",
    "PROGRAM": "train",
    "N": "4",
    "S": "0",
    "I": "0",
    "SLICE": "v5e:16x16",
}


# What a program says when its arguments are right as far as they go.
INCOMPLETE = re.compile(
    r"missing; set --|expected [A-Z]+, as in|Required options|"
    r"\(required\)|arguments are required|either --workdir|needs --topology"
)


class Found(NamedTuple):
    """A shell script of one line or more, and where it is."""

    place: str
    script: str
    is_mention: bool = False  # in the middle of a text, where required arguments may be left out


def in_page(place: str, text: str) -> Iterator[Found]:
    """Scripts of a page: blocks of code that are no Python, and code inside its lines that calls a known program."""
    for _, language, block in FENCE.findall(text):
        if language in SHELLS or (not language and not is_python(block)):
            yield Found(place, textwrap.dedent(block))
    prose = re.sub(r"^::: .*\n(?: {4,}.*\n)*", "", FENCE.sub("", text), flags=re.M)  # options of mkdocstrings
    for block in INDENTED.findall(prose):
        if not is_python(block):
            yield Found(place, textwrap.dedent(block))
    yield from in_lines(place, INDENTED.sub("", prose))


def in_lines(place: str, text: str) -> Iterator[Found]:
    """Code inside the lines of a text that calls a known program with arguments."""
    for code in INLINE.findall(text):
        try:
            words = shlex.split(code)
        except ValueError:  # no command
            continue
        named = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))
        if len(named) > 1 and "{" not in code and (program(named[0]) in CHECKS or named[0].endswith(".py")):
            yield Found(place, " ".join(code.split()), True)


def in_source(place: str, source: str) -> Iterator[Found]:
    """Commands in the strings of a module: help texts, descriptions, advice; also lines that begin with a program."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from in_lines(place, node.value)
            text = re.sub(r"\{(train|eval|generate)\}", r"lm2 \1", re.sub(r" *\\\n *", " ", node.value))
            for line in re.findall(r"^ *((?:\S*/)?(?:python3? (?:-m |\S+\.py)|lm2 )\S.*)$", text, re.M):
                if "{" not in line and "`" not in line:
                    yield Found(place, re.split(r" {3,}", line)[0], True)


def is_python(block: str) -> bool:
    """Whether a block of code is Python."""
    try:
        ast.parse(textwrap.dedent(block))
    except SyntaxError:
        return False
    return True


def program(word: str) -> str:
    """The name of a program without its folder and version."""
    return "python" if word.rpartition("/")[2] in ("python", "python3") else word.rpartition("/")[2] or word


def problems(found: Found) -> list[str]:
    """What is wrong with a script: its syntax, a program that nothing here knows, or what a program's parser says."""
    wrong = script_problems(found.script)
    return [what for what in wrong if not (found.is_mention and INCOMPLETE.search(what))]


def script_problems(script: str) -> list[str]:
    """The same, of a script that is to run as it is."""
    script = re.sub(r"\[[A-Z]+( \.\.\.)?\]", "", script)  # an argument that may be left out
    script = re.sub(r"\[?--(section\.field|option) VALUE \.\.\.\]?", "", script)
    shell = subprocess.run(["bash", "-n", "-c", script], capture_output=True, text=True, check=False)
    if shell.returncode:
        return [shell.stderr.strip()]
    values = {name: first for name, first in re.findall(r"\bfor (\w+) in (\S+)", script)}
    script = re.sub(r"\$(\w+)", lambda match: values.get(match[1], match[0]), script)
    wrong = []
    for command in simple_commands(script):
        check = CHECKS.get(program(command[0]))
        if command[0].endswith(".py"):
            check, command = CHECKS["python"], ["python", *command]
        found = [f"no checker knows {command[0]!r}"] if check is None else check(command[1:])
        wrong += [f"{shlex.join(command)}: {what}" for what in found]
    return wrong


def simple_commands(script: str) -> list[list[str]]:
    """The words of each command, without redirections, settings of variables and what makes loops."""
    commands: list[list[str]] = [[]]
    for line in re.sub(r" *\\\n *", " ", script).splitlines():
        line = re.sub(r"(?<=\s)\d?>>?(&\d|\s*[^\s&]+)", "", line)  # redirections
        words = shlex.shlex(re.sub(r"\[(--?[^\]]*)\]", r"\1", line), posix=True, punctuation_chars=True)
        words.whitespace_split = True
        commands.append([])
        for word in words:
            if word in OPERATORS:
                commands.append([])
            elif word not in ("...", ".."):
                commands[-1].append(PLACEHOLDERS.get(word, word))
    return [found for command in commands if (found := _without_shell(command))]


def _without_shell(words: list[str]) -> list[str]:
    while words and (words[0] in ("do", "then", "nohup") or re.match(r"[A-Z_]+=", words[0])):
        words = words[1:]
    return [] if not words or words[0] in ("for", "done", "fi") else words


def check_python(words: list[str]) -> list[str]:
    """A module or a file with its arguments."""
    if words in ([], ["--version"], ["-m"]):  # a name, not a call
        return []
    if words[0] == "-m":
        return check_module(words[1], words[2:])
    file = ROOT / words[0]
    if not file.is_file():
        return [f"no file {words[0]}"]
    known = {f"{name}.py": module for name, (module, _) in PROGRAMS.items()}
    if words[0] in known:
        return check_main(known[words[0]], words[1:]) if words[1:] else []
    return check_main(words[0].removesuffix(".py").replace("/", "."), words[1:])


def check_module(name: str, words: list[str]) -> list[str]:
    """A module that is called with `-m`."""
    if name == "venv":
        return []
    if name == "pytest":
        return check_pytest(words)
    if importlib.util.find_spec(name) is None:
        return [f"no module {name}"]
    if name == "lm2_jax":
        return check_lm2(words)
    is_package = getattr(importlib.util.find_spec(name), "submodule_search_locations", None) is not None
    return check_main(f"{name}.__main__" if is_package else name, words)


def check_lm2(words: list[str]) -> list[str]:
    """A program of the command `lm2`; without arguments only its name."""
    if not words:
        return []
    if words[0] not in PROGRAMS:
        return [f"no program {words[0]}"]
    return check_main(PROGRAMS[words[0]][0], words[1:]) if words[1:] else []


class Parsed(BaseException):
    """A program has accepted its arguments; it goes no further."""


# Where a program that checks more than its parser does begins to work: a function of its module. Others end when
# their parser accepts the arguments.
WORK = {
    "lm2_jax.commands.train": "compile_and_report describe_plan train files.write_text",
    "lm2_jax.commands.eval": "_evaluate",
    "lm2_jax.commands.generate": "_sampling",
    "lm2_jax.commands.compare": "prepare_folder",
    "lm2_jax.data.convert": "convert",
    "lm2_jax.interop.export_hf": "export_workdir",
    "lm2_jax.commands.import_hf": "open_source",
    "lm2_jax.demo.models": "store_model",
    "lm2_jax.inspect.program": "_out_folder",
    "tests.campaign.__main__": "Bench",
    "tests.interop.our_answers": "open_source",
    "tests.interop.our_exports": "write",
    "tests.memory.test_titans_precision": "text",
}


# Modules that only call the program of another one.
SAME_PROGRAM = {
    "lm2_jax.compare.__main__": "lm2_jax.commands.compare",
    "lm2_jax.interop.import_hf": "lm2_jax.commands.import_hf",
}


def check_main(name: str, words: list[str]) -> list[str]:
    """Calls a program until it begins to work.

    Args:
      name: of its module.
      words: its arguments; files that they name as inputs are made in the present folder.
    Returns:
      What the program says against them.
    """
    make_inputs(words)
    name = SAME_PROGRAM.get(name, name)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name in ("torch", "transformers"):  # of comparisons that need an environment of their own
            return []
        return [f"{name} cannot be imported: {error}"]
    out = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", [name, *words]))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(out))
        for target, attribute, value in _ends(name, module):
            stack.enter_context(mock.patch.object(target, attribute, value))
        try:
            (module.main if hasattr(module, "main") else module.table)()
        except Parsed:
            return []
        except UserError as error:
            return [str(error)]
        except SystemExit as error:
            return [] if not error.code else [" ".join(out.getvalue().split())[-400:] or str(error)]
    shows = {"-h", "--help", "--list"} & {*words}
    return [] if shows else ["the program ended before it parsed its arguments"]


def _ends(name: str, module: Any) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    def stop(*_: Any, **__: Any) -> NoReturn:
        raise Parsed

    def parsed(parse: Callable[..., Any]) -> Callable[..., NoReturn]:
        def call(*arguments: Any, **options: Any) -> NoReturn:
            parse(*arguments, **options)
            raise Parsed

        return call

    if name not in WORK:
        yield tyro, "cli", parsed(tyro.cli)
        yield argparse.ArgumentParser, "parse_args", parsed(argparse.ArgumentParser.parse_args)
    for path in WORK.get(name, "").split():
        *parents, attribute = path.split(".")
        target = module
        for parent in parents:
            target = getattr(target, parent)
        yield target, attribute, stop


def make_inputs(words: list[str]) -> None:
    """Makes, in the present folder, the config and the texts that a command reads."""
    for option, value in itertools.pairwise(words):
        path = pathlib.Path(value.replace("**/", "").replace("*", "a"))
        if option not in ("--config", "--text", "--read") or path.is_absolute() or path.exists():
            continue
        if option != "--config" and not path.suffix:
            path = path / "a.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        line = " ".join(["The memory of a reader holds what it has read."] * 40)
        texts = {".json": json.dumps(to_dict(lm2_jax.preset("lm2_tiny"))), ".jsonl": json.dumps({"text": line})}
        path.write_text(texts.get(path.suffix) or f"{line}\n" * 200)


def check_pytest(words: list[str]) -> list[str]:
    """Files and folders of tests, markers, and options of our own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    markers = [line.partition(":")[0] for line in project["tool"]["pytest"]["ini_options"]["markers"]]
    own = "".join(path.read_text() for path in (ROOT / "tests").rglob("conftest.py"))
    wrong = []
    for before, word in zip(["", *words], words, strict=False):
        if before == "-m":
            wrong += [] if word in markers else [f"no marker {word}"]
        elif word.startswith("--"):
            wrong += [] if f'"{word}"' in own else [f"no option {word} in tests/conftest.py"]
        elif before != "-k" and not word.startswith("-"):
            wrong += [] if (ROOT / word).exists() else [f"no tests {word}"]
    return wrong


def check_make(words: list[str]) -> list[str]:
    """Targets of the Makefile."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    return [f"no target {word}" for word in words if "=" not in word and word not in targets]


def check_pip(words: list[str]) -> list[str]:
    """Extras of this project, and files of requirements."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if words[0] not in ("install", "download"):
        return [f"pip has no command {words[0]!r} that is used here"]
    wrong = []
    for before, word in zip(["", *words], words, strict=False):
        named = re.fullmatch(r"(?:\.|lm2[-_]jax)\[(.*)\]", word)
        if named:
            wrong += [f"no extra {extra}" for extra in named[1].split(",") if extra not in extras]
        elif before == "-r" and not (ROOT / word).is_file():
            wrong.append(f"no file {word}")
    return wrong


def check_syntax(words: list[str]) -> list[str]:
    """A program that is not ours: the shell has checked its syntax; commands that it is to run are ours."""
    given = [word for option, word in itertools.pairwise(words) if option == "--command"]
    return [what for script in given for what in script_problems(script)]


# By the name of a program. Those of others are named too, so that a misspelt one is found.
CHECKS: dict[str, Callable[[list[str]], list[str]]] = {
    "python": check_python,
    "lm2": check_lm2,
    "make": check_make,
    "pip": check_pip,
    **dict.fromkeys(("gcloud", "git", "xpk", "xprof", "unzip", "tensorboard", "docker", "curl"), check_syntax),
    **dict.fromkeys((".", "cd", "export", "pre-commit"), check_syntax),
}
