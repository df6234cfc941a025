"""benchmarks/grafted.py: its arms, its choice of rates, its table, and the command with a random tiny model."""

import dataclasses
import json
import pathlib
import shutil
import sys

import pytest

from benchmarks import grafted, grafted_table
from benchmarks.grafted_arms import MEMORIES, STARTS, Arm, Folders, Training, base, donor, run_of
from lm2_jax.config import ModelConfig, from_dict, to_dict
from lm2_jax.errors import UserError
from lm2_jax.interop.graft import graft
from tests.interop.folders import hf_folder

TRAINING = Training(steps=100, rows=1, segments=(4, 8), segment_tokens=64)
FOLDERS = Folders(pathlib.Path("babi"), pathlib.Path("books"))
STORY = """1 Mary moved to the {0}.
2 John went to the {1}.
3 Where is Mary? \t{0}\t1
4 Sandra journeyed to the {1}.
5 Daniel travelled to the {0}.
6 Where is Sandra? \t{1}\t4
"""


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("start", STARTS)
def test_the_config_of_every_arm(memory, start):
    """It can be written and read, and what it freezes and adds is what its start says."""
    like, of_memory = base(TRAINING, FOLDERS), donor(memory)
    if of_memory is not None:
        decoder = dataclasses.replace(like.model, segment_tokens=64)
        model: ModelConfig = graft(decoder, of_memory.model.memory, of_memory.model.join).model
        like = dataclasses.replace(like, model=model)
    run = run_of(Arm(memory, start), like, TRAINING, FOLDERS, seed=3, rate=1e-3, steps=100)
    assert from_dict(type(run), to_dict(run)) == run
    assert (run.optim.freeze == ("decoder",)) == (run.model.decoder.lora.rank > 0) == (start == "lora")
    assert (run.train.seed, run.data.seed, run.optim.learning_rate) == (3, 3, 1e-3)
    assert run.data.source.asked_steps == (15, 35, 50)  # pyright: ignore[reportAttributeAccessIssue]
    assert run.data.stage_steps == (60,)


def test_the_rate_with_the_lowest_answer_loss_is_chosen_and_a_diverged_one_is_not(monkeypatch, tmp_path):
    command = dataclasses.replace(grafted.STORIES, runs=tmp_path, learning_rates=(3e-3, 2e-3, 1e-3))
    losses = {"search_0.002_500": [9.0] * 6 + [0.5, 0.7], "search_0.001_500": [0.1] * 6 + [2.0, 3.0]}
    trained = []

    def train(arm, config, workdir, command):
        trained.append(workdir.name)
        if config.optim.learning_rate == 3e-3:
            raise grafted.Diverged
        assert (config.train.seed, config.optim.steps) == (10_000, 500)

    monkeypatch.setattr(grafted, "split_books", lambda command: (FOLDERS, None))
    monkeypatch.setattr(grafted, "imported", lambda memory, command, folders: base(TRAINING, FOLDERS))
    monkeypatch.setattr(grafted, "train", train)
    monkeypatch.setattr(grafted, "read_lines", lambda workdir: [{"answer_loss": x} for x in losses[workdir.name]])
    (tmp_path / "none-scratch").mkdir()
    rate, scores = grafted.choose_rate(Arm("none", "scratch"), command)
    assert rate == 2e-3
    assert scores == {"0.003": None, "0.002": pytest.approx(0.6), "0.001": pytest.approx(2.5)}
    grafted.choose_rate(Arm("none", "scratch"), command)
    assert trained.count("search_0.003_500") == 1, "a run that diverged is not tried again"
    only = dataclasses.replace(command, learning_rates=(3e-3,) * 2)
    with pytest.raises(UserError, match="every learning rate of none-scratch diverged"):
        grafted.choose_rate(Arm("none", "scratch"), only)


def row(memory: str, start: str, seed: int, accuracy: float | None) -> dict:
    results = [] if accuracy is None else [{"length": "1k", "accuracy": accuracy, "samples": 4}]
    sizes = dict.fromkeys(("parameters", "trained_parameters", "state_floats", "steps"), 1000)
    fixed = {"model": memory, "checkpoint": "x.bin", "learning_rate": 1e-3, "test_books": ["b.txt"], "machine": "m"}
    arm = {"memory": memory, "start": start, "seed": seed, "diverged": accuracy is None, "command": "c"}
    return {**arm, **sizes, **fixed, "results": results}


def test_the_table_has_means_ranges_and_what_diverged(tmp_path):
    rows = [row("lm2", "lora", 0, 0.5), row("lm2", "lora", 1, 0.75), row("none", "scratch", 0, None)]
    lines = grafted_table.table(rows).splitlines()
    assert "| 1 | - |" in lines[2].replace("1, 1 diverged", "1")
    assert "1, 1 diverged" in lines[2]
    assert lines[3].endswith("| 0.001 | 2 | 62.5 (50.0 to 75.0) |")
    grafted_table.write(rows, tmp_path / "t")
    assert json.loads((tmp_path / "t.json").read_text())["results"] == rows
    assert "b.txt" in (tmp_path / "t.md").read_text()


def tiny_data(folder: pathlib.Path) -> None:
    babi, books = folder / "babi" / "en-10k", folder / "books"
    babi.mkdir(parents=True)
    books.mkdir()
    for split in ("train", "test"):
        stories = [STORY.format(a, b) for a, b in (("garden", "office"), ("kitchen", "hallway"))]
        (babi / f"qa1_x_{split}.txt").write_text("".join(stories))
    for book in "abc":
        lines = [f"On day {i} nobody in the town of {book} saw the ship again. " for i in range(300)]
        (books / f"{book}.txt").write_text("".join(lines))


def command_line(tmp_path: pathlib.Path) -> list[str]:
    words = ["grafted", "stories", "--source", str(tmp_path / "hf"), "--data", str(tmp_path), "--test-books", "1"]
    words += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "table"), "--memories", "lm2", "--seeds", "0"]
    words += ["--starts", "lora", "--learning-rates", "1e-3", "--lengths", "0k", "--samples", "2"]
    words += ["--training.steps", "2", "--training.rows", "1", "--training.segments", "4", "4"]
    return [*words, "--training.segment-tokens", "64"]


@pytest.mark.slow
def test_the_command_trains_evaluates_and_does_nothing_twice(tmp_path, monkeypatch, capfd):
    hf_folder(tmp_path / "hf")
    tiny_data(tmp_path)
    monkeypatch.setattr(sys, "argv", command_line(tmp_path))
    grafted.main()
    (found,) = json.loads((tmp_path / "table.json").read_text())["results"]
    assert (found["steps"], found["diverged"], found["test_books"]) == (2, False, ["c.txt"])
    assert found["trained_parameters"] < found["parameters"]
    assert [cell["samples"] for cell in found["results"]] == [2]
    assert "train.py --config" in capfd.readouterr().out
    shutil.rmtree(tmp_path / "runs")
    grafted.main()
    out = capfd.readouterr().out
    assert "train.py" not in out
    assert "eval.py" not in out
    assert json.loads((tmp_path / "table.json").read_text())["results"] == [found]
    monkeypatch.setattr(sys, "argv", [*command_line(tmp_path), "--training.lora-rank", "2"])
    grafted.main()
    assert "train.py --config" in capfd.readouterr().out, "the row is of another config"
    monkeypatch.setattr(sys, "argv", [*command_line(tmp_path)[:-1], "32"])
    with pytest.raises(UserError, match="choose another --runs"):
        grafted.main()
