"""The question sets of BABILong: read from published files, or built from bAbI and a background text."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from etils import epath

from lm2_jax import babilong
from lm2_jax.babilong import Sample
from lm2_jax.data.background import open_background
from lm2_jax.data.base import Tokenizer
from lm2_jax.data.protocol import build_babilong_set
from lm2_jax.errors import UserError
from lm2_jax.evaluation.published import read_set, select_files


class QuestionSet(NamedTuple):
    """One task at one length."""

    task: str
    length: str
    samples: Callable[[], list[Sample]]  # reads or builds them: a set is in memory only while it is evaluated


def published_sets(
    data_dir: epath.PathLike, tasks: Sequence[str] = (), lengths: Sequence[str] = (), samples: int = 100
) -> list[QuestionSet]:
    """The first `samples` rows of each published set; every file is read and checked here.

    Raises:
      UserError: as `select_files` and `read_samples`.
    """
    files = select_files(data_dir, tasks, lengths)
    for paths in files.values():
        read_set(paths)
    return [
        QuestionSet(task, length, functools.partial(_first, paths, samples)) for (task, length), paths in files.items()
    ]


def _first(paths: tuple[epath.Path, ...], samples: int) -> list[Sample]:
    return read_set(paths)[:samples]


def built_sets(
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    lengths: Sequence[str],
    samples: int = 100,
    *,
    babi_dir: str | None = None,
    books_dir: str | None = None,
    seed: int = 0,
) -> list[QuestionSet]:
    """Sets that are built from text which training never reads; all files are opened and checked here.

    Args:
      tokenizer: counts the tokens of the contexts.
      tasks: `qa1` to `qa20`; without `babi_dir` to `qa5`.
      lengths: see `lm2_jax.babilong.length_tokens`.
      samples: questions of each set; the same ones at every length.
      babi_dir: bAbI's files, of which the test questions are used; None: the simulator.
      books_dir: books for the background; None: generated prose.
      seed: chooses questions and background.
    Raises:
      UserError: an unknown task or length, a missing folder or file, or too few questions.
    """
    for task in tasks:
        babilong.labels(task)
    names = list(dict.fromkeys(map(babilong.length_name, lengths)))
    for name, folder in {"babi_dir": babi_dir, "books_dir": books_dir}.items():
        if folder is not None and not epath.Path(folder).is_dir():
            raise UserError(f"{name}={folder!r}: no such folder")
    open_background(books_dir)

    def build(task: str, tokens: int) -> list[Sample]:
        rows = build_babilong_set(task, tokens, samples, tokenizer, babi_dir=babi_dir, books_dir=books_dir, seed=seed)
        return [Sample(**row) for row in rows]

    for task in tasks:
        build(task, 0)  # reads the task's file; a context of 0 tokens costs next to nothing
    return [
        QuestionSet(task, length, functools.partial(build, task, babilong.length_tokens(length)))
        for length in names
        for task in dict.fromkeys(tasks)
    ]
