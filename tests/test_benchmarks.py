"""Benchmarks at their smallest sizes: each runs from end to end and writes numbers."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {
    "merge_pairs": "--pairs 2 --tokens 8 --trials 2",
    "method_costs": "--presets lm2_tiny --steps 1 --texts 1 --blocks 1",
    "training": "--preset lm2_tiny --steps 1 --blocks 1",
}


def numbers(value: object) -> list[float]:
    """All numbers in a JSON document."""
    if isinstance(value, dict | list):
        return [found for part in (value.values() if isinstance(value, dict) else value) for found in numbers(part)]
    return [float(value)] if isinstance(value, int | float) else []


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_runs_and_writes_its_numbers(name, tmp_path):
    out = tmp_path / ("it.json" if name == "training" else "it")
    words = [sys.executable, "-m", f"benchmarks.{name}", *SMALL[name].split(), "--out", str(out)]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = numbers(json.loads(out.with_suffix(".json").read_text()))
    assert any(found)
    assert all(map(math.isfinite, found))
