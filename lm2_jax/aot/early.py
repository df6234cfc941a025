"""Optimised programs before code generation, which takes most of the time of a compilation.

Code generation adds no operation and no collective, but it may add memory: if the code of a fusion needs more on-chip
memory than was planned, libtpu lays out the program again. libtpu has no option to stop after the optimisation, but it
has one to dump the optimised program and its memory use, and it writes that dump before it generates code.
"""

import contextvars
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_PROGRAM = "*after_optimizations_after_buffer_assignment.txt"  # the last dump before code generation
_MEMORY = "*after_optimizations-memory-usage-report.txt"


class Early(NamedTuple):
    """A program that is optimised, laid out and scheduled, without machine code."""

    text: str
    """What `compiled.as_text()` would return."""
    hbm_bytes: int
    """Bytes of a device's memory, arguments and results included."""


def optimised(compile_with: Callable[[dict[str, Any]], Any], poll_seconds: float = 0.5) -> Early | Any:
    """Returns the optimised program as soon as it is dumped; code generation continues in a background thread.

    The process must be left by `os._exit`, which does not wait for that thread.

    Args:
      compile_with: compiles with the compiler options that it is given.
      poll_seconds: interval at which the dump is looked for.
    Returns:
      The program, or what `compile_with` returns if that comes first.
    Raises:
      Exception: whatever `compile_with` raises, such as an error about too little memory.
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
    """Reads libtpu's dump; None while it is incomplete."""
    programs, memories = (list(folder.rglob(pattern)) for pattern in (_PROGRAM, _MEMORY))
    if not programs or not memories:
        return None
    text = programs[0].read_text()
    used = re.search(r"Memory Space: default \(color=0\)\s*Total bytes: (\d+)", memories[0].read_text())
    if used is None or "\nENTRY " not in text or not text.rstrip("\n").endswith("\n}"):
        return None
    return Early(text, int(used[1]))
