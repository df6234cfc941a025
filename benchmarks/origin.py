"""Where a figure comes from: the processor, and the command that was typed."""

import os
import pathlib
import platform
import sys


def machine() -> str:
    """The processor, as the system names it."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{named[0]} ({platform.machine()})" if named else platform.machine()


def cores() -> str:
    """The machine with its number of cores."""
    return f"{machine()}, {os.cpu_count()} cores"


def typed(module: str) -> str:
    """The command line of this process."""
    return " ".join([f"python -m {module}", *sys.argv[1:]])


def told(origins: list[tuple[str, str]]) -> str:
    """Commands and machines of a table, each once, as the lines of a Markdown list."""
    return "".join(f"- `{command}`; {where}\n" for command, where in dict.fromkeys(origins))
