"""The tables of docs/tpu.md: the commands of each row, and the row that their reports make."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

PROGRAM = "python train.py"
OLD = "†"  # after the command of a row that was not computed again with the versions that the page names
GIB = 2**30

Report = Mapping[str, Any]  # of `train.py --compile-only --json`
Cells = list[str]


class Table(NamedTuple):
    """A kind of table: which commands its rows stand for, and the cells that are computed from their reports."""

    commands: Callable[[Cells, Cells], list[str]]  # cells of the row, cells of the head
    computed: Callable[[Cells, Sequence[Report]], Cells]  # cells of the row; reports in the order of the commands


def compile_command(preset: str, options: str, quick: bool = True) -> str:
    """The command for a preset and for what follows its name, the slice first."""
    words = [PROGRAM, preset, "--compile-only", *["--quick"] * quick, "--topology", options]
    return " ".join(words)


def code(cell: str) -> str:
    """The first code of a cell."""
    found = re.search(r"`([^`]+)`", cell)
    return found[1] if found else ""


def costs_commands(cells: Cells, head: Cells) -> list[str]:
    preset, _, options = code(cells[0]).partition(" ")
    return [compile_command(preset, options)]


def costs(cells: Cells, reports: Sequence[Report]) -> Cells:
    (report,) = reports
    sent = f"{total(report, 'ici_bytes') / 1e9:.1f}"
    if between := total(report, "dcn_bytes"):
        sent += f", and {between / 1e9:.1f} between slices"
    operations = [f"{report['flops'][name]:.2e}".replace("e+", "e") for name in ("model", "traced")]
    return [cells[0], *_memory(report), *operations, _share(report), sent, _bounds(report)]


def slices_commands(cells: Cells, head: Cells) -> list[str]:
    return [compile_command(code(cells[0]), "16xv5e:16x16 --data.rows 256")]


def slices(cells: Cells, reports: Sequence[Report]) -> Cells:
    (report,) = reports
    sent = f"{total(report, 'ici_bytes') / 1e9:.1f}, {total(report, 'dcn_bytes') / 1e9:.2f}"
    bounds = f"{_bounds(report)}; {1e3 * report['floor']['dcn']:.0f}"
    return [cells[0], *_memory(report), _share(report), sent, bounds]


def complete_commands(cells: Cells, head: Cells) -> list[str]:
    preset, _, options = code(cells[0]).partition(" ")
    return [compile_command(preset, options), compile_command(preset, options, quick=False)]


def complete(cells: Cells, reports: Sequence[Report]) -> Cells:
    quick, full = (report["bytes"]["total"] / GIB for report in reports)
    shown = f"{full:.2f}" + ("" if reports[1]["fits"] else ": does not fit")
    return [cells[0], f"{quick:.2f}", shown, f"{full / quick - 1:+.0%}", f"{reports[1]['hbm_bytes'] / GIB:.0f}"]


def scaling_commands(cells: Cells, head: Cells) -> list[str]:
    """One command; `...` is what comes before `--topology` in the first row."""
    options = code(cells[1]).partition("--topology ")[2]
    return [compile_command("lm2_paper_tiny", options)]


def scaling(cells: Cells, reports: Sequence[Report]) -> Cells:
    (report,) = reports
    return [*cells[:2], f"{total(report, 'ici_bytes') / 1e3:.1f}", cells[3]]


def two_scalings_commands(cells: Cells, head: Cells) -> list[str]:
    """A command for each number of shards; the head has the mesh as a function of the number of chips N."""
    chips = int(cells[0].replace(",", ""))
    options = code(cells[1]).partition("--topology ")[2]
    meshes = [re.sub(r"N/(\d+)", lambda found: str(chips // int(found[1])), code(head[column])) for column in (2, 4)]
    return [compile_command("lm2_1p7b", f"{options} {mesh}") for mesh in meshes]


def two_scalings(cells: Cells, reports: Sequence[Report]) -> Cells:
    sent = [f"{total(report, 'ici_bytes') / 1e9:.2f}" for report in reports]
    return [*cells[:2], sent[0], cells[3], sent[1], cells[5]]


# By the first cells of a table's head.
TABLES = {
    ("preset and slice", "mesh"): Table(costs_commands, costs),
    ("preset and slice", "GiB with `--quick`"): Table(complete_commands, complete),
    ("preset", "mesh"): Table(slices_commands, slices),
    ("chips", "command"): Table(scaling_commands, scaling),
    ("chips", "options"): Table(two_scalings_commands, two_scalings),
}
# Columns with the change from the row above, by the column that changes.
CHANGES = {("chips", "command"): {3: 2}, ("chips", "options"): {3: 2, 5: 4}}


class Row(NamedTuple):
    """A row of the page."""

    line: int
    head: Cells
    cells: Cells
    commands: list[str]


def split(line: str) -> Cells:
    """The cells of a line of a table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def joined(cells: Cells) -> str:
    """The line of a table with these cells."""
    return "| " + " | ".join(cells) + " |"


def rows(page: str) -> list[Row]:
    """The rows of all tables of a page that this module knows, in their order."""
    found, head = [], []
    for number, line in enumerate(page.splitlines()):
        if not line.startswith("|"):
            head = []
        elif not head:
            head = split(line)
        elif not line.startswith("|--") and (table := TABLES.get((head[0], head[1]))):
            cells = split(line)
            cells[0] = cells[0].removesuffix(f" {OLD}")
            found.append(Row(number, head, cells, table.commands(cells, head)))
    return found


def written(page: str, reports: Mapping[str, Report]) -> str:
    """The page with every row as its reports make it; a row without reports stays, and is marked as old."""
    lines = page.splitlines()
    above: Cells = []
    for row in rows(page):
        kind = (row.head[0], row.head[1])
        cells = list(row.cells)
        if all(command in reports for command in row.commands):
            cells = TABLES[kind].computed(cells, [reports[command] for command in row.commands])
            is_first = not lines[row.line - 1].startswith("|") or lines[row.line - 1].startswith("|--")
            for column, of in CHANGES.get(kind, {}).items():
                cells[column] = "" if is_first else f"{float(cells[of]) / float(above[of]) - 1:+.1%}"
        else:
            cells[0] += f" {OLD}"
        lines[row.line] = joined(cells)
        above = cells
    return "\n".join(lines) + "\n"


def total(report: Report, name: str) -> float:
    """Bytes that a device sends in a step, in all collectives."""
    return sum(row[name] for row in report["collectives"])


def _memory(report: Report) -> Cells:
    """Mesh, bytes between steps, temporaries with the program, and what the device has."""
    sizes = report["bytes"]
    kept = sum(sizes[name] for name in ("parameters", "optimizer", "state", "batch")) / GIB
    more = (sizes["temporaries"] + sizes["program"]) / GIB
    mesh = " x ".join(str(report["mesh"].get(axis, 1)) for axis in ("data", "fsdp", "model", "slots"))
    return [mesh, f"{kept:.2f}", f"{more:.2f}", f"{report['hbm_bytes'] / GIB:.0f}"]


def _share(report: Report) -> str:
    return f"{report['flops']['compiled'] / report['flops']['traced']:.2f}"


def _bounds(report: Report) -> str:
    return " / ".join(f"{1e3 * report['floor'][name]:.0f}" for name in ("compute", "memory", "ici"))
