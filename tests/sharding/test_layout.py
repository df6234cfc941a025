from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import lm2_jax
from lm2_jax import partition
from lm2_jax.errors import UserError
from lm2_jax.layout import axes_of
from lm2_jax.partition import constrain
from lm2_jax.sharding import RULES, Layout, MeshConfig, make_mesh

SPLIT = MeshConfig(data=1, fsdp=2, model=2, slots=2)


class Bank(NamedTuple):
    slots: object
    fresh: object
    nothing: object = ()


def layout_of(config: MeshConfig) -> Layout:
    return Layout(make_mesh(config))


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_parameters_and_states_lie_as_the_table_says():
    axes = {
        "w": ("embed", "heads", "head"),
        "head": ("row_width", "vocab"),
        "bank": Bank(("layers", "batch", "slots", "state_embed"), ("batch",)),
        "step": (),
    }
    shapes = {
        "w": float32(20, 4, 5),
        "head": float32(20, 12),
        "bank": Bank(float32(3, 8, 16, 20), float32(8)),
        "step": float32(),
    }
    placed = layout_of(SPLIT).shardings(axes, shapes)
    assert jax.tree.structure(placed) == jax.tree.structure(shapes)
    assert placed["w"].spec == P(("fsdp", "slots"), "model", None)
    assert placed["head"].spec == P("fsdp", ("model", "slots"))
    assert placed["bank"].slots.spec == P(None, ("data", "fsdp"), "slots", None)
    assert placed["bank"].fresh.spec == P(("data", "fsdp"))
    assert placed["step"].spec == P()
    assert placed["bank"].slots.shard_shape((3, 8, 16, 20)) == (3, 4, 8, 20)


@pytest.mark.parametrize(
    ("axes", "shape", "words"),
    [
        (("embed", "heads", "head"), (20, 3, 5), ["layer/w", "'heads'", "size 3", "mesh.model=2"]),
        (("batch", "slots", None), (8, 7, 20), ["layer/w", "'slots'", "size 7", "mesh.slots=2"]),
        (("batch", None), (7, 3), ["layer/w", "'batch'", "size 7", "data.rows", "mesh.data=1 * mesh.fsdp=2"]),
        (("embed", "slotz"), (20, 8), ["layer/w", "unknown", "Did you mean 'slots'"]),
        (("mlp", "heads"), (8, 8), ["layer/w", "'mlp' and 'heads'", "'model'"]),
        (("embed", "embed"), (8, 8), ["layer/w", "'embed' and 'embed'", "'fsdp'"]),
    ],
)
def test_what_cannot_be_split_is_refused(axes, shape, words):
    with pytest.raises(UserError) as caught:
        layout_of(SPLIT).shardings({"layer": {"w": axes}}, {"layer": {"w": float32(*shape)}})
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("name", "field"),
    [("lm2_tiny", "model.memory.num_slots"), ("hybrid_tiny", "model.join.parts[0].memory.num_slots")],
)
def test_the_message_names_the_field_of_the_run(name, field):
    run = lm2_jax.preset(name)
    layout = Layout(make_mesh(MeshConfig(slots=4)), config=run)
    with pytest.raises(UserError) as caught:
        layout.shardings({"slots": ("batch", "slots", None)}, {"slots": float32(8, 6, 32)})
    assert str(caught.value).startswith(f"{field}=6 is not divisible by mesh.slots=4 ")
    assert f"change {field}, mesh.slots." in str(caught.value)


def test_a_mesh_axis_that_nothing_lies_on_is_refused():
    layout = layout_of(MeshConfig(slots=2))
    layout.check_used({"state": Bank(("batch", "slots", None), ("batch",))})
    with pytest.raises(UserError, match=r"mesh.slots=2, but that axis splits no .*to 1.*\['data', 'fsdp', 'model'\]"):
        layout.check_used({"state": Bank(("batch", "heads", None), ("batch",)), "step": ()})


def test_any_size_lies_on_mesh_axes_of_size_one():
    placed = layout_of(MeshConfig()).shardings({"w": ("embed", "heads")}, {"w": float32(7, 3)})
    assert placed["w"].spec == P(("fsdp", "slots"), "model")
    assert placed["w"].shard_shape((7, 3)) == (7, 3)


def test_wrong_trees_are_refused():
    layout = layout_of(SPLIT)
    with pytest.raises(ValueError, match="w: 1 logical axes"):
        layout.shardings({"w": ("embed",)}, {"w": float32(20, 8)})
    with pytest.raises(ValueError, match=r"[Kk]ey"):
        layout.shardings({"v": ("embed",)}, {"w": float32(20)})


def test_constraints_work_inside_the_context_and_only_there():
    layout = layout_of(SPLIT)

    @jax.jit
    def double(x):
        return constrain(2 * x, ("batch", "slots", "heads"))

    x = jnp.ones((8, 16, 4))
    with layout.context():
        assert double(x).sharding.shard_shape(x.shape) == (4, 8, 2)
        with pytest.raises(ValueError, match=r"unknown logical axis 'slotz'.*Did you mean 'slots'"):
            constrain(x, ("batch", "slotz", "heads"))
    assert len(double(x).sharding.device_set) == 1


def test_rows_of_a_part_of_a_step_are_told_by_what_cuts_them():
    message = "^batch=2 is not divisible by mesh.data=4; change data.rows, optim.accumulate, mesh.data$"
    with layout_of(MeshConfig(data=4, fsdp=2)).context(), pytest.raises(ValueError, match=message):
        constrain(jnp.ones((2, 3)), ("copies", None))


def test_what_is_one_for_all_rows_is_not_cut_by_rows():
    layout = layout_of(SPLIT)

    @jax.jit
    def double(x):
        with partition.replicated("batch"):
            return constrain(2 * x, ("batch", "slots", "heads"))

    x = jnp.ones((1, 16, 4))
    with layout.context():
        with pytest.raises(ValueError, match=r"batch=1 is not divisible by mesh\.fsdp=2"):
            constrain(x, ("batch", "slots", "heads"))
        assert double(x).sharding.shard_shape(x.shape) == (1, 8, 2)
        with pytest.raises(ValueError, match="unknown logical axis 'bach'"), partition.replicated("bach"):
            pass
        with pytest.raises(ValueError, match="not divisible"):
            constrain(x, ("batch", "slots", "heads"))
    with partition.replicated("batch"):
        assert constrain(x, ("batch", "slots", "heads")) is x


def test_an_activation_keeps_its_width_whole():
    layout = layout_of(SPLIT)
    with layout.context():
        x = jax.jit(lambda x: constrain(x, ("batch", "time", "embed")))(jnp.ones((8, 6, 20)))
    assert x.sharding.shard_shape(x.shape) == (4, 3, 20)


class Head(nn.Module):
    """One kernel with names and one parameter without."""

    @nn.compact
    def __call__(self, x):
        names = nn.with_logical_partitioning(nn.initializers.normal(0.1), ("embed", "heads"))
        w = self.param("w", names, (20, 4))
        return constrain(x @ w, ("batch", "heads")) * self.param("scale", nn.initializers.ones, ())


def test_a_sharded_step_equals_the_step_on_one_device():
    layout, head, optimizer = layout_of(SPLIT), Head(), optax.adamw(0.1)
    x = np.random.default_rng(0).normal(size=(8, 20)).astype(np.float32)
    boxed = jax.eval_shape(head.init, jax.random.key(0), x)["params"]
    boxed = {"params": boxed, "optimizer": jax.eval_shape(optimizer.init, boxed)}
    axes, shapes = axes_of(boxed), nn.unbox(boxed)
    assert axes["params"] == {"w": ("embed", "heads"), "scale": ()}

    def step(params, x):
        def loss(params):
            return jnp.sum(head.apply({"params": params}, x) ** 2)

        with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts with floats
            updates, state = optimizer.update(jax.grad(loss)(params), optimizer.init(params), params)
        return {"params": optax.apply_updates(params, updates), "optimizer": state}

    params = nn.unbox(head.init(jax.random.key(0), x)["params"])
    expected = jax.jit(step)(params, x)
    where = layout.shardings(axes, shapes)
    with layout.context():
        placed = jax.device_put(params, where["params"])
        result = jax.jit(step, out_shardings=where)(placed, layout.batch(x))
    assert placed["w"].sharding.shard_shape((20, 4)) == (5, 2)
    assert result["optimizer"][0].mu["w"].sharding.shard_shape((20, 4)) == (5, 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), result, expected)


def test_a_batch_is_split_over_data_and_fsdp():
    layout = layout_of(MeshConfig(data=2, fsdp=2, model=2))
    batch = Bank(np.arange(8 * 6, dtype=np.int32).reshape(8, 6), np.arange(8) % 2 == 0)
    placed = layout.batch(batch)
    assert placed.slots.sharding.spec == P(("data", "fsdp"))
    assert {shard.data.shape for shard in placed.slots.addressable_shards} == {(2, 6)}
    jax.tree.map(np.testing.assert_array_equal, placed, batch)


def test_rows_of_the_only_process_are_all_rows():
    assert layout_of(MeshConfig()).rows_of_process(16) == (0, 16)
    assert layout_of(SPLIT).rows_of_process(2) == (0, 2)


class OtherHost:
    """A sharding as the second of two processes sees it, each with half of the mesh's devices."""

    def __init__(self, sharding):
        self.sharding = sharding

    def addressable_devices_indices_map(self, shape):
        mine = list(self.sharding.mesh.devices.flat)[4:]
        return {d: i for d, i in self.sharding.devices_indices_map(shape).items() if d in mine}


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        (MeshConfig(data=2, fsdp=2, model=2), (8, 8)),  # its own half
        (MeshConfig(data=8), (8, 8)),
        (MeshConfig(data=1, model=2, slots=4), (0, 16)),  # all: the processes differ in heads only
    ],
)
def test_rows_of_one_process_of_two(config, rows):
    layout = layout_of(config)
    layout._rows = OtherHost(layout._rows)  # type: ignore[assignment]
    assert layout.rows_of_process(16) == rows


def test_rows_that_are_not_contiguous_are_refused():
    layout = layout_of(MeshConfig(data=8))
    devices = list(layout.mesh.devices.flat)

    class Scattered(OtherHost):
        def addressable_devices_indices_map(self, shape):
            return {d: i for d, i in self.sharding.devices_indices_map(shape).items() if d in devices[::2]}

    layout._rows = Scattered(layout._rows)  # type: ignore[assignment]
    with pytest.raises(UserError, match="not contiguous"):
        layout.rows_of_process(16)


@pytest.mark.parametrize("rows", [0, 6])
def test_rows_that_do_not_divide_are_refused(rows):
    layout = layout_of(MeshConfig(data=2, fsdp=2, model=2))
    with pytest.raises(UserError, match=rf"data.rows={rows} .* multiple of 4,.*mesh.data=2, mesh.fsdp=2"):
        layout.rows_of_process(rows)
    with pytest.raises(UserError, match=f"rows of this process={rows}"):
        layout.batch(np.zeros((rows, 3)))


def test_a_table_without_a_name_is_refused_where_it_is_used():
    rules = tuple(row for row in RULES if row[0] != "slots")
    with pytest.raises(UserError, match=r"unknown logical axis 'slots'"):
        Layout(make_mesh(MeshConfig()), rules).shardings({"w": ("slots",)}, {"w": float32(4)})
