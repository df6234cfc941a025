"""`eval.py recall`: answers counted by the age of their fact."""

import dataclasses
import io
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from etils import epath

import lm2_jax
from lm2_jax.config import DataConfig
from lm2_jax.data.babilong_source import BabilongSource
from lm2_jax.data.pipeline import batches
from lm2_jax.data.text_source import TextFiles
from lm2_jax.errors import UserError
from lm2_jax.evaluation import recall
from tests.data.reading import WordTokenizer

SEGMENTS, ROWS = 6, 8


def run_of(source) -> types.SimpleNamespace:
    """An untrained run, as `load_run` gives it."""
    config = lm2_jax.preset("lm2_tiny")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=1024),
        data=DataConfig(source=source, rows=2, segments=(2,)),
    )
    model = lm2_jax.build_model(config.model)
    tokens = jnp.zeros((1, config.model.segment_tokens), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens, model.init_state(1))["params"]
    return types.SimpleNamespace(config=config, model=model, params=params, step=7, tokenizer=WordTokenizer())


def test_answers_are_counted_by_the_age_of_their_fact(monkeypatch):
    """A model that knows every answer whose token is even has just these right, at every distance."""
    run = run_of(BabilongSource())

    def knows_even(model, params, hidden, targets, chunk):
        losses, _ = recall_losses(model, params, hidden, targets, chunk)
        return losses, jnp.where(targets % 2 == 0, targets, -1)

    recall_losses = recall.token_losses
    monkeypatch.setattr(recall, "token_losses", knows_even)
    counts = recall.count_answers(run, SEGMENTS, ROWS, batch_rows=4)

    data = dataclasses.replace(run.config.data, rows=4, segments=(SEGMENTS,))
    source = data.source.build(run.tokenizer, run.config.model.segment_tokens, data.seed)
    reading = batches(data, source, held_out=True)
    asked, right = np.zeros(SEGMENTS, int), np.zeros(SEGMENTS, int)
    for batch, _ in zip(reading, range(ROWS // 4), strict=False):
        for distance, target in zip(batch.distance.ravel(), batch.targets.ravel(), strict=True):
            if distance >= 0:
                asked[distance] += 1
                right[distance] += target % 2 == 0
    assert asked.min() > 0, "every distance is asked about"
    np.testing.assert_array_equal(counts.asked, asked)
    np.testing.assert_array_equal(counts.right, right)
    assert 0 < right.sum() < asked.sum()
    assert counts.accuracy(1, 2) == right[1:3].sum() / asked[1:3].sum()
    assert recall.Counts(asked[:1], right[:1]).accuracy(1, 4) is None


def test_a_run_on_text_without_questions_is_refused(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"Chapter {name}. It was a dark and stormy night. " * 200)
    with pytest.raises(UserError, match=r"asks no question whose distance is known.*'interleaved'"):
        recall.count_answers(run_of(TextFiles(path=str(tmp_path))), 2, 2, batch_rows=2)


def test_the_report_shows_single_distances_and_their_mean(tmp_path):
    counts = recall.Counts(np.array([10, 10, 10, 10, 10, 0, 0, 0, 4]), np.array([10, 8, 6, 4, 2, 0, 0, 0, 1]))
    result = recall.Result("one", "runs/one", 5, 1000, 64, 9, counts)
    console = rich.console.Console(file=io.StringIO(), width=100)
    paths = recall.show([result, result._replace(name="two")], epath.Path(tmp_path), console)
    assert "mean" not in console.file.getvalue(), "several runs have no mean"
    lines = (tmp_path / "recall.md").read_text().splitlines()
    assert lines[-4].split("|")[3:-1] == [f" {name} " for name in "floats of state/all/0/1/2/3/4/8/1-4".split("/")]
    assert lines[-2] == "| one | 1,000 | 64 | 57.4 | 100.0 | 80.0 | 60.0 | 40.0 | 20.0 | 25.0 | 50.0 |"
    assert {path.name for path in paths} == {"recall.json", "recall.md", "recall.png"}


def test_two_runs_of_one_preset_are_told_apart(tmp_path, monkeypatch):
    good, poor = (recall.Counts(np.array([30, 30]), np.array([right, right])) for right in (30, 3))
    first = recall.Result("one", "runs/a", 5, 1000, 64, 2, good)
    results = [first, first._replace(workdir="runs/b", counts=poor), first._replace(name="two", workdir="runs/c")]
    curves = {}
    monkeypatch.setattr(recall.report, "line_plot", lambda drawn, *texts: curves.update(drawn) or b"")
    console = rich.console.Console(file=io.StringIO(), width=100)
    recall.show([*results, first._replace(segments=1)], epath.Path(tmp_path), console)
    assert list(curves) == ["runs/a", "runs/b", "two"]
    text = (tmp_path / "recall.md").read_text()
    for shown in (text, console.file.getvalue()):
        assert [shown.count(name) for name in ("runs/a", "runs/b", "two")] == [1, 1, 1]
    document = json.loads((tmp_path / "recall.json").read_text())
    assert [(row["preset"], row["workdir"]) for row in document["results"][:2]] == [
        ("one", "runs/a"),
        ("one", "runs/b"),
    ]
