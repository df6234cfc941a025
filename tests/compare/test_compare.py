"""One protocol: what is run, what is chosen, what the table says, and what is not run again."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import ClassVar

import pytest

import lm2_jax
from lm2_jax.commands import compare as program
from lm2_jax.compare import jobs, table
from lm2_jax.compare.finished import FILE, Finished, config_digest
from lm2_jax.compare.protocol import Choice, Job, Protocol, choose, inequalities
from lm2_jax.errors import UserError

NAMES = ("lm2_tiny", "none_tiny")
METHODS = tuple((name,) for name in NAMES)
CHOSEN = [Choice("lm2_tiny", 1e-3), Choice("none_tiny", 3e-3)]
OPTIONS = ["--", "--optim.warmup-steps", "1", "--train.eval-batches", "1"]


def protocol(folder, **changes) -> Protocol:
    configs = {name: lm2_jax.preset(name) for name in NAMES}
    fields = {"learning_rates": (1e-3, 3e-3), "search_seeds": 2, "search_steps": None, "seeds": 3, "steps": 12}
    return Protocol(configs=configs, folder=folder, **({"methods": METHODS} | fields | changes))


def test_the_search_uses_no_seed_that_is_reported(tmp_path):
    plan = protocol(tmp_path)
    search, reported = list(plan.search()), list(plan.reported(CHOSEN))
    assert len(search) == 2 * 2 * 2
    assert {job.steps for job in search} == {4}
    assert not {job.seed for job in search} & {job.seed for job in reported}
    assert [(job.preset, job.learning_rate, job.seed) for job in reported[:3]] == [
        ("lm2_tiny", 1e-3, 0),
        ("none_tiny", 3e-3, 0),
        ("lm2_tiny", 1e-3, 1),
    ]
    assert len({job.workdir for job in search + reported}) == len(search) + len(reported)
    assert list(protocol(tmp_path, learning_rates=()).search()) == []


def test_the_rate_with_the_best_mean_is_chosen(tmp_path):
    plan = protocol(tmp_path)
    scores = {job: 0.5 for job in plan.search()}
    for job in scores:
        if job.preset == "lm2_tiny" and job.learning_rate == 3e-3:
            scores[job] = 0.9 if job.seed % 2 else 0.2  # a mean of 0.55
        if job.preset == "none_tiny" and job.learning_rate == 3e-3:
            scores[job] = -float("inf")
    assert choose(plan, scores) == [Choice("lm2_tiny", 3e-3), Choice("none_tiny", 1e-3)]
    diverged = {job: -float("inf") if job.preset == "lm2_tiny" else 0.0 for job in scores}
    with pytest.raises(UserError, match=r"every learning rate of lm2_tiny diverged \(0\.001, 0\.003\)"):
        choose(plan, diverged)


def test_one_of_the_presets_of_a_method_is_chosen_with_its_rate(tmp_path):
    plan = protocol(tmp_path, methods=(NAMES,))
    search = list(plan.search())
    assert {job[:2] for job in search} == {(name, rate) for name in NAMES for rate in (1e-3, 3e-3)}
    scores = {job: 0.9 if job[:2] == ("none_tiny", 1e-3) else 0.5 for job in search}
    assert choose(plan, scores) == [Choice("none_tiny", 1e-3)]
    assert {job.preset for job in plan.reported(choose(plan, scores))} == {"none_tiny"}
    own = protocol(tmp_path, methods=(NAMES,), learning_rates=())
    assert [job.preset for job in own.search()] == ["lm2_tiny", "lm2_tiny", "none_tiny", "none_tiny"], "without rates"


def test_scores():
    assert jobs.score({"eval_answer_accuracy": 0.25, "eval_loss": 3.0}) == 0.25
    assert jobs.score({"eval_loss": 3.0}) == -3.0
    assert jobs.score(None) == -float("inf")


def test_results_of_finished_runs_are_kept_by_config(tmp_path):
    plan = protocol(tmp_path)
    job, other = list(plan.reported(CHOSEN))[:2]
    first = Finished(tmp_path, plan.configs, "one machine")
    assert first.find(job, "metrics", None) is None
    first.add(job, "metrics", None, {"eval_loss": 2.0})
    first.add(other, "metrics", None, None)  # it diverged
    first.add(job, "recall", ["--rows", "8"], [{"accuracy": 0.5}])
    again = Finished(tmp_path, plan.configs, "another machine")
    assert (again.find(job, "metrics", None) or {})["value"] == {"eval_loss": 2.0}
    assert (again.find(other, "metrics", None) or {})["value"] is None
    assert (again.find(job, "recall", ["--rows", "8"]) or {})["value"] == [{"accuracy": 0.5}]
    assert again.find(job, "recall", ["--rows", "16"]) is None, "measured otherwise"
    assert again.find(job._replace(seed=7), "metrics", None) is None
    assert again.find(job._replace(workdir=tmp_path / "moved"), "metrics", None) is not None
    again.add(job._replace(seed=7), "metrics", None, {"eval_loss": 1.0})
    assert again.machines() == "another machine; one machine"
    changed = {name: dataclasses.replace(config, train=dataclasses.replace(config.train, eval_batches=3))
               for name, config in plan.configs.items()}  # fmt: skip
    assert Finished(tmp_path, changed, "m").find(job, "metrics", None) is None, "the result of another config"
    config = plan.configs["lm2_tiny"]
    of_job = dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=77, learning_rate=0.5))
    assert config_digest(of_job) == config_digest(config)
    (tmp_path / FILE).write_text('{"preset": "lm2_tiny"}\n')
    with pytest.raises(UserError, match=r"finished\.jsonl: damaged \(KeyError.*Remove it"):
        Finished(tmp_path, plan.configs, "m")


class Recorded(jobs.Runner):
    """Writes down what it would do."""

    calls: ClassVar[list[tuple[str, int]]] = []

    def _train(self, job, share, may_diverge):
        self.calls.append(("train", job.seed))
        (job.workdir / "checkpoints" / str(job.steps)).mkdir(parents=True)
        metrics = {"eval_answer_accuracy": 0.5}
        (job.workdir / "metrics.jsonl").write_text(json.dumps({"step": job.steps, **metrics}) + "\n")
        return metrics

    def _evaluate(self, job, share):
        self.calls.append(("evaluate", job.seed))
        return [{"segments": 4}]


def test_a_run_is_evaluated_when_it_is_trained(tmp_path):
    """So its folder can be deleted then; one that was not evaluated is trained again."""
    runs = [Job("lm2_tiny", 1e-3, seed, 10, tmp_path / "runs" / str(seed)) for seed in range(2)]

    def report(is_judged=True):
        Recorded.calls.clear()
        finished = Finished(tmp_path, {"lm2_tiny": lm2_jax.preset("lm2_tiny")}, "this machine")
        found = Recorded([], ["recall"], 1, print, finished).report(runs, lambda metrics: is_judged)
        assert found == dict.fromkeys(runs, ({"eval_answer_accuracy": 0.5}, [{"segments": 4}] if is_judged else []))
        return list(Recorded.calls)

    assert report() == [("train", 0), ("evaluate", 0), ("train", 1), ("evaluate", 1)]
    shutil.rmtree(tmp_path / "runs")
    assert report() == []
    lines = (tmp_path / FILE).read_text().splitlines()
    lost = [line for line in lines if (json.loads(line)["what"], json.loads(line)["seed"]) == ("recall", 1)]
    (tmp_path / FILE).write_text("".join(f"{line}\n" for line in lines if line not in lost))
    assert len(lost) == 1
    assert report(is_judged=False) == []
    assert report() == [("train", 1), ("evaluate", 1)]


def result(preset, accuracies, parameters=1000):
    recall = [{"segments": 4, "accuracy": 0.5}]
    seeds = [
        table.SeedResult(i, f"w/{i}", {"eval_answer_accuracy": a, "eval_text_loss": 2.0}, recall)
        for i, a in enumerate(accuracies)
    ]
    tried = ((preset, 1e-3, 0.1), ("other", 2e-3, None))
    search = [{"preset": p, "learning_rate": rate, "seed": 10_000, "score": score} for p, rate, score in tried]
    return table.PresetResult(preset, preset.upper(), parameters, 64, 4096, 12, 1e-3, search, seeds)


def test_the_table_says_what_was_done_and_what_is_not_equal():
    results = [result("a", [0.5, 0.7]), dataclasses.replace(result("b", [0.2], parameters=1100), tokens=8192)]
    text = table.markdown(results, "the command", "the machine")
    assert "| A | a | 1,000 | 64 | 12 | 0.001 | 2 | 60 (50 to 70) | 2 (2 to 2) | 50 (50 to 50) |" in text
    assert "| B | b | 1,100 | 64 | 12 | 0.001 | 1 | 20 | 2 | 50 |" in text
    assert "chosen from 0.001, 0.002 by held-out score with seeds 10000, which are not in the table." in text
    assert "Presets that were tried and not chosen: other." in text
    assert "Not equal: training tokens differ: a 4,096, b 8,192." in text
    assert "Not equal: parameters differ by more than 3%: a 1,000, b 1,100." in text
    assert "- `the command`; the machine" in text
    files = table.to_files(results, "the command", "the machine")
    assert json.loads(files["compare.json"])["results"][0]["search"][1]["score"] is None
    assert files["compare.png"].startswith(b"\x89PNG")
    assert inequalities({"a": 1, "b": 1}, {"a": 1000, "b": 1030}) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lm2_tiny", "--seeds", "0"], "--seeds 0: expected at least 1"),
        (["lm2_tiny", "lm2_tiny"], "named twice"),
        (["lm2_tinny"], "lm2_tiny"),
        (["lm2_tiny", "--learning-rates", "0.1", "0.1"], "different positive numbers"),
        (["lm2_tiny", "--suite", "recall --segments 0"], "segments"),
        (["lm2_tiny", "--suite", "recall --segment 4"], "--segment: no such option. Did you mean --segments"),
        (["lm2_tiny", "--suite", "recall 4"], "expected one of recall, babilong and its options, without 4"),
        (["lm2_tiny", "--suite", "recall --out x"], "and its options, without --out"),
        (["lm2_tiny", "--suite", "recall '--rows"], "No closing quotation"),
        (["lm2_tiny", "--suite", "babilon"], "--suite 'babilon': expected one of recall, babilong"),
        (["lm2_tiny", "--suite", ""], "--suite '': expected one of recall"),
        (["lm2_tiny,none_tiny", "lm2_tiny"], "named twice"),
        (["lm2_tiny,"], "unknown preset ''"),
        (["lm2_tiny", "--", "--data.rowz", "3"], "data.rows"),
        (["lm2_tiny", "--", "--train.eval-batches", "0"], "nothing is measured"),
    ],
)
def test_wrong_calls_leave_nothing(words, message, tmp_path):
    at = words.index("--") if "--" in words else len(words)
    with pytest.raises(UserError, match=message):
        program.main([*words[:at], "--out", str(tmp_path / "out"), *words[at:]])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_comparison_from_beginning_to_end_is_run_once(tmp_path, monkeypatch, capsys):
    """Two rates, two presets, two seeds; one run was interrupted; the second call trains nothing."""
    monkeypatch.chdir(pathlib.Path(__file__).parents[2])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    out = tmp_path / "out"
    words = [*NAMES, "--seeds", "2", "--learning-rates", "0.001", "0.002", "--budget", "4", "--search-steps", "2"]
    words += ["--suite", "recall --segments 2 --rows 64", "--jobs", "2", "--out", str(out), *OPTIONS]
    calls = []
    inner = jobs.Runner._run

    def counted(self, command, share):
        calls.append(command[0])
        if calls.count("train") == 3:
            return 1, "out of luck"
        return inner(self, command, share)

    monkeypatch.setattr(jobs.Runner, "_run", counted)
    with pytest.raises(UserError, match="ended with status 1: out of luck"):
        program.main(words)
    calls.clear()
    monkeypatch.setattr(jobs.Runner, "_run", lambda *a: calls.append(a[1][0]) or inner(*a))
    program.main(words)
    assert calls.count("train") in (5, 6)  # of 8: two or three were finished before
    document = json.loads((out / "compare.json").read_text())
    assert [result["preset"] for result in document["results"]] == list(NAMES)
    for found in document["results"]:
        assert [seed["seed"] for seed in found["seeds"]] == [0, 1]
        assert len(found["search"]) == 2
        assert found["learning_rate"] == max(found["search"], key=lambda entry: entry["score"])["learning_rate"]
        assert all(os.path.isdir(seed["workdir"]) for seed in found["seeds"])
    before = (out / "compare.md").read_bytes()
    calls.clear()
    for kind in ("search", "runs"):
        shutil.rmtree(out / kind)
    program.main(words)
    assert calls == [], "results of deleted runs are kept"
    assert (out / "compare.md").read_bytes() == before
    printed = capsys.readouterr().out
    assert "runs: 4 of the search (0 finished before), then 4 that are reported, 2 at a time" in printed
    assert "(4 finished before)" in printed
    assert "wrote" in printed


@pytest.mark.slow
def test_sigterm_ends_the_runs_too(tmp_path):
    """They save, and none continues alone; the same command resumes."""
    words = [sys.executable, "-m", "lm2_jax.compare", "lm2_tiny", "none_tiny", "--seeds", "1", "--budget", "100000"]
    words += ["--jobs", "2", "--out", str(tmp_path), *OPTIONS]
    root = pathlib.Path(__file__).parents[2]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    logs = [tmp_path / "runs" / name / f"rate_{rate(name)}" / "seed_0" / "metrics.jsonl" for name in NAMES]
    ours = subprocess.Popen(words, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + 300
        while not all(log.exists() and log.stat().st_size for log in logs):
            assert ours.poll() is None
            assert time.monotonic() < until
            time.sleep(0.2)
    finally:
        ours.terminate()
        _, error = ours.communicate(timeout=120)
    assert (ours.returncode, error) == (128 + signal.SIGTERM, b"")
    sizes = [log.stat().st_size for log in logs]
    assert all(any((log.parent / "checkpoints").iterdir()) for log in logs)
    time.sleep(2)
    assert [log.stat().st_size for log in logs] == sizes


def rate(preset: str) -> str:
    return f"{lm2_jax.preset(preset).optim.learning_rate:g}"


@pytest.mark.slow
def test_runs_are_judged_by_questions_of_babilong(tmp_path, monkeypatch):
    monkeypatch.chdir(pathlib.Path(__file__).parents[2])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    words = ["lm2_tiny", "--seeds", "1", "--budget", "2", "--out", str(tmp_path)]
    program.main([*words, "--suite", "babilong --lengths 0k 1k --samples 3", *OPTIONS])
    (found,) = json.loads((tmp_path / "compare.json").read_text())["results"]
    assert [(r["task"], r["length"], r["samples"]) for r in found["seeds"][0]["results"]] == [
        ("qa1", "0k", 3),
        ("qa1", "1k", 3),
    ]
    assert "| qa1, 0k | qa1, 1k |" in (tmp_path / "compare.md").read_text()
