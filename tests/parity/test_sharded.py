"""A run on a mesh equals the run on one device: logits, state, loss and every gradient, the sharding asserted first.

Eight virtual CPU devices; `slots` and `model` are split at the same time in half of the meshes.
"""

import jax
import numpy as np
import pytest

import lm2_jax
from lm2_jax.memory.titans import TitansConfig
from lm2_jax.sharding import MeshConfig
from tests.sharding.programs import EXPANSION, ROWS, SLOTS, Case, Outcome, case

MESHES = {
    "data8": MeshConfig(data=8),
    "fsdp8": MeshConfig(data=1, fsdp=8),
    "data2_fsdp2_model2": MeshConfig(data=2, fsdp=2, model=2),
    "fsdp2_slots4": MeshConfig(data=1, fsdp=2, slots=4),
    "fsdp2_model2_slots2": MeshConfig(data=1, fsdp=2, model=2, slots=2),
    "model2_slots4": MeshConfig(data=1, model=2, slots=4),
}
CORE = ("lm2_tiny", "titans_mac_tiny")
OTHERS = sorted(name for name in lm2_jax.PRESETS if name.endswith("_tiny") and name not in CORE)
# What no preset has: a bank with `gate`, one with a learned start with `layer`, and learned queries with `context`.
PAIRS = ("gate_mix_middle_layer", "layer_learned", "context_queries")

pytestmark = pytest.mark.parity


def assert_sharded_as_planned(here: Case) -> None:
    """Gradients and state lie in the parts that the table says, the state inside the loops too.

    The program is compiled without `out_shardings`, so that only what the model says itself decides. A gradient may lie
    in smaller parts than its parameter.
    """
    assert here.layout is not None
    shape = here.shape
    params, state = here.layout.shardings(here.axes, (here.arguments.params, here.arguments.state))
    whole = []
    gradients = jax.tree_util.tree_leaves_with_path(here.outcome.grads)
    for (path, leaf), sharding in zip(gradients, jax.tree.leaves(params), strict=True):
        part, planned = leaf.sharding.shard_shape(leaf.shape), sharding.shard_shape(leaf.shape)
        if any(size > most for size, most in zip(part, planned, strict=True)):
            whole.append(f"{jax.tree_util.keystr(path)}: parts of {part}, planned {planned}")
    assert not whole, "\n".join(whole)
    rows = ROWS // (shape["data"] * shape["fsdp"])
    for leaf, sharding in zip(jax.tree.leaves(here.outcome.state), jax.tree.leaves(state), strict=True):
        assert leaf.sharding.shard_shape(leaf.shape) == sharding.shard_shape(leaf.shape)
    if hasattr(here.config.memory, "num_slots"):
        slots, width = SLOTS // shape["slots"], here.config.decoder.width
        if here.config.join.kind == "residual":
            bank = jax.tree.leaves(here.outcome.state)[0]  # one, or one for each layer
            assert bank.shape[-3:] == (ROWS, SLOTS, width)
            assert bank.sharding.shard_shape(bank.shape)[-3:] == (rows, slots, width)
        assert (rows, slots, width) in set().union(*here.carried.values()), "the loop over segments"
        if shape["slots"] > 1:
            assert f"[{rows},{SLOTS},{width}]" not in here.compiled.as_text(), "a whole bank"
    if isinstance(here.config.memory, TitansConfig):
        assert_heads_stay(here, here.config.memory, rows)


def assert_heads_stay(here: Case, memory: TitansConfig, rows: int) -> None:
    """A device's loops, over segments and over chunks, carry what is its own of weights and momentum.

    That is its rows, its heads, and of the hidden width its part.
    """
    width = here.config.decoder.width // memory.num_heads
    heads, whole = memory.num_heads // here.shape["model"], EXPANSION * width
    matrices = {(whole // here.shape["slots"], width), (width, whole // here.shape["slots"])}
    assert {(whole, width), (width, whole)} == set(memory.network.shapes(width)), "nothing else has such dimensions"
    carried = {shape for shapes in here.carried.values() for shape in shapes if shape[-2:] in matrices}
    assert {(rows, heads, *shape) for shape in matrices} <= carried, "over segments"
    assert {(rows * heads, *shape) for shape in matrices} <= carried, "over chunks, where rows and heads are one axis"
    for lead in {shape[:-2] for shape in carried}:
        of_all_rows = lead[-2:] == (rows, heads) or lead[-1] == rows * heads
        of_no_row = lead[-1] == heads and ROWS not in lead  # learned starts, and what persistent tokens make of them
        assert of_all_rows or of_no_row, f"{lead} of {rows} rows and {heads} heads on a device"


def assert_equal_runs(here: Outcome, there: Outcome, value: float, gradient: float) -> None:
    """To a tolerance relative to each array's largest entry."""
    for name, tolerance in (("loss", value), ("logits", value), ("state", value), ("grads", gradient)):
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(getattr(here, name)), jax.tree.leaves(getattr(there, name)), strict=True
        )
        for (path, a), b in pairs:
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            scale = np.abs(b).max(initial=0.0)
            what = f"{name}{jax.tree_util.keystr(path)}"
            assert name != "grads" or scale > 0, f"{what}: no gradient to compare"
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale, err_msg=what)


@pytest.mark.parametrize("float64", [False, pytest.param(True, marks=pytest.mark.long)], ids=["float32", "float64"])
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(mesh, marks=pytest.mark.slow if mesh == "fsdp2_model2_slots2" else pytest.mark.long)
        for mesh in MESHES
    ],
)
@pytest.mark.parametrize("name", CORE)
def test_a_sharded_run_equals_the_run_on_one_device(name, mesh, float64):
    here, alone = case(name, MESHES[mesh], float64), case(name, None, float64)
    assert_sharded_as_planned(here)
    value, gradient = (1e-10, 1e-10) if float64 else (1e-5, 2e-4)
    assert_equal_runs(here.outcome, alone.outcome, value, gradient)


@pytest.mark.long
@pytest.mark.parametrize("mesh", ["data2_fsdp2_model2", "fsdp2_model2_slots2"])
@pytest.mark.parametrize("name", [*OTHERS, *PAIRS])
def test_every_other_memory_and_join_too(name, mesh):
    if name in ("rmt_tiny", "armt_tiny", "hmt_tiny") and MESHES[mesh].slots > 1:
        mesh = "fsdp8"  # refused with split segments, see the next test
    here = case(name, MESHES[mesh], False)
    assert_sharded_as_planned(here)
    assert_equal_runs(here.outcome, case(name, None, False).outcome, 1e-5, 2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", CORE)
def test_recomputing_on_a_mesh_changes_nothing(name):
    here = case(name, MESHES["fsdp2_model2_slots2"], False, remat="full")
    assert "remat" in here.lowered.as_text(debug_info=True)
    assert_equal_runs(here.outcome, case(name, None, False).outcome, 1e-5, 2e-4)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "titans_mal_tiny" else pytest.mark.slow) for name in OTHERS]
)
def test_every_other_preset_is_traced_on_a_mesh(name):
    assert case(name, MESHES["data2_fsdp2_model2"], False).lowered is not None


@pytest.mark.parametrize("name", ["rmt_tiny", "hmt_tiny"])
def test_memory_tokens_beside_a_split_segment_are_refused(name):
    here = case(name, MESHES["fsdp2_model2_slots2"], False)
    with pytest.raises(ValueError, match=r"set mesh\.slots to 1"):
        _ = here.lowered


@pytest.mark.long
def test_what_shards_combine_by_hand_equals_what_the_partitioner_does():
    mesh = MESHES["fsdp2_model2_slots2"]
    by_hand, automatic = case("lm2_tiny", mesh, True), case("lm2_tiny", mesh, True, by_hand=False)
    assert "sdy.manual_computation" in by_hand.lowered.as_text()
    assert "sdy.manual_computation" not in automatic.lowered.as_text()
    assert "sdy.manual_computation" not in case("lm2_tiny", MESHES["data2_fsdp2_model2"], True).lowered.as_text()
    assert_equal_runs(by_hand.outcome, automatic.outcome, 1e-10, 1e-10)
