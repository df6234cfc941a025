"""Optimised programs before they become machine code, which takes nearly all the time of a compilation.

No operation and no collective is added by then. Memory may be: where a fusion's code needs more on-chip memory than was
planned for it, libtpu lays out the program once more. libtpu cannot be asked to stop; but it writes down the optimised
program and where its arrays lie, if asked to, before it goes on.
"""

import contextvars
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_PROGRAM = "*after_optimizations_after_buffer_assignment.txt"  # the last that is written before code generation
_MEMORY = "*after_optimizations-memory-usage-report.txt"


class Early(NamedTuple):
    """A program that is optimised, laid out and scheduled, but not generated."""

    text: str
    """As `compiled.as_text()` has it."""
    hbm_bytes: int
    """All that it holds in a device's memory, arguments and results included."""


def optimised(compile_with: Callable[[dict[str, Any]], Any], poll_seconds: float = 0.5) -> Early | Any:
    """The optimised program, as soon as it is there; code generation goes on behind it in a thread of its own.

    The process must be left by `os._exit`, which does not wait for that thread.

    Args:
      compile_with: compiles under the options that it is given.
      poll_seconds: how often is looked.
    Returns:
      The program; or what `compile_with` returns, where that was done first.
    Raises:
      Exception: whatever `compile_with` raises, such as a program that does not fit.
    """
    outcome: list[Any] = []
    failure: list[BaseException] = []
    folder = Path(tempfile.mkdtemp(prefix="lm2_jax_compile_"))

    def work() -> None:
        try:
            outcome.append(compile_with({"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}))
        except BaseException as error:
            failure.append(error)

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(work,), daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(poll_seconds)
        early = read_dump(folder)
        if early is not None:
            shutil.rmtree(folder, ignore_errors=True)
            return early
    shutil.rmtree(folder, ignore_errors=True)
    if failure:
        raise failure[0]
    return outcome[0]


def read_dump(folder: Path) -> Early | None:
    """What libtpu has written so far, None as long as that is not the whole program."""
    programs, memories = (list(folder.rglob(pattern)) for pattern in (_PROGRAM, _MEMORY))
    if not programs or not memories:
        return None
    text = programs[0].read_text()
    used = re.search(r"Memory Space: default \(color=0\)\s*Total bytes: (\d+)", memories[0].read_text())
    if used is None or "\nENTRY " not in text or not text.rstrip("\n").endswith("\n}"):
        return None
    return Early(text, int(used[1]))
