"""The curves of a training as a picture, from the lines of `metrics.jsonl`."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from lm2_jax.atomic import write_file
from lm2_jax.config import RunConfig
from lm2_jax.figures import new_figure, to_png
from lm2_jax.training.metrics import read_lines
from lm2_jax.training.optim_config import unweighted

FILE = "curves.png"
HELD_OUT = "eval_"


class Panel(NamedTuple):
    """One panel: a metric of training, and the same on held-out examples."""

    metric: str
    title: str
    factor: float = 1.0


PANELS = (
    Panel("loss", "loss that is minimised (nats)"),
    Panel("text_loss", "loss of text tokens (nats)"),
    Panel("answer_accuracy", "correct answers (per cent)", 100.0),
    Panel("grad_norm", "gradient norm before clipping"),
    Panel("learning_rate", "learning rate"),
)


def write(workdir: epath.PathLike, config: RunConfig) -> epath.Path | None:
    """Draws the run of a workdir so far.

    Args:
      workdir: of the run; FILE is written there.
      config: of the run.
    Returns:
      The file, or None where there are no two lines to draw.
    """
    lines = read_lines(workdir)
    if len(lines) < 2:
        return None
    file = epath.Path(workdir) / FILE
    write_file(file, picture(lines, config.name, unweighted(config.loss)))
    return file


def picture(lines: Sequence[Mapping[str, Any]], title: str, without: Collection[str] = ()) -> bytes:
    """A PNG with a panel for each of `PANELS` that the lines have.

    Args:
      lines: of `metrics.jsonl`.
      title: above the picture.
      without: metrics that are left out.
    """
    panels = [panel for panel in PANELS if panel.metric not in without and any(panel.metric in line for line in lines)]
    figure = new_figure(8.0, 0.6 + 1.7 * len(panels))
    plots = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for plot, panel in zip(plots, panels, strict=True):
        for metric, label, style in ((panel.metric, "training", "-"), (HELD_OUT + panel.metric, "held out", "o-")):
            points = [(line["step"], panel.factor * line[metric]) for line in lines if metric in line]
            if points:
                plot.plot(*zip(*points, strict=True), style, linewidth=1.2, markersize=3.5, label=label)
        plot.set_title(panel.title, fontsize=9, loc="left")
        plot.tick_params(labelsize=8)
        plot.spines[["top", "right"]].set_visible(False)
        plot.grid(alpha=0.3)
        if len(plot.lines) > 1:
            plot.legend(frameon=False, fontsize=8)
    plots[-1].set_xlabel("step", fontsize=9)
    plots[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, fontsize=11)
    return to_png(figure)
