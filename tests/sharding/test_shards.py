"""Shards of a bank, and devices with a shard of a Titans memory, together compute what one device computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm2_jax import partition
from lm2_jax.attention.softmax import ExtraKV, attend_from_end
from lm2_jax.memory.bank_reads import attend_slots, tokens_to_slots
from lm2_jax.memory.titans import TitansConfig
from lm2_jax.ops.ttt_chunk.chunk import ChunkInputs, FastWeights, Rates
from lm2_jax.ops.ttt_chunk.networks import LinearNetwork, MlpNetwork, NormWeights, SwigluNetwork
from lm2_jax.ops.ttt_chunk.sharded import read_frozen, ttt_chunk
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from tests.contract.subjects import UNOPTIMIZED

B, T, N, H, G, K = 2, 8, 12, 4, 2, 6
SPLIT = MeshConfig(data=1, model=2, slots=4)

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def split_and_whole(fn, arguments, mesh=SPLIT):
    """Value and gradient of a weighted sum of what `fn` returns, on a mesh and on one device; the mesh's jaxpr."""

    def program(arguments):
        def loss(arguments):
            results = jax.tree.leaves(fn(*arguments))
            return sum(jnp.sum(normal(99 + i, *y.shape) * y) for i, y in enumerate(results)), results

        return jax.value_and_grad(loss, has_aux=True)(arguments)

    def compiled():
        return jax.jit(lambda arguments: program(arguments), compiler_options=UNOPTIMIZED)

    with Layout(make_mesh(mesh)).context():
        here, text = compiled()(arguments), str(jax.make_jaxpr(lambda arguments: program(arguments))(arguments))
    there = compiled()(arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), here, there)
    return text


def test_a_split_bank_is_read_and_written_as_a_whole_one():
    valid = np.ones((B, T), bool)
    valid[1, 1:] = False  # three of the four shards hold nothing but padding of this row

    def fn(q, k, v, slots_q, slots_k, slots_v):
        keys, rows = ExtraKV(slots_k, slots_v), ExtraKV(slots_k, slots_v)
        every_head = ExtraKV(*(jnp.repeat(a, H // G, axis=2) for a in keys))
        return {
            "read": attend_slots(q, keys),
            "best": attend_slots(q, keys, top_k=5),  # more than one shard has, so from several
            "one": attend_slots(q, keys, top_k=1),
            "piece": attend_slots(q[:, :3], keys, top_k=2),  # too short to be split
            "behind": attend_from_end(slots_q, ExtraKV(k, v), jnp.asarray(valid), rows),
            "tokens": attend_from_end(slots_q, ExtraKV(k, v), jnp.asarray(valid[::-1]), None),
            "brought": tokens_to_slots(q, every_head, jnp.tanh(q), jnp.asarray(valid), None),
        }

    shapes = ((T, H), (T, G), (T, G), (N, H), (N, G), (N, G))
    text = split_and_whole(fn, tuple(normal(i, B, *shape, K) for i, shape in enumerate(shapes)))
    assert text.count("shard_map") >= 6
    assert "ppermute" in text


def test_best_slots_come_from_all_shards():
    # Slot n has the score n / 10: of the four best, three are on the last of four shards.
    k_BNGK = jnp.broadcast_to(jnp.arange(N, dtype=jnp.float64)[None, :, None, None], (B, N, 1, 1))
    with Layout(make_mesh(MeshConfig(data=2, slots=4))).context():
        found_BTHK = attend_slots(jnp.full((B, T, 2, 1), 0.1), ExtraKV(k_BNGK, k_BNGK), top_k=4)
    best = np.arange(N - 4, N)
    expected = (np.exp(0.1 * best) * best).sum() / np.exp(0.1 * best).sum()
    np.testing.assert_allclose(found_BTHK, np.full((B, T, 2, 1), expected), rtol=1e-12)


@pytest.mark.parametrize(
    ("network", "mesh"),
    [
        (MlpNetwork(), SPLIT),
        (MlpNetwork(), MeshConfig(data=2, model=4)),
        (MlpNetwork(), MeshConfig(data=2, fsdp=4)),
        (MlpNetwork(depth=3), SPLIT),  # the third layer is replicated
        (SwigluNetwork(), SPLIT),
        (LinearNetwork(), SPLIT),
    ],
)
def test_titans_heads_rows_and_hidden_width_stay_on_their_devices(network, mesh):
    config, rows = TitansConfig(chunk_tokens=4, network=network), 8
    shapes = config.network.shapes(K)
    fast = FastWeights(*(tuple(0.2 * normal(i, rows, H, *s) for i, s in enumerate(shapes)) for _ in range(2)))
    rates = Rates(0.05 * jax.nn.sigmoid(normal(5, rows, T, H)), *(jax.nn.log_sigmoid(normal(6, rows, T, H)),) * 2)
    q, k, v = (normal(i, rows, T, H, K) / K**0.5 for i in (7, 8, 9))
    norm = NormWeights(1 + 0.1 * normal(10, H, K), 0.1 * normal(11, H, K))

    def fn(fast, q, k, v, rates, norm):
        tokens = ChunkInputs(q, k, v, rates, jnp.arange(T)[None] < jnp.arange(rows)[:, None] + 1)
        after, y, measured = ttt_chunk(config.spec, norm, None, fast, tokens, config.remat)
        return after, y, measured, read_frozen(config.spec.network, norm, after.weights, q)

    text = split_and_whole(fn, (fast, q, k, v, rates, norm if network.has_norm else None), mesh)
    assert "shard_map" in text


def test_without_devices_to_share_there_is_one_shard():
    def size(shards, x):
        return x + shards.size

    def shards_seen(mesh):
        with Layout(make_mesh(mesh)).context():
            mapped = partition.logical_shard_map(size, (("slots",),), ("slots",))
            return float(jax.jit(lambda x: mapped(x))(jnp.zeros(8))[0])

    assert shards_seen(MeshConfig(data=2, slots=4)) == 4
    assert shards_seen(MeshConfig()) == 1


def test_what_does_not_divide_is_refused():
    with Layout(make_mesh(SPLIT)).context(), pytest.raises(ValueError, match=r"slots=10 is not divisible by mesh.slo"):
        partition.logical_shard_map(lambda _, x: x, (("slots",),), ("slots",))(jnp.zeros(10))


def test_narrow_numbers_are_combined_too():
    q, k = normal(0, B, T, H, K).astype(jnp.bfloat16), normal(1, B, N, G, K).astype(jnp.bfloat16)

    def read(q, k):
        return attend_slots(q, ExtraKV(k, k)), attend_from_end(
            k[:, :, [0, 0, 1, 1]], ExtraKV(k, k), jnp.ones((B, N), bool), None
        )

    with Layout(make_mesh(SPLIT)).context():
        here = jax.jit(lambda q, k: read(q, k))(q, k)
    for a, b in zip(here, jax.jit(lambda q, k: read(q, k))(q, k), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.03)
