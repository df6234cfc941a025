"""Computes the tables of docs/tpu.md again: runs the command of each row, and keeps its report with the versions.

`python -m benchmarks.tpu_rows` needs libtpu (requirements-tpu.txt), no TPU, and hours on two cores. Rows that have a
report of these versions are not run again. `--only TEXT` takes the commands that contain TEXT; `--write` only writes
the reports that there are into the page.
"""

import argparse
import importlib.metadata
import json
import pathlib
import platform
import shlex
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks import origin, tpu_table

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tpu.md"
RESULTS = ROOT / "benchmarks" / "results" / "tpu_rows.json"
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")


def versions() -> dict[str, str]:
    """The interpreter, and the packages that a compiled program depends on."""
    try:
        return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise SystemExit(f"error: {error.name} is not installed; pip install -r requirements-tpu.txt") from error


def read() -> dict[str, dict[str, Any]]:
    """Results so far, by command."""
    if not RESULTS.exists():
        return {}
    return {row["command"]: row for row in map(json.loads, RESULTS.read_text().splitlines())}


def write(results: dict[str, dict[str, Any]], page: str) -> None:
    """Writes a line per command, in the order of the page; those that the page no longer has are dropped."""
    order = dict.fromkeys(command for row in tpu_table.rows(page) for command in row.commands)
    RESULTS.write_text("".join(json.dumps(results[command]) + "\n" for command in order if command in results))


def compiled(command: str) -> dict[str, Any]:
    """The report of a command; one that does not fit ends with status 1 and has a report too."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "report.json"
        words = shlex.split(command.removeprefix("python "))
        done = subprocess.run([sys.executable, *words, "--json", str(file)], cwd=ROOT, check=False)
        if done.returncode not in (0, 1) or not file.exists():
            raise SystemExit(f"{command}\nended with status {done.returncode} and no report")
        return json.loads(file.read_text())


def main() -> None:
    """Computes what is missing, and writes results and page after each command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="take the commands that contain TEXT")
    parser.add_argument("--write", action="store_true", help="write the reports that there are into the page, no more")
    options = parser.parse_args()
    page, results = PAGE.read_text(), read()
    commands = dict.fromkeys(command for row in tpu_table.rows(page) for command in row.commands)
    chosen = [command for command in commands if options.only in command]
    for number, command in enumerate([] if options.write else chosen, 1):
        if results.get(command, {}).get("versions") == versions():
            continue
        print(f"\n[{number} of {len(chosen)}] {command}", flush=True)
        report = compiled(command)
        results[command] = {
            "command": command, "versions": versions(), "machine": origin.cores(), "report": report
        }  # fmt: skip
        write(results, page)
    PAGE.write_text(tpu_table.written(page, {command: row["report"] for command, row in results.items()}))


if __name__ == "__main__":
    main()
