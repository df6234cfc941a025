"""The origin of a number: the machine, and the command that produced it."""

import os
import pathlib
import platform
import sys


def machine() -> str:
    """The name of the processor."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{named[0]} ({platform.machine()})" if named else platform.machine()


def cores() -> str:
    """The processor and its number of cores."""
    return f"{machine()}, {os.cpu_count()} cores"


def typed(module: str) -> str:
    """The command line of this process."""
    return " ".join([f"python -m {module}", *sys.argv[1:]])


def markdown(origins: list[tuple[str, str]]) -> str:
    """The distinct commands of a table with their machines, as a Markdown list."""
    return "".join(f"- `{command}`; {where}\n" for command, where in dict.fromkeys(origins))
