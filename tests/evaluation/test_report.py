"""Tables, intervals and pictures."""

import io
import json

import matplotlib.image
import numpy as np
import pytest
import rich.console

from lm2_jax.evaluation import report

CELLS = {("qa1", "0k"): 100.0, ("qa1", "1k"): 50.0, ("qa2", "0k"): 20.0}
SECOND = {("qa1", "0k"): 99.0, ("qa1", "1k"): 50.0, ("qa2", "0k"): 0.0}


def test_markdown():
    assert report.markdown_table(CELLS, SECOND, "task").splitlines() == [
        "| task | 0k | 1k |",
        "|---|---|---|",
        "| qa1 | 100.0 / 99.0 | 50.0 / 50.0 |",
        "| qa2 | 20.0 / 0.0 | - |",
        "| mean | 60.0 / 49.5 | 50.0 / 50.0 |",
    ]
    one = {("qa1", "0k"): 1.0}
    assert "mean" not in report.markdown_table(one, one, "task")


def test_console():
    console = rich.console.Console(file=io.StringIO(), width=80)
    console.print(report.console_table(CELLS, "task"))
    lines = console.file.getvalue().splitlines()
    assert any("qa2" in line and "20.0" in line and "-" in line for line in lines)
    assert any("mean" in line and "60.0" in line for line in lines)


def picture(content):
    return matplotlib.image.imread(io.BytesIO(content), format="png")


def test_heat_map():
    """Each cell is in its place: green if good, red if poor, grey if it was not measured."""
    pixels = picture(report.heat_map({"one": (CELLS, CELLS)}, "a title", "a note", ("task", "length")))
    height, width, _ = pixels.shape
    assert height > 300
    assert width > 500
    red, green, blue = (pixels[..., channel] for channel in range(3))
    rows, columns = {}, {}
    for name, mask in {
        "good": (green - red > 0.2) & (green > blue),
        "poor": (red - green > 0.3) & (red > blue),
        "grey": (abs(red - 0.933) < 0.01) & (abs(green - 0.933) < 0.01) & (abs(blue - 0.933) < 0.01),
    }.items():
        mask = mask[:, : int(0.8 * width)]  # without the scale at the right
        assert mask.mean() > 0.02, name
        y, x = mask.nonzero()
        rows[name], columns[name] = y.mean(), x.mean()
    assert rows["good"] < rows["poor"]
    assert abs(rows["poor"] - rows["grey"]) < 0.05 * height
    assert columns["poor"] < columns["grey"]
    assert abs(columns["good"] - columns["poor"]) < 0.05 * width
    other = picture(report.heat_map({"one": (CELLS, SECOND)}, "a title", "a note", ("task", "length")))
    assert (other != pixels).any(), "a strict verdict that differs is shown"


def test_two_panels():
    """A baseline is drawn next to the model."""
    both = picture(
        report.heat_map({"model": (CELLS, CELLS), "baseline": (CELLS, SECOND)}, "t", "n", ("task", "length"))
    )
    alone = picture(report.heat_map({"model": (CELLS, CELLS)}, "t", "n", ("task", "length")))
    assert both.shape[1] > 1.5 * alone.shape[1]


def test_interval():
    """Wilson's interval, against values of R's prop.test(correct=FALSE)."""
    assert report.interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert report.interval(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    assert report.interval(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-6)
    wide, narrow = report.interval(5, 10), report.interval(500, 1000)
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]


def test_accuracy_plot():
    """Chance level, training range and intervals each change the picture."""
    curve = report.Curve(np.arange(4), np.array([20, 15, 10, 5]), np.array([20, 20, 20, 20]))
    plain = picture(report.accuracy_plot({"a": curve}, report.Marks(), "title", ("x", "y")))
    assert plain.shape[0] > 600
    for marks in (report.Marks(chance=16.7), report.Marks(trained=2)):
        assert (picture(report.accuracy_plot({"a": curve}, marks, "title", ("x", "y"))) != plain).any()
    more = curve._replace(correct=curve.correct * 100, asked=curve.asked * 100)
    assert (picture(report.accuracy_plot({"a": more}, report.Marks(), "title", ("x", "y"))) != plain).any()


def test_json():
    assert json.loads(report.to_json({"a": [1.5, "é"]})) == {"a": [1.5, "é"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.to_json({"a": float("nan")})
