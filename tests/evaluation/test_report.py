"""Files, tables and the picture."""

import io
import json

import matplotlib.image
import pytest
import rich.console
from etils import epath

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
    """Each cell stands in its place: green where good, red where poor, grey where nothing was measured."""
    pixels = picture(report.heat_map(CELLS, CELLS, "a title", "a note", ("task", "length")))
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
    other = picture(report.heat_map(CELLS, SECOND, "a title", "a note", ("task", "length")))
    assert (other != pixels).any(), "a strict verdict that differs is shown"


def test_files_are_replaced_whole(tmp_path):
    folder = epath.Path(tmp_path)
    (tmp_path / "a.json").write_text("old")
    paths = report.write_files(folder, {"a.json": b"new", "b.md": b"more"})
    assert [path.name for path in paths] == ["a.json", "b.md"]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "new", "b.md": "more"}


def test_a_failure_leaves_the_old_files(tmp_path):
    """The second file cannot be written, so the first is not replaced and nothing half-written stays."""
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(OSError, match="no-folder"):
        report.write_files(epath.Path(tmp_path), {"a.json": b"new", "no-folder/b.md": b"more"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "old"}


def test_json():
    assert json.loads(report.to_json({"a": [1.5, "é"]})) == {"a": [1.5, "é"]}
    assert report.to_jsonl([{"a": "x\ny"}, {"a": 2}]).decode().splitlines() == ['{"a": "x\\ny"}', '{"a": 2}']
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.to_json({"a": float("nan")})
