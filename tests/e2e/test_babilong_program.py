"""`python train.py`, then `python eval.py babilong` on what it left."""

import json
import math
import pathlib

import pytest

from tests.e2e.test_train_program import call

pytestmark = pytest.mark.slow
STEPS = 2


@pytest.fixture(scope="module", params=["lm2_tiny", "titans_mac_tiny"])
def trained(request, tmp_path_factory) -> tuple[str, pathlib.Path]:
    """A preset and the workdir of two steps of it."""
    workdir = tmp_path_factory.mktemp(request.param)
    done = call(
        request.param, "--workdir", str(workdir), "--optim.steps", str(STEPS), "--optim.warmup-steps", "1",
        "--train.log-every", "1", "--train.eval-every", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return request.param, workdir


def test_every_layer_tells_how_its_memory_fares(trained):
    """Each line has all of a memory's diagnostics for each of the two layers, as finite numbers."""
    preset, workdir = trained
    names = {
        "lm2_tiny": ["gate_input", "gate_forget", "gate_output"],
        "titans_mac_tiny": [
            "surprise", "step_size", "momentum", "forgetting", "inner_loss_before", "inner_loss_after", "state_norm",
        ],
    }[preset]  # fmt: skip
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert {"eval_loss", "eval_answer_accuracy", "eval_answer_loss"} <= lines[-1].keys(), "held out"
    for line in lines:
        assert all(math.isfinite(value) for value in line.values())
        missing = {f"memory/{name}/{layer}" for name in names for layer in range(2)} - line.keys()
        assert not missing
        assert not any(name.endswith("/2") for name in line), "there are two layers"
        for layer in range(2):
            shares = [line[f"memory/{name}/{layer}"] for name in names if name.startswith(("gate", "mom", "forg"))]
            assert all(0 < share < 1 for share in shares)
    if preset == "titans_mac_tiny":
        sizes = [line[f"memory/{n}/{i}"] for line in lines for n in ("surprise", "state_norm") for i in range(2)]
        assert min(sizes) > 0
        assert len(set(sizes)) == len(sizes), "layers and steps differ"


def test_babilong_of_a_run(trained):
    """Prompts of several segments go through `stream`; the files say what the contract promises."""
    preset, workdir = trained
    out = workdir / "report"
    done = call(
        "babilong", "--workdir", str(workdir), "--tasks", "qa1", "--lengths", "0k", "1k", "--samples", "2",
        "--max-new-tokens", "2", "--out", str(out), program="eval.py",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "babilong.json").read_text())
    assert {key: report[key] for key in ("suite", "preset", "step", "segment_tokens")} == {
        "suite": "babilong",
        "preset": preset,
        "step": STEPS,
        "segment_tokens": 32,
    }
    assert [(result["task"], result["length"], result["samples"]) for result in report["results"]] == [
        ("qa1", "0k", 2),
        ("qa1", "1k", 2),
    ]
    assert report["results"][1]["mean_tokens"] > 900
    assert all(0 <= result["accuracy"] <= 1 for result in report["results"])
    for suffix in ("md", "png"):
        assert (out / f"babilong.{suffix}").stat().st_size > 0
