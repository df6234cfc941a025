"""docs/adding_a_memory.md, followed literally in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def followed(folder: Path) -> Path:
    """A copy of the repository in which the guide's steps 1 to 3 were done."""
    copy = folder / "copy"
    for name in ("lm2_jax", "configs", "sharding", "tests", "pyproject.toml"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    memory, imported, preset = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adding_a_memory.md").read_text(), re.S)
    (copy / "lm2_jax/memory/ema.py").write_text(memory)
    init = copy / "lm2_jax/memory/__init__.py"
    init.write_text(
        init.read_text().replace(
            "from lm2_jax.memory import gated_bank", imported + "from lm2_jax.memory import gated_bank", 1
        )
    )
    tiny = copy / "configs/tiny.py"
    text = tiny.read_text().replace("] = {\n", "] = {\n" + preset, 1)
    tiny.write_text(
        text.replace(
            "from lm2_jax.memory.gated_bank",
            "from lm2_jax.memory.ema import EmaConfig\nfrom lm2_jax.memory.gated_bank",
            1,
        )
    )
    return copy


def pytest_in(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": "."}
    )


@pytest.mark.slow
def test_the_guide_adds_a_memory_that_keeps_the_contract(tmp_path):
    copy = followed(tmp_path)
    golden = pytest_in(copy, "tests/golden", "-k", "ema", "--update-golden")
    assert "failed" not in golden.stdout, golden.stdout[-2000:]
    contract = pytest_in(copy, "tests/contract", "-k", "ema_tiny", "-m", "not slow and not long")
    assert contract.returncode == 0, contract.stdout[-4000:]
    passed = re.search(r"(\d+) passed", contract.stdout)
    assert passed is not None
    assert int(passed[1]) >= 15, contract.stdout[-500:]
