"""A train step's matrix operations, as traced and as compiled for TPUs, against a formula written by hand."""

import dataclasses
import importlib.util

import pytest

import lm2_jax
from lm2_jax.aot import compile_only
from lm2_jax.aot.topology import parse_topology
from lm2_jax.model import LanguageModel
from lm2_jax.sharding import MeshConfig
from lm2_jax.training.flops import traced_flops
from lm2_jax.training.objective import batch_shapes
from lm2_jax.training.state import make_plan
from lm2_jax.training.step import make_train_step
from tests.aot.flop_formula import step_flops

TINY = ("none_tiny", "lm2_tiny", "lm2_paper_tiny", "titans_mac_tiny")
PUBLISHED = ("llama_1p7b", "lm2_1p7b", "lm2_8b", "titans_mac_1p3b")


def with_remat(name, remat):
    run = lm2_jax.preset(name)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, remat=remat))


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        *((name, remat) for name in TINY for remat in ("none", "full")),
        *(pytest.param(name, "full", marks=pytest.mark.slow) for name in PUBLISHED),
    ],
)
def test_what_is_traced(name, remat):
    run = with_remat(name, remat)
    plan = make_plan(run, LanguageModel(run.model))
    batch = batch_shapes(run.data.rows, max(run.data.segments), run.model.segment_tokens)
    traced = traced_flops(make_train_step(plan), plan.shapes, batch)
    # Exact but for Titans, in whose loop of chunks more of the recomputation falls away.
    assert traced == pytest.approx(step_flops(run), rel=0.03 if "titans" in name else 1e-6)


@pytest.mark.tpu_backend
@pytest.mark.parametrize("name", TINY)
def test_what_is_compiled_on_all_devices_of_a_slice(name):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install -r requirements-tpu.txt")
    run = with_remat(name, "full")
    # In one piece, XLA would keep the logits that the backward pass asks for again.
    run = dataclasses.replace(run, loss=dataclasses.replace(run.loss, time_chunk=16))
    mesh = MeshConfig(data=2, fsdp=2) if "titans" in name else MeshConfig(data=1, fsdp=2, slots=2)
    report = compile_only.compile_only(run, mesh, parse_topology("v5e:2x2"), quick=True)
    assert report.unknown_loops == 0
    assert report.flops["compiled"] == pytest.approx(step_flops(run), rel=0.1)
