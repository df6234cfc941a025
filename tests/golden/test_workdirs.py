"""Workdirs of earlier versions resume and evaluate; see `workdirs`."""

import json
import shutil

import numpy as np
import pytest

import lm2_jax
from lm2_jax.evaluation.perplexity import Perplexity
from lm2_jax.training.workdir import read_config
from tests.golden.workdirs import FOLDER, PRESETS, STEPS, machine, trained


@pytest.fixture(params=[pytest.param(p, marks=() if p == "lm2_tiny" else pytest.mark.slow) for p in PRESETS])
def workdir(request, tmp_path):
    return shutil.copytree(FOLDER / request.param, tmp_path / request.param)


def test_a_golden_workdir_resumes_to_the_same_parameters(workdir):
    """Bit for bit with the versions and the kind of processor that made it, to 1e-6 elsewhere."""
    with np.load(workdir / "after.npz") as stored:
        expected = dict(stored)
    same = json.loads((workdir / "made_with.json").read_text()) == machine()
    found = trained(read_config(workdir), workdir)
    assert set(found) == set(expected)
    for name, array in expected.items():
        if same:
            np.testing.assert_array_equal(found[name], array, err_msg=name)
        else:
            np.testing.assert_allclose(found[name], array, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_golden_workdir_evaluates(workdir, tmp_path):
    run = lm2_jax.load_run(workdir)
    assert run.step == STEPS // 2
    text = tmp_path / "text.txt"
    text.write_text("Mary went to the garden. Where is Mary? " * 20)
    Perplexity(workdir=str(workdir), text=str(text), out=str(tmp_path / "out")).main()
    assert (tmp_path / "out" / "perplexity.json").is_file()
