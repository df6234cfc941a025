"""The picture of a training."""

import dataclasses
import json

import lm2_jax
from lm2_jax.training import curves
from lm2_jax.training.optim_config import LossConfig, unweighted
from lm2_jax.training.watch import held_out_summary


def drawn(monkeypatch, lines, without=()):
    """What each panel shows: title -> labels and points."""
    figures = []
    monkeypatch.setattr(curves, "to_png", lambda figure: figures.append(figure) or b"png")
    assert curves.picture(lines, "a run", without) == b"png"
    (figure,) = figures
    return {
        plot.get_title(loc="left"): {line.get_label(): line.get_xydata().tolist() for line in plot.lines}
        for plot in figure.axes
    }


def test_each_metric_that_was_measured_has_a_panel_with_training_and_held_out(monkeypatch):
    lines = [
        {"step": 1, "loss": 3.0, "answer_accuracy": 0.25, "learning_rate": 0.1},
        {"step": 5, "loss": 2.0, "eval_loss": 2.5, "learning_rate": 0.2},
        {"step": 9, "loss": 1.0, "eval_loss": 2.25, "answer_accuracy": 0.5, "learning_rate": 0.1},
    ]
    panels = drawn(monkeypatch, lines)
    assert list(panels) == ["loss that is minimised (nats)", "correct answers (per cent)", "learning rate"]
    assert panels["loss that is minimised (nats)"] == {
        "training": [[1, 3], [5, 2], [9, 1]],
        "held out": [[5, 2.5], [9, 2.25]],
    }
    assert panels["correct answers (per cent)"] == {"training": [[1, 25], [9, 50]]}
    assert "loss that is minimised (nats)" not in drawn(monkeypatch, lines, {"loss"})


def test_the_picture_is_written_next_to_the_metrics(tmp_path):
    run = lm2_jax.preset("lm2_tiny")
    assert curves.write(tmp_path, run) is None
    lines = [{"step": step, "loss": 2.0, "text_loss": 8.0} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:1]))
    assert curves.write(tmp_path, run) is None, "one line is no curve"
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert str(curves.write(tmp_path, run)) == str(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_an_evaluation_in_one_line():
    values = {"eval_loss": 1.0, "eval_text_loss": 2.0, "eval_answer_accuracy": 0.5}
    line = "loss 1.000 | text_loss 2.000 | answer_accuracy 0.500 | perplexity of a text token 7.39"
    assert held_out_summary(values, set()) == line
    assert held_out_summary(values, {"text_loss"}) == "loss 1.000 | answer_accuracy 0.500"
    assert held_out_summary({"eval_text_loss": 1e4}, set()).startswith("text_loss 10000.000 | perplexity")


def test_losses_without_a_weight_are_not_shown(tmp_path, monkeypatch):
    assert unweighted(LossConfig()) == {"text_loss"}
    assert unweighted(LossConfig(answer_weight=0.0, text_weight=1.0)) == {"answer_loss"}
    assert unweighted(LossConfig(text_weight=0.01)) == set()
    asked = []
    monkeypatch.setattr(curves, "picture", lambda lines, title, without: asked.append(without) or b"")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 1.0}\n')
    run = lm2_jax.preset("lm2_tiny")
    curves.write(tmp_path, run)
    curves.write(tmp_path, dataclasses.replace(run, loss=LossConfig(text_weight=1.0)))
    assert asked == [{"text_loss"}, set()]
