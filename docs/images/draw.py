"""Draws the pictures of the documentation: `python docs/images/draw.py`."""

import json
import pathlib
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the back end is chosen
from matplotlib.patches import Rectangle

HERE = pathlib.Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results" / "memory_forms.json"
LEAST_ASKED = 100  # questions at a distance, over all seeds

ARMS = {
    "probe_block": ("LM2, block write (ours), a bank in each block", "tab:blue", "o"),
    "probe_mac": ("Titans MAC", "tab:green", "s"),
    "probe_rmt": ("RMT", "tab:orange", "^"),
    "probe_paper": ("LM2, paper write", "tab:purple", "v"),
    "probe_none": ("baseline (no memory)", "tab:gray", "x"),
}
DOCUMENTS = {"A": "#9ecae1", "B": "#fdd0a2", "C": "#a1d99b", "D": "#dadaeb", "E": "#fcbba1", "F": "#c7e9c0"}


def recall() -> None:
    """Accuracy over distance in rows of 16 segments, mean and range of three seeds."""
    results = json.loads(RESULTS.read_text())["results"]
    figure, axes = plt.subplots(figsize=(7.5, 4.9), dpi=130)
    for arm, (name, color, marker) in ARMS.items():
        rows = [r for r in results if r["arm"] == arm and r["segments"] == 16]
        assert len(rows) == 3, f"{arm} has {len(rows)} seeds"
        asked, right = (np.array([r[key] for r in rows]) for key in ("asked", "right"))
        shown = np.flatnonzero(asked.sum(axis=0) >= LEAST_ASKED)
        accuracy = 100 * right[:, shown] / asked[:, shown]
        floats = f"{rows[0]['state_floats']:,} floats of state"
        axes.plot(shown, accuracy.mean(axis=0), color=color, marker=marker, markersize=4, label=f"{name}, {floats}")
        axes.fill_between(shown, accuracy.min(axis=0), accuracy.max(axis=0), color=color, alpha=0.15, linewidth=0)
    axes.axvline(3, color="black", linestyle=":", linewidth=1)
    axes.text(3.1, 3, "longest distance\nin training rows", fontsize=7.5)
    axes.set_ylim(0, 103)
    axes.set_xlabel("distance: segments between the question and the last statement of its fact")
    axes.set_ylabel("accuracy in per cent")
    axes.set_title("Rows of 16 segments of 32 tokens; mean and range of 3 seeds, 2,000 steps", fontsize=9.5)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    figure.tight_layout()
    figure.savefig(HERE / "recall.png")


def _text(axes: Any, x: float, y: float, text: str, **options: Any) -> None:
    axes.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": 8.5, **options})


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], **options: Any) -> None:
    style = {"arrowstyle": "-|>", "linewidth": 1, "color": "black", "shrinkA": 0, "shrinkB": 0, **options}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def _span(axes: Any, row: float, start: float, end: float, document: str | None, height: float = 0.6) -> None:
    color = DOCUMENTS[document[0]] if document else "white"
    axes.add_patch(
        Rectangle(
            (start, row),
            end - start,
            height,
            facecolor=color,
            edgecolor="gray",
            hatch="" if document else "////",
            lw=0.5,
        )
    )
    x = start + 1 if end - start > 2 else (start + end) / 2
    box = None if document else {"facecolor": "white", "edgecolor": "none", "pad": 1}
    _text(axes, x, row + height / 2, document or "padding", fontsize=8.5 if document else 7, bbox=box)


def _batch(axes: Any) -> None:
    """Rows of two steps."""
    T = 2.0
    rows = {
        2.9: ("row 0: ordered, one document\nfrom step to step", [(0, 12, "A")], (0,)),
        1.7: (
            "row 1: ordered, the next document\nbegins at a segment border",
            [(0, 3.2, "B"), (3.2, 4, None), (4, 12, "C")],
            (0, 2),
        ),
        0.5: (
            "row 2: packed, documents may\nbegin inside a segment",
            [(0, 2.9, "D"), (2.9, 3.5, "E"), (3.5, 12, "F")],
            (0,),
        ),
    }
    for y, (label, spans, resets) in rows.items():
        _text(axes, -0.25, y + 0.3, label, ha="right")
        for start, end, document in spans:
            _span(axes, y, start, end, document)
        for segment in range(7):
            axes.plot([segment * T] * 2, [y - 0.05, y + 0.65], color="black", lw=1.2)
        for segment in resets:
            _text(axes, segment * T + 0.06, y + 0.78, "reset", fontsize=7.5, color="firebrick", ha="left")
    for x, number in ((2.45, 0), (3.2, 1), (3.75, 2)):
        _text(axes, x, 0.28, str(number), fontsize=7.5, color="navy")
    _text(axes, 4.1, 0.28, "document, numbered within its segment", fontsize=7.5, color="navy", ha="left")
    for token in np.linspace(8, 10, 9)[1:-1]:
        axes.plot([token] * 2, [2.9, 2.97], color="black", lw=0.6)
    axes.plot([8.5, 8.5], [2.9, 3.5], color="gray", lw=0.8, ls="--")
    axes.plot([9, 9], [2.9, 3.5], color="gray", lw=0.8, ls="--")
    axes.plot([9.5, 9.5], [2.9, 3.5], color="gray", lw=0.8, ls="--")
    _text(axes, 8.1, 3.72, "4 chunks", fontsize=7.5, ha="left")
    _arrow(axes, (8, 4.05), (10, 4.05), arrowstyle="<|-|>")
    _text(axes, 9, 4.22, "segment: T tokens", fontsize=8)
    for first, name in ((0, "step n"), (8, "step n + 1")):
        last = first + 8 if first == 0 else 12
        _arrow(axes, (first + 0.02, 4.65), (last - 0.02, 4.65), arrowstyle="<|-|>")
        _text(axes, (first + last) / 2, 4.85, f"{name}{': K = 4 segments per row' if first == 0 else ''}")
    axes.plot([8, 8], [0.1, 4.75], color="black", lw=1.6, ls="-.")
    axes.plot([4, 4], [0.1, 4.3], color="firebrick", lw=1, ls=":")
    _text(axes, 4, 4.42, "cut: no gradient across (bptt_segments = 2)", fontsize=7.5, color="firebrick")
    axes.set_xlim(-3.6, 12.4)
    axes.set_ylim(0, 5)
    axes.text(12.15, 3.2, "...", fontsize=9)
    axes.set_title("A batch: rows of segments, two steps", fontsize=10, loc="left")


def _segment(axes: Any) -> None:
    """One segment of one block, and what its flow asks the port for."""
    axes.add_patch(Rectangle((-2.1, 0.75), 1.5, 0.9, facecolor="#ffffcc", edgecolor="black"))
    _text(axes, -1.35, 1.33, "state")
    _text(axes, -1.35, 1.0, "is_start", fontsize=7.5, color="firebrick")
    axes.add_patch(Rectangle((10.6, 0.75), 1.5, 0.9, facecolor="#ffffcc", edgecolor="black"))
    _text(axes, 11.35, 1.33, "state")
    _text(axes, 11.35, 1.0, "is_start = false", fontsize=7.5, color="firebrick")
    for token in range(8):
        axes.add_patch(Rectangle((1 + token, 1), 0.9, 0.5, facecolor=DOCUMENTS["A"], edgecolor="gray"))
        _text(axes, 1.45 + token, 1.25, f"x{token}")
    _arrow(axes, (-0.55, 1.4), (0.95, 1.4))
    _text(axes, 0.2, 1.1, "start put in\nif is_start", fontsize=7.5)
    _arrow(axes, (9, 1.25), (10.55, 1.25))
    for token in range(8):
        _arrow(axes, (1.45 + token, 2.3), (1.45 + token, 1.55), color="steelblue", linewidth=0.8)
    axes.plot([-1.35, -1.35, 8.45], [1.65, 2.3, 2.3], color="steelblue", lw=0.9)
    _text(axes, 4.9, 2.55, "port.read: every token asks the state before the segment (store)", color="steelblue")
    for token in range(7):
        _arrow(
            axes,
            (1.45 + token, 0.97),
            (2.45 + token, 0.97),
            color="darkgreen",
            linewidth=0.9,
            connectionstyle="arc3,rad=0.5",
        )
    _text(
        axes,
        4.9,
        0.45,
        "port.remember: advance from token to token, answers included (running memory)",
        color="darkgreen",
    )
    _text(axes, 9.85, 1.5, "port.write:\nthe full segment", fontsize=7.5)
    _text(
        axes,
        4.9,
        0.05,
        "port.attend: causal attention inside the segment, and to the window of the segment before",
        color="dimgray",
    )
    axes.set_xlim(-3.6, 12.4)
    axes.set_ylim(-0.15, 3)
    axes.set_title("One segment in one block: what its flow asks the port for", fontsize=10, loc="left")


def segment() -> None:
    """Rows, segments and documents of a batch; state and port of one segment."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(11, 7), dpi=120, height_ratios=(5, 3.3))
    _batch(top)
    _segment(bottom)
    for axes in (top, bottom):
        axes.axis("off")
    figure.tight_layout()
    figure.savefig(HERE / "segment.png")


if __name__ == "__main__":
    recall()
    segment()
