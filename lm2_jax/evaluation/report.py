"""Results as files and pictures; what every suite shares."""

import io
import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import rich.table
from etils import epath

GOOD, POOR = 85.0, 30.0  # per cent: satisfactory above, a failure below (as on the BABILong leaderboard)

Cells = Mapping[tuple[str, str], float]  # (row, column) -> per cent; a missing cell was not measured


def write_files(folder: epath.Path, contents: Mapping[str, bytes]) -> list[epath.Path]:
    """Writes all files, each whole or not at all: first beside their names, then renamed once all are written."""
    token = uuid.uuid4().hex
    written = [(folder / f".{name}-{token}", folder / name) for name in contents]
    try:
        for (temporary, _), content in zip(written, contents.values(), strict=True):
            temporary.write_bytes(content)
        for temporary, final in written:
            temporary.replace(final)
    finally:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)
    return [final for _, final in written]


def to_json(document: Any) -> bytes:
    """Indented JSON; NaN is refused, since no other reader takes it."""
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def to_jsonl(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """One object a line, in ASCII: no other line separator can hide in it."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()


def names_of(cells: Cells) -> tuple[list[str], list[str]]:
    """Rows and columns, each in the order they first occur."""
    return list(dict.fromkeys(row for row, _ in cells)), list(dict.fromkeys(column for _, column in cells))


def column_means(cells: Cells) -> dict[str, float]:
    """Mean of each column over the rows it was measured in."""
    _, columns = names_of(cells)
    means = {}
    for name in columns:
        values = [value for (_, column), value in cells.items() if column == name]
        means[name] = sum(values) / len(values)
    return means


def markdown_table(cells: Cells, second: Cells, corner: str) -> str:
    """A table of `cell / second cell`, with a row of means where there are several rows."""
    rows, columns = names_of(cells)

    def line(name: str, show: Callable[[str], str]) -> str:
        return f"| {name} | " + " | ".join(show(column) for column in columns) + " |"

    lines = [line(corner, str), "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        lines.append(line(row, lambda column, row=row: _pair(cells, second, (row, column))))
    if len(rows) > 1:
        first_means, second_means = column_means(cells), column_means(second)
        lines.append(line("mean", lambda column: f"{first_means[column]:.1f} / {second_means[column]:.1f}"))
    return "\n".join(lines) + "\n"


def _pair(cells: Cells, second: Cells, key: tuple[str, str]) -> str:
    return f"{cells[key]:.1f} / {second[key]:.1f}" if key in cells else "-"


def console_table(cells: Cells, corner: str, means: bool = True) -> rich.table.Table:
    """The table for a terminal: green above 85, red below 30; with `means` several rows are followed by their mean."""
    rows, columns = names_of(cells)
    table = rich.table.Table()
    table.add_column(corner)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row, *(_coloured(cells.get((row, column))) for column in columns))
    if means and len(rows) > 1:
        table.add_section()
        table.add_row("mean", *(_coloured(value) for value in column_means(cells).values()))
    return table


def _coloured(value: float | None) -> str:
    if value is None:
        return "-"
    colour = "green" if value > GOOD else "red" if value < POOR else "yellow"
    return f"[{colour}]{value:.1f}[/{colour}]"


def heat_map(cells: Cells, second: Cells, title: str, note: str, axes: tuple[str, str]) -> bytes:
    """A PNG of the cells as coloured squares with their numbers; `second` in small print where it differs.

    Args:
      cells: per cent by (row, column).
      second: the same cells by another measure.
      title: above the picture.
      note: below it.
      axes: names of the rows and of the columns.
    """
    # The canvas is made here, not by pyplot: no display and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    rows, columns = names_of(cells)
    colours = ["#c0392b", "#e67e5a", "#f6d98b", "#a8d08d", "#2e8b57"]
    stops = [0.0, POOR / 100, (POOR + GOOD) / 200, GOOD / 100, 1.0]
    scale = LinearSegmentedColormap.from_list("verdict", list(zip(stops, colours, strict=True)))
    paint = ScalarMappable(Normalize(0, 100), scale)
    figure = Figure(figsize=(2.9 + 0.95 * max(len(columns), 3), 1.9 + 0.55 * max(len(rows), 2)), layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.add_subplot()
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            _square(plot, paint, x, y, cells.get((row, column)), second.get((row, column)))
    plot.set_xlim(-0.5, len(columns) - 0.5)
    plot.set_ylim(len(rows) - 0.5, -0.5)
    plot.set_xticks(range(len(columns)), columns)
    plot.set_yticks(range(len(rows)), rows)
    plot.tick_params(length=0)
    plot.spines[:].set_visible(False)
    plot.set_ylabel(axes[0])
    plot.set_xlabel(axes[1])
    plot.set_title(title, fontsize=11)
    bar = figure.colorbar(paint, ax=plot, ticks=[0, POOR, GOOD, 100], fraction=0.08)
    bar.outline.set_visible(False)
    figure.supxlabel(note, fontsize=7.5, color="#555555")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=160)
    return content.getvalue()


def line_plot(curves: Mapping[str, tuple[Any, Any]], title: str, x_label: str, y_label: str) -> bytes:
    """A PNG of named curves (x, y), y in per cent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.add_subplot()
    for name, (x, y) in curves.items():
        plot.plot(x, y, marker="o", markersize=4, label=name)
    plot.set_ylim(0, 102)
    plot.grid(alpha=0.3)
    plot.spines[["top", "right"]].set_visible(False)
    plot.set_xlabel(x_label)
    plot.set_ylabel(y_label)
    plot.set_title(title, fontsize=11)
    plot.legend(frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=160)
    return content.getvalue()


def _square(plot: Any, paint: Any, x: int, y: int, value: float | None, second: float | None) -> None:
    """One cell of the heat map."""
    from matplotlib.patches import Rectangle

    colour = "#eeeeee" if value is None else paint.to_rgba(value)
    plot.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=colour, linewidth=0))
    if value is None:
        return
    red, green, blue, _ = paint.to_rgba(value)
    ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "#222222"
    differs = second is not None and abs(second - value) >= 0.05
    plot.text(x, y - (0.1 if differs else 0), f"{value:.0f}", ha="center", va="center", color=ink, fontsize=11)
    if differs:
        plot.text(x, y + 0.27, f"strict {second:.0f}", ha="center", va="center", color=ink, fontsize=6.5)
