"""The base of all suites of `eval.py`: loads the runs, makes the output folder, prints, and writes the results."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from lm2_jax import atomic
from lm2_jax.evaluation.answerer import LayoutOf, RunAnswerer
from lm2_jax.folders import prepare_folder
from lm2_jax.registry import Family
from lm2_jax.training.hosts import run_on_all_hosts


class Output:
    """Where an evaluation prints and writes; on several processes only the first one prints.

    Args:
      folder: folder of the results; it exists.
    """

    def __init__(self, folder: epath.Path):
        import rich.console  # slow to import, so only where something is printed

        self.folder = folder
        self._console = rich.console.Console(highlight=False, quiet=jax.process_index() != 0)

    def show(self, content: Any) -> None:
        """Prints a text or a table."""
        self._console.print(content, soft_wrap=isinstance(content, str))


Evaluation = Callable[[Output], Mapping[str, bytes]]
"""Evaluates and prints; returns the contents of the result files by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite(Family):
    """Base of all suites. The fields are the options of the command line, and `kind` is the name of the subcommand.

    A suite says which runs it evaluates (`evaluated`) and how (`plan`); everything else happens here.
    """

    out: str | None = None
    """Folder of the results, local or a bucket; default: WORKDIR/eval of the first run."""
    batch_rows: int = 32
    """Maximum number of prompts or rows that are read at the same time."""

    def __post_init__(self) -> None:
        self.check_positive("batch_rows")

    def check_positive(self, *fields: str) -> None:
        """Refuses fields below 1."""
        for name in fields:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def evaluated(self) -> tuple[str, ...]:
        """Workdirs of the runs to load."""
        raise NotImplementedError

    def plan(self, answerers: Sequence[RunAnswerer]) -> Evaluation:
        """Checks all input, files included, and returns the evaluation; nothing is written here.

        Args:
          answerers: the runs of `evaluated`, in this order.
        Raises:
          UserError: bad input.
        """
        raise NotImplementedError

    def main(self, layout_of: LayoutOf | None = None) -> None:
        """Evaluates, prints, and writes the results: all files or none.

        Args:
          layout_of: gives the devices for a run's config; None: the first device.
        Raises:
          UserError: bad input; if it is found before the evaluation starts, no folder is made.
        """
        answerers = [RunAnswerer.load(workdir, layout_of) for workdir in self.evaluated()]
        evaluation = self.plan(answerers)
        folder = epath.Path(self.evaluated()[0]) / "eval" if self.out is None else epath.Path(self.out)
        is_first = jax.process_index() == 0
        run_on_all_hosts(lambda: prepare_folder(folder) if is_first else folder)
        output = Output(folder)
        contents: dict[epath.PathLike, bytes | str] = {
            folder / name: content for name, content in evaluation(output).items()
        }
        run_on_all_hosts(lambda: atomic.write_files(contents) if is_first else [])
        for path in contents:
            output.show(f"wrote {path}")
