"""The pictures of a report, as PNG files."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm2_jax.figures import new_figure, to_png
from lm2_jax.inspect.collect import TokenReads

MOST_TOKENS = 48  # of a segment, in pictures of single tokens
MOST_BLOCKS = 6  # in one picture
MOST_BINS = 300  # along a text
_LINES = 8  # with names in a legend


def token_reads(reads: TokenReads, texts: Sequence[str], names: tuple[str, str]) -> bytes:
    """Tokens x slots, block by block: the share of each slot in what a token reads, before and after an update."""
    blocks, shown = _chosen(list(reads.before)), slice(max(0, len(texts) - MOST_TOKENS), None)
    slots = max(rows.shape[1] for rows in reads.before.values())
    panel, height = max(2.2, 0.16 * slots), 1.2 + 0.155 * len(texts[shown])
    figure = new_figure(1.3 + 2 * panel * len(blocks), height + 0.6)
    plots = figure.subplots(1, 2 * len(blocks), squeeze=False)[0]
    most = max(float(rows[shown].max()) for part in (reads.before, reads.after) for rows in part.values())
    image = None
    for i, block in enumerate(blocks):
        for j, part in enumerate((reads.before, reads.after)):
            plot = plots[2 * i + j]
            image = plot.imshow(part[block][shown], aspect="auto", cmap="viridis", vmin=0, vmax=most)
            plot.set_title(f"block {block}\n{names[j]}", fontsize=8)
            plot.set_xlabel("slot", fontsize=8)
            plot.tick_params(labelsize=7)
            plot.set_yticks([])
    plots[0].set_yticks(range(len(texts[shown])), [_shown(text) for text in texts[shown]], family="monospace")
    figure.colorbar(image, ax=plots, fraction=0.04, label="share of the read").outline.set_visible(False)
    return to_png(figure)


def slots_over_text(values: Mapping[str, np.ndarray], segment_tokens: int, label: str, first_segment: int = 0) -> bytes:
    """Slots x segments, one panel for each name.

    Args:
      values: name -> [segments N].
      segment_tokens: tokens of a segment.
      label: of the colours.
      first_segment: the segment of the first row.
    """
    names = _chosen(list(values))
    figure = new_figure(8.0, 0.9 + sum(0.7 + 0.11 * min(values[name].shape[1], 24) for name in names))
    heights = [0.7 + 0.11 * min(values[name].shape[1], 24) for name in names]
    plots = figure.subplots(len(names), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for plot, name in zip(plots, names, strict=True):
        binned = _binned(values[name])
        end = (first_segment + len(values[name])) * segment_tokens
        image = plot.imshow(
            binned.T, aspect="auto", cmap="viridis", interpolation="nearest",
            extent=(first_segment * segment_tokens, end, binned.shape[1] - 0.5, -0.5),
        )  # fmt: skip
        plot.set_title(name, fontsize=9, loc="left")
        plot.set_ylabel("slot", fontsize=8)
        plot.tick_params(labelsize=7)
        figure.colorbar(image, ax=plot, fraction=0.04, pad=0.01).outline.set_visible(False)
    plots[-1].set_xlabel("tokens read", fontsize=8)
    figure.suptitle(label, fontsize=10)
    return to_png(figure)


def metrics_over_text(metrics: Mapping[str, np.ndarray], segment_tokens: int) -> bytes:
    """A panel for each metric, a line for each layer that has it."""
    figure = new_figure(8.0, 0.6 + 1.6 * len(metrics))
    plots = figure.subplots(len(metrics), 1, squeeze=False, sharex=True)[:, 0]
    for plot, (name, values) in zip(plots, metrics.items(), strict=True):
        binned = _binned(values)
        at = (np.arange(len(binned)) + 0.5) * len(values) * segment_tokens / len(binned)
        _lines(plot, at, {f"memory {i + 1}": binned[:, i] for i in range(binned.shape[1])})
        plot.set_title(name, fontsize=9, loc="left")
        if name.startswith("gate"):
            plot.set_ylim(0, 1)
    plots[-1].set_xlabel("tokens read", fontsize=8)
    return to_png(figure)


def surprise(losses: np.ndarray, segment_tokens: int, marks: Sequence[int]) -> bytes:
    """Mean loss of each segment along the text; `marks` are tokens where sentences begin that surprised most."""
    count = max(1, len(losses) // segment_tokens)
    parts = np.array_split(losses, count)
    means = np.array([np.nanmean(part) if np.isfinite(part).any() else np.nan for part in parts])
    figure = new_figure(8.0, 2.8)
    plot = figure.add_subplot()
    binned = _binned(means[:, None])[:, 0]
    at = (np.arange(len(binned)) + 0.5) * len(losses) / len(binned)
    plot.plot(at, binned, linewidth=1.2, marker="o" if len(binned) == 1 else None)
    for number, mark in enumerate(marks):
        plot.axvline(mark, color="#c0392b", alpha=0.5, linewidth=0.9, label=None if number else "most surprising")
    _dress(plot)
    if marks:
        plot.legend(frameon=False, fontsize=7)
    plot.set_xlabel("tokens read", fontsize=8)
    plot.set_ylabel("loss per token (nats)", fontsize=8)
    return to_png(figure)


def forgetting(
    norms: Mapping[str, np.ndarray], kept_at: np.ndarray, similarity: Mapping[str, np.ndarray], segment_tokens: int
) -> bytes:
    """Norms of the state along the text, and how much the state then resembles the state at the end."""
    figure = new_figure(8.0, 5.2)
    upper, lower = figure.subplots(2, 1, sharex=True)
    segments = len(next(iter(norms.values())))
    binned = {name: _binned(values[:, None])[:, 0] for name, values in norms.items()}
    bins = len(next(iter(binned.values())))
    _lines(upper, (np.arange(bins) + 1) * segments * segment_tokens / bins, binned)
    upper.set_ylabel("norm of the state", fontsize=8)
    upper.set_ylim(bottom=0)
    _lines(lower, (kept_at + 1) * segment_tokens, similarity)
    lower.axhline(0, color="#777777", linewidth=0.8, linestyle=":")
    lower.set_ylabel("cosine with the state at the end", fontsize=8)
    lower.set_xlabel("tokens read", fontsize=8)
    return to_png(figure)


def _lines(plot: Any, x: np.ndarray, curves: Mapping[str, np.ndarray]) -> None:
    """Curves with a legend, or in the order of a colour map where they are too many for one."""
    from matplotlib import colormaps

    many = len(curves) > _LINES
    for i, (name, y) in enumerate(curves.items()):
        colour = colormaps["viridis"](i / max(len(curves) - 1, 1)) if many else None
        plot.plot(x, y, linewidth=1.2, label=name, color=colour, marker="o" if len(x) == 1 else None)
    _dress(plot)
    if many:
        plot.text(0.99, 0.97, f"{len(curves)} lines, first dark, last light", transform=plot.transAxes, ha="right",
                  va="top", fontsize=7)  # fmt: skip
    elif len(curves) > 1:
        plot.legend(frameon=False, fontsize=7, ncols=2)


def _dress(plot: Any) -> None:
    plot.grid(alpha=0.3)
    plot.spines[["top", "right"]].set_visible(False)
    plot.tick_params(labelsize=7)


def _binned(values: np.ndarray) -> np.ndarray:
    """[segments ...] as means of at most `MOST_BINS` consecutive parts."""
    if len(values) <= MOST_BINS:
        return values
    return np.stack([part.mean(axis=0) for part in np.array_split(values, MOST_BINS)])


def _chosen(items: list[Any]) -> list[Any]:
    """At most `MOST_BLOCKS` of the items, evenly spaced, the first and the last included."""
    if len(items) <= MOST_BLOCKS:
        return items
    return [items[round(i * (len(items) - 1) / (MOST_BLOCKS - 1))] for i in range(MOST_BLOCKS)]


def _shown(text: str) -> str:
    """A token on an axis; a special token has no text, and a dollar would begin a formula."""
    return repr(text)[1:-1].replace(" ", "·").replace("$", r"\$")[:14] or "(special)"
