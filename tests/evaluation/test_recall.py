"""`eval.py recall`: answers counted by the distance of their fact."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm2_jax
from lm2_jax.config import DataConfig
from lm2_jax.data.babilong_source import BabilongSource
from lm2_jax.data.pipeline import batches
from lm2_jax.data.text_source import TextFiles
from lm2_jax.errors import UserError
from lm2_jax.evaluation import recall
from lm2_jax.evaluation.answerer import PIECE_SEGMENTS, RunAnswerer
from lm2_jax.evaluation.names import distinct_names, model_name
from lm2_jax.runs import Run
from tests.data.reading import WordTokenizer

SEGMENTS, ROWS = 6, 8


def answerer_of(source, layout=None) -> RunAnswerer:
    """An untrained run, as it is loaded for an evaluation."""
    config = lm2_jax.preset("lm2_tiny")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=1024),
        data=DataConfig(source=source, rows=2, segments=(2,)),
    )
    model = lm2_jax.build_model(config.model)
    tokens = jnp.zeros((1, config.model.segment_tokens), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens, model.init_state(1))["params"]
    return RunAnswerer(Run(config, model, params, WordTokenizer(), 7), workdir="runs/one")


def test_answers_are_counted_by_the_distance_of_their_fact(monkeypatch):
    """A model that knows every answer whose token is even has exactly these correct, at every distance."""
    answerer = answerer_of(BabilongSource())
    run = answerer.run
    monkeypatch.setattr(answerer, "predict", lambda batch: np.where(batch.targets % 2 == 0, batch.targets, -1))
    counts = recall.count_answers(answerer, SEGMENTS, ROWS, batch_rows=4)

    data = dataclasses.replace(run.config.data, rows=4, segments=(SEGMENTS,))
    source = data.source.build(run.tokenizer, run.config.model.segment_tokens, data.seed)
    reading = batches(data, source, held_out=True)
    asked, right = np.zeros(SEGMENTS, int), np.zeros(SEGMENTS, int)
    for batch, _ in zip(reading, range(ROWS // 4), strict=False):
        for distance, target in zip(batch.distance.ravel(), batch.targets.ravel(), strict=True):
            if distance >= 0:
                asked[distance] += 1
                right[distance] += target % 2 == 0
    assert asked.min() > 0, "every distance occurs"
    np.testing.assert_array_equal(counts.asked, asked)
    np.testing.assert_array_equal(counts.correct, right)
    assert 0 < right.sum() < asked.sum()
    assert counts.accuracy(1, 2) == right[1:3].sum() / asked[1:3].sum()
    assert recall.Counts(asked[:1], right[:1]).accuracy(1, 4) is None
    assert 1 / 7 < counts.most_frequent < 1 / 3, "six places"


@pytest.mark.parametrize("segments", [2, 2 * PIECE_SEGMENTS + 3])
def test_predictions_are_those_of_the_model(segments):
    """`predict` gives the largest logits of one call over the batch, also where it reads the rows in several."""
    answerer = answerer_of(BabilongSource())
    run = answerer.run
    data = dataclasses.replace(run.config.data, rows=3, segments=(segments,), stage_steps=())
    batch = next(batches(data, recall.open_source(answerer), held_out=True))
    state = run.model.init_state(3)
    inputs = jax.tree.map(jnp.asarray, (batch.tokens, state, batch.reset, batch.valid))
    logits_BSV, _ = jax.jit(run.model.apply)({"params": run.params}, *inputs)
    predicted_BS = answerer.predict(batch)
    assert predicted_BS.shape == batch.tokens.shape
    assert (predicted_BS[batch.valid] == np.asarray(logits_BSV.argmax(-1))[batch.valid]).mean() > 0.99


def test_a_run_on_text_without_questions_is_refused(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"Chapter {name}. It was a dark and stormy night. " * 200)
    with pytest.raises(UserError, match=r"no questions with a known distance.*'interleaved'"):
        recall.count_answers(answerer_of(TextFiles(path=str(tmp_path))), 2, 2, batch_rows=2)


COUNTS = recall.Counts(np.array([10, 10, 10, 10, 10, 0, 0, 0, 40]), np.array([10, 8, 6, 4, 2, 0, 0, 0, 10]), 0.2)
RESULT = recall.Result("LM2, block write (ours)", "one", "runs/one", 5, 1000, 64, 4, 9, COUNTS)


def test_the_report_shows_single_distances_and_their_mean():
    files = recall.result_files([RESULT, RESULT._replace(name="baseline (no memory)", preset="two")])
    lines = files["recall.md"].decode().splitlines()
    start = lines.index("Rows of 9 segments:") + 2
    names = "model/parameters/floats of state/questions/all/0/1/2/3/4/8/1-4"
    assert lines[start].split("|")[1:-1] == [f" {name} " for name in names.split("/")]
    assert lines[start + 2] == (
        "| LM2, block write (ours) | 1,000 | 64 | 90 | 44.4 | 100.0 | 80.0 | 60.0 | 40.0 | 20.0 | 25.0 | 50.0 |"
    )
    assert "most frequent answer is correct for 20.0%" in lines[-1]
    row = json.loads(files["recall.json"])["results"][0]
    assert (row["preset"], row["workdir"], row["model"]) == ("one", "runs/one", "LM2, block write (ours)")
    assert (row["asked"], row["right"]) == (COUNTS.asked.tolist(), COUNTS.correct.tolist())
    assert row["interval"][1] == pytest.approx([0.4901625, 0.9433178], abs=1e-6)
    assert row["interval"][5] is None


def test_the_picture_shows_distances_with_enough_questions(monkeypatch):
    drawn = {}

    def plot(curves, marks, title, labels, note):
        drawn.update(curves=curves, marks=marks, note=note)
        return b""

    monkeypatch.setattr(recall.report, "accuracy_plot", plot)
    recall.result_files([RESULT, RESULT._replace(segments=2)])
    (curve,) = drawn["curves"].values()
    assert curve.x.tolist() == [8]
    assert (drawn["marks"].chance, drawn["marks"].trained) == (20.0, 3)
    assert "90 answers per model" in drawn["note"]


def test_names_differ():
    """By the memory; then with the preset; then with the workdir."""
    lm2, none, rmt, mac = (lm2_jax.preset(f"{name}_tiny") for name in ("lm2", "none", "rmt", "titans_mac"))
    assert distinct_names([lm2, none, rmt, mac], ["a", "b", "c", "d"]) == [
        "LM2, block write (ours)",
        "baseline (no memory)",
        "RMT",
        "Titans, MAC",
    ]
    assert model_name(lm2_jax.preset("lm2_context_tiny").model) == "LM2, slots write, context join (ours)"
    assert model_name(lm2_jax.preset("lm2_paper_tiny").model) == "LM2, paper write"
    for preset, name in {
        "window_tiny": "baseline (sliding window)",
        "llama_tiny": "baseline (full attention)",
        "armt_tiny": "ARMT",
        "infini_tiny": "Infini-attention",
        "probe_gated_delta": "gated delta rule",
        "babilong_small_gated_delta": "gated delta rule, gate join",
        "hmt_tiny": "HMT",
    }.items():
        assert model_name(lm2_jax.preset(preset).model) == name
    hybrid = model_name(lm2_jax.preset("hybrid_tiny").model)
    assert hybrid.startswith("hybrid of ")
    assert "LM2" in hybrid
    assert "Titans" in hybrid
    threaded = lm2_jax.preset("lm2_threaded_tiny")
    names = distinct_names([lm2, threaded, lm2], ["a", "b", "c"])
    assert names == [
        "LM2, block write (ours), lm2_tiny, a",
        "LM2, block write (ours), lm2_threaded_tiny",
        "LM2, block write (ours), lm2_tiny, c",
    ]
