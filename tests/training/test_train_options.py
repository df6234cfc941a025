"""Options of the optimizer in a training run: what is saved, resumed and evaluated."""

import dataclasses

import jax
import numpy as np
import pytest

import lm2_jax
from lm2_jax import load_run
from lm2_jax.config import OptimConfig
from lm2_jax.training.optim_config import Muon, WarmupStableDecay
from lm2_jax.training.state import evaluation_params
from tests.e2e.tiny_run import arrays, tiny_config, train, write_documents

OPTIONS = {
    "freeze": ("embed",),
    "ema_decay": 0.9,
    "algorithm": Muon(),
    "schedule": WarmupStableDecay(decay_fraction=0.5),
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("texts") / "documents")


@pytest.mark.slow
def test_a_run_with_all_options_resumes_and_is_evaluated_by_its_average(documents, tmp_path):
    decoder_only = lm2_jax.preset("none_tiny").model  # compiles quickly
    config = dataclasses.replace(
        tiny_config(documents, every_steps=2), model=decoder_only, optim=OptimConfig(steps=4, warmup_steps=1, **OPTIONS)
    )
    precision = dataclasses.replace(config.model.precision, params="bfloat16")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, precision=precision))
    outcome = train(config, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "4").rename(tmp_path / "taken away")
    resumed = train(config, tmp_path / "run")
    assert resumed.step == 4
    expected, found = arrays(outcome), arrays(resumed)
    for name, one in expected.items():
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(found[name], np.float32), err_msg=name)
    averaged = evaluation_params(outcome.state)
    jax.tree.map(np.testing.assert_array_equal, load_run(tmp_path / "run").params, averaged)
    different = [
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(jax.tree.leaves(averaged), jax.tree.leaves(outcome.state.params), strict=True)
    ]
    assert sum(different) > 1, "the average is not the last value"
