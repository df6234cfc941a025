"""Arrays that a mesh replicates, and the plan of a run without devices."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import lm2_jax
from lm2_jax.errors import UserError
from lm2_jax.sharding import RULES, Layout, MeshConfig, assert_sharded, make_mesh, plan
from lm2_jax.sharding.check import Placement
from lm2_jax.sharding.mesh import planned_mesh
from lm2_jax.sharding.plan import describe_plan
from lm2_jax.training.fit import check_trainable, fit, replicated_arrays
from lm2_jax.training.state import make_plan


def shardings(mesh: MeshConfig, axes, shapes):
    return Layout(planned_mesh(mesh)).shardings(axes, shapes)


SHAPES = {"w": jax.ShapeDtypeStruct((20, 8), jnp.float32), "lost": jax.ShapeDtypeStruct((30, 10), jnp.bfloat16)}
AXES = {"w": ("embed", "heads"), "lost": (None, "state_embed")}


def test_replicated_arrays_are_listed_with_their_bytes():
    split = MeshConfig(fsdp=2, model=2)
    with pytest.raises(
        UserError, match=r"1 arrays would be replicated.*\n  lost \(30, 10\): 600 bytes on each"
    ) as caught:
        assert_sharded(SHAPES, shardings(split, AXES, SHAPES), least_bytes=500)
    assert " w " not in str(caught.value)
    assert_sharded(SHAPES, shardings(split, AXES, SHAPES), least_bytes=601)
    # Copies of the model are what the axis `data` is for.
    assert_sharded(SHAPES, shardings(MeshConfig(data=8), AXES, SHAPES), least_bytes=1)


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=2, model=2, slots=2), MeshConfig(fsdp=8)])
def test_no_matrix_of_lm2_is_replicated(mesh):
    run = lm2_jax.preset("lm2_tiny")
    model, layout = lm2_jax.build_model(run.model), Layout(planned_mesh(mesh), config=run)
    plan = make_plan(run, model)
    assert_sharded(plan.shapes, plan.shardings(layout), least_bytes=run.model.decoder.width**2)
    state = jax.eval_shape(lambda: model.init_state(run.data.rows))
    assert_sharded(state, layout.shardings(model.state_axes(), state), least_bytes=1)


def whole_vocabulary(mesh: MeshConfig) -> Layout:
    """A table that forgets to split the embedding."""
    rules = tuple((name, None if name in ("vocab", "row_width", "copies") else axes) for name, axes in RULES)
    return Layout(make_mesh(mesh, jax.devices()[:4]), rules)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "warns"), [(MeshConfig(fsdp=2, model=2), True), (MeshConfig(data=4), False)])
def test_training_tells_what_lies_whole(tmp_path, capsys, mesh, warns):
    run = lm2_jax.preset("none_tiny")
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, vocab_size=8192),  # times 32 times 4 bytes: a mebibyte
        optim=dataclasses.replace(run.optim, steps=1, warmup_steps=0),
        train=dataclasses.replace(run.train, eval_batches=0),
    )
    fit(run, tmp_path / "run", whole_vocabulary(mesh))
    said = capsys.readouterr().out
    assert said.count("params/embed/table (8192, 32): 1,048,576 bytes on each device") == warns
    assert said.count("warning: 3 arrays are replicated on every device:") == warns  # with both moments


def test_a_long_list_is_cut():
    state = {f"array_{i}": jax.device_put(jnp.zeros((i + 1, 2**18)), jax.devices()[0]) for i in range(7)}
    layout = whole_vocabulary(MeshConfig(fsdp=2, model=2))
    state = jax.device_put(state, layout.shardings({name: (None, None) for name in state}, state))
    lines = replicated_arrays(state, layout).strip().splitlines()
    assert lines[1].strip() == "array_6 (7, 262144): 7,340,032 bytes on each device"
    assert (len(lines), lines[-1].strip()) == (7, "and 2 more; see --plan")


def test_the_plan_says_where_each_array_would_lie():
    run = lm2_jax.preset("lm2_tiny")
    text = describe_plan(run, MeshConfig(fsdp=4, model=2, slots=2))
    lines = {line.split("  ")[1]: line for line in text.splitlines() if line.startswith("  ")}
    assert "lm2_tiny on 16 devices: data 1 x fsdp 4 x model 2 x slots 2" in text
    # 2 layers, 32 x 64 numbers of 4 bytes: 8 pieces of the width, 2 of the hidden width.
    assert lines["blocks_0/mlp/up/w"].split()[1:] == "[2, 32, 64] float32 -, fsdp+slots, model 1,024".split()
    assert lines["groups/0/memory/slots"].split()[-5:] == ["-,", "fsdp,", "slots,", "-", "1,536"]
    assert "1/mu/embed/table" in lines
    assert text.endswith("\nreplicated on every device: nothing of 1 MiB or more")


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (MeshConfig(), "replicated: nothing, as there is one device: it holds every array completely"),
        (MeshConfig(data=4), "replicated on every device: all parameters and the optimizer, as mesh.data is the only"),
        (MeshConfig(model=2), "replicated on every device: runs/0/big"),
    ],
)
def test_the_plan_says_what_is_replicated(monkeypatch, mesh, words):
    """On one device nothing is split, which must not read as if nothing were held completely."""
    if mesh.model == 2:
        monkeypatch.setattr(plan, "replicated_arrays", lambda *_: [Placement("runs/0/big", (1,), "f", "-", 4, 4)])
    assert describe_plan(lm2_jax.preset("lm2_tiny"), mesh).splitlines()[-1].startswith(words)


def test_a_decoder_without_a_state_has_a_plan_too():
    assert "recurrent state, 8 rows: 0 arrays, 0 bytes" in describe_plan(lm2_jax.preset("none_tiny"), MeshConfig())


def test_tokens_that_do_not_divide_are_refused_before_training():
    run = lm2_jax.preset("none_tiny")
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, segment_tokens=30))
    layout = Layout(make_mesh(MeshConfig(slots=4)), config=run)
    with layout.context(), pytest.raises(UserError) as caught:
        check_trainable(make_plan(run, lm2_jax.build_model(run.model)))
    assert "time=30 is not divisible by mesh.slots=4; change model.segment_tokens, mesh.slots" in str(caught.value)


def test_what_the_model_refuses_of_its_segments_is_refused_of_a_plan():
    run = lm2_jax.preset("none_tiny")
    decoder = dataclasses.replace(run.model.decoder, attention_kernel="splash")
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=decoder))
    with pytest.raises(UserError, match=r"This run cannot be trained: decoder.attention_kernel='splash'"):
        describe_plan(run, MeshConfig())


def test_a_plan_that_cannot_be_is_refused():
    run = lm2_jax.preset("lm2_tiny")
    with pytest.raises(UserError, match=r"num_slots=6 is not divisible by mesh.slots=4"):
        describe_plan(run, MeshConfig(slots=4))
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, rows=6))
    with pytest.raises(UserError, match=r"data.rows=6 is not divisible by mesh.data=1 \* mesh.fsdp=4"):
        describe_plan(run, MeshConfig(fsdp=4))
