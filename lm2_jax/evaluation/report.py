"""Tables, JSON and pictures of results. rich and matplotlib are imported where they are used."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lm2_jax.figures import new_figure, to_png

GOOD, POOR = 85.0, 30.0  # per cent: satisfactory above, a failure below (as on the BABILong leaderboard)

Cells = Mapping[tuple[str, str], float]  # (row, column) -> per cent; a missing cell was not measured


def to_json(document: Any) -> bytes:
    """Indented JSON; NaN is refused, since other readers do not accept it."""
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def interval(correct: int, asked: int) -> tuple[float, float]:
    """The 95% confidence interval of a share: Wilson's score interval, which is valid for few answers and near 0 and 1.

    Args:
      correct: correct answers.
      asked: all answers, at least 1.
    """
    z, share = 1.959964, correct / asked
    centre = share + z * z / (2 * asked)
    spread = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    scale = 1 + z * z / asked
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def names_of(cells: Cells) -> tuple[list[str], list[str]]:
    """Rows and columns, each in the order of their first occurrence."""
    return list(dict.fromkeys(row for row, _ in cells)), list(dict.fromkeys(column for _, column in cells))


def column_means(cells: Cells) -> dict[str, float]:
    """Mean of each column over the rows in which it was measured."""
    _, columns = names_of(cells)
    means = {}
    for name in columns:
        values = [value for (_, column), value in cells.items() if column == name]
        means[name] = sum(values) / len(values)
    return means


def markdown_table(cells: Cells, second: Cells, corner: str) -> str:
    """A table of `cell / second cell`, with a row of means if there are several rows."""
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


def console_table(cells: Cells, corner: str, means: bool = True) -> Any:
    """The table for a terminal: green above 85, red below 30; with `means`, several rows are followed by their mean."""
    import rich.table

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


def heat_map(panels: Mapping[str, tuple[Cells, Cells]], title: str, note: str, axes: tuple[str, str]) -> bytes:
    """A PNG of tables as coloured squares with their numbers, side by side.

    Args:
      panels: by heading, per cent by (row, column) and the same cells by a second measure, which is shown in small
        print where it differs.
      title: above the picture.
      note: the caption.
      axes: names of the rows and of the columns.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    sizes = [tuple(map(len, names_of(cells))) for cells, _ in panels.values()]
    width = 1.2 + sum(1.2 + 0.95 * max(columns, 3) for _, columns in sizes)
    figure = new_figure(max(width, 5.0), 2.5 + 0.55 * max(max(rows for rows, _ in sizes), 2))
    colours = ["#c0392b", "#e67e5a", "#f6d98b", "#a8d08d", "#2e8b57"]
    stops = [0.0, POOR / 100, (POOR + GOOD) / 200, GOOD / 100, 1.0]
    scale = LinearSegmentedColormap.from_list("verdict", list(zip(stops, colours, strict=True)))
    paint = ScalarMappable(Normalize(0, 100), scale)
    plots = figure.subplots(1, len(panels), squeeze=False, width_ratios=[max(columns, 3) for _, columns in sizes])[0]
    for plot, (heading, (cells, second)) in zip(plots, panels.items(), strict=True):
        _draw_table(plot, paint, cells, second)
        plot.set_title(heading, fontsize=9)
        plot.set_xlabel(axes[1])
    plots[0].set_ylabel(axes[0])
    bar = figure.colorbar(paint, ax=plots, ticks=[0, POOR, GOOD, 100], fraction=0.08)
    bar.outline.set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(_wrapped(note, max(width, 5.0)), fontsize=7.5, color="#555555")
    return to_png(figure)


class Curve(NamedTuple):
    """Numbers of correct answers and of questions, by some x."""

    x: np.ndarray
    correct: np.ndarray
    asked: np.ndarray


class Marks(NamedTuple):
    """Reference lines of a plot of accuracy."""

    chance: float | None = None  # per cent: a horizontal line
    chance_name: str = "chance"
    trained: float | None = None  # x: a vertical line
    trained_name: str = "longest distance in training"


def accuracy_plot(
    curves: Mapping[str, Curve],
    marks: Marks,
    title: str,
    labels: tuple[str, str],
    note: str = "",
    *,
    log_x: bool = False,
) -> bytes:
    """A PNG of accuracy curves with their 95% confidence intervals.

    Args:
      curves: by the name of the model.
      marks: chance level and training range.
      title: above the picture.
      labels: of the x and the y axis.
      note: the caption.
      log_x: whether the x axis is logarithmic.
    """
    figure = new_figure(7.6, 4.9)
    plot = figure.add_subplot()
    for name, (x, correct, asked) in curves.items():
        if not len(x):
            continue
        (line,) = plot.plot(x, 100 * correct / asked, marker="o", markersize=4, label=name)
        bounds = np.array([interval(int(c), int(a)) for c, a in zip(correct, asked, strict=True)]) * 100
        plot.fill_between(x, bounds[:, 0], bounds[:, 1], alpha=0.18, color=line.get_color(), linewidth=0)
    if marks.chance is not None:
        label = f"{marks.chance_name} ({marks.chance:.0f}%)"
        plot.axhline(marks.chance, color="#777777", linestyle=":", linewidth=1.2, label=label)
    if marks.trained is not None:
        plot.axvline(marks.trained, color="#777777", linestyle="--", linewidth=1.0, label=marks.trained_name)
    plot.set_ylim(0, 102)
    if log_x:
        plot.set_xscale("log")
    else:
        plot.xaxis.get_major_locator().set_params(integer=True)
    plot.grid(alpha=0.3)
    plot.spines[["top", "right"]].set_visible(False)
    plot.set_xlabel(labels[0])
    plot.set_ylabel(labels[1])
    plot.set_title(title, fontsize=11)
    plot.legend(frameon=False, fontsize=8)
    figure.supxlabel(_wrapped(note, 7.6), fontsize=7.5, color="#555555")
    return to_png(figure)


def _wrapped(note: str, inches: float) -> str:
    """A caption in lines that fit the width of a figure."""
    import textwrap

    return "\n".join(part for line in note.split("\n") for part in textwrap.wrap(line, int(17 * inches)) or [""])


def _draw_table(plot: Any, paint: Any, cells: Cells, second: Cells) -> None:
    """One panel of the heat map."""
    rows, columns = names_of(cells)
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            _draw_cell(plot, paint, x, y, cells.get((row, column)), second.get((row, column)))
    plot.set_xlim(-0.5, len(columns) - 0.5)
    plot.set_ylim(len(rows) - 0.5, -0.5)
    plot.set_xticks(range(len(columns)), columns)
    plot.set_yticks(range(len(rows)), rows)
    plot.tick_params(length=0)
    plot.spines[:].set_visible(False)


def _draw_cell(plot: Any, paint: Any, x: int, y: int, value: float | None, second: float | None) -> None:
    """One cell of the heat map; grey if it was not measured."""
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
