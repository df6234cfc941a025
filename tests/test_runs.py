"""Runs in float64: jax takes it for float32 unless the process says otherwise."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import lm2_jax
from lm2_jax import runs
from lm2_jax.aot import compile_only
from lm2_jax.aot.topology import parse_topology
from lm2_jax.config import to_dict
from lm2_jax.errors import UserError
from lm2_jax.sharding import MeshConfig
from lm2_jax.sharding.plan import describe_plan
from tests.contract.subjects import FLOAT64

NARROW = lm2_jax.preset("none_tiny")
WIDE = dataclasses.replace(NARROW, model=dataclasses.replace(NARROW.model, precision=FLOAT64))


def types(params):
    return {leaf.dtype for leaf in jax.tree.leaves(params)}


@pytest.mark.usefixtures("wide_numbers")
def test_a_run_is_read_in_its_types(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(WIDE)))
    monkeypatch.setattr(runs, "read_newest", lambda workdir, wanted, check: (wanted, 1))
    monkeypatch.setattr(runs, "load_tokenizer", lambda *_: None)
    run = lm2_jax.load_run(tmp_path)
    assert types(run.params) == {np.dtype("float64")}
    assert jax.config.jax_enable_x64, "what is computed with them, too"


@pytest.mark.usefixtures("wide_numbers")
def test_a_plan_counts_the_bytes_of_its_types():
    assert "float64" not in describe_plan(NARROW, MeshConfig())
    assert "embed/table" in (text := describe_plan(WIDE, MeshConfig()))
    assert "float64" in text
    assert "float32" not in text


@pytest.mark.usefixtures("wide_numbers")
def test_a_program_is_compiled_in_its_types(monkeypatch):
    seen = []

    def enough(plan):
        seen.append(types(plan.shapes.params))
        raise UserError("enough")

    monkeypatch.setattr(compile_only, "compile_only_devices", lambda topology: jax.devices()[:1])
    monkeypatch.setattr(compile_only, "check_trainable", enough)
    with pytest.raises(UserError, match="enough"):
        compile_only.compile_only(WIDE, MeshConfig(), parse_topology("v5e:1x1"))
    assert seen == [{np.dtype("float64")}]
