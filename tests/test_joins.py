"""What joins add to a decoder: who sees whom, how two outputs become one, which pairs are refused."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lm2_jax
from lm2_jax.attention import Attention, ExtraKV
from lm2_jax.blocks.base import Block
from lm2_jax.blocks.combine import Mix, Product
from lm2_jax.blocks.context import ContextJoin
from lm2_jax.blocks.gate import GateBlock, GateJoin
from lm2_jax.blocks.layer import LayerJoin
from lm2_jax.blocks.mixed import MixedJoin, Part
from lm2_jax.blocks.mixer import MixerJoin
from lm2_jax.blocks.plain import PlainJoin
from lm2_jax.blocks.residual import ResidualJoin
from lm2_jax.blocks.tokens import TokensJoin
from lm2_jax.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from lm2_jax.data.shards import TokenShards
from lm2_jax.decoder import DecoderConfig
from lm2_jax.memory.bank_writes import SlotsWrite
from lm2_jax.memory.gated_bank import GatedBankConfig
from lm2_jax.memory.none import NoMemory
from lm2_jax.memory.titans import TitansConfig
from lm2_jax.memory.tokens import TokensConfig
from lm2_jax.model import LayerGroup, layer_groups
from lm2_jax.ops.ttt_chunk.networks import LinearNetwork
from lm2_jax.precision import Precision
from lm2_jax.state import Segments
from tests.contract.subjects import UNOPTIMIZED

T, D = 4, 8
BANK, TITANS = GatedBankConfig(num_slots=4, write=SlotsWrite()), TitansConfig(chunk_tokens=8)
LINEAR = dataclasses.replace(TITANS, network=LinearNetwork(), conv_tokens=0, remat="none")


def project_and_merge(layer, x, window, segments):
    """All parameters of an attention layer."""
    projected, window = layer.project(x, window, segments)
    return layer.output(projected.q), window


def sight(window_tokens: int | None, with_own: bool, documents: list[int] | None = None) -> list[str]:
    """For each token of a segment a row of 0 and 1: does it see the 2 rows of `always`, `own`, the window, the segment?

    Found by the gradient of each token's output with respect to each value.
    """
    decoder = DecoderConfig(width=D, num_heads=2, num_kv_heads=1, mlp_width=8, window_tokens=window_tokens)
    layer = Attention(decoder, Precision())
    rng = np.random.default_rng(0)
    segments = Segments(
        jnp.zeros((1, 1), bool),
        jnp.zeros(1, bool),
        jnp.ones((1, 1, T), bool),
        None if documents is None else jnp.asarray(documents)[None, None],
    )
    x = jnp.asarray(rng.standard_normal((1, 1, T, D)), jnp.float32)
    window = layer.init_window(1)
    if window is not None:
        window = window._replace(valid=jnp.ones_like(window.valid), is_start=jnp.zeros(1, bool))
    params = layer.init(jax.random.key(0), x, window, segments, method=project_and_merge)

    def values(v_always, v_own, v_past, v_here):
        projected, _ = layer.apply(params, x, window, segments, method="project")
        one = jax.tree.map(lambda a: a[:, 0], projected)
        kv = one.kv._replace(v=v_here)
        if kv.past is not None:
            kv = kv._replace(past=kv.past._replace(v=v_past))
        own = ExtraKV(kv.k, v_own) if with_own else None
        always = ExtraKV(jnp.ones((1, 2, 1, 4)), v_always)
        heads = layer.apply(params, one._replace(kv=kv), always, own, method="attend")
        return layer.apply(params, heads, method="output")[0].sum(axis=-1)

    W = layer.window_keys
    shapes = [(1, n, 1, 4) for n in (2, T, W, T)]
    jacobians = jax.jacobian(values, argnums=(0, 1, 2, 3))(*(jnp.ones(shape) for shape in shapes))
    seen = [np.abs(np.asarray(j)).sum(axis=(1, 3, 4)) > 0 for j in jacobians]
    return [" ".join("".join("01"[int(s)] for s in part[t]) for part in seen if part.shape[1]) for t in range(T)]


def test_persistent_rows_are_always_seen_and_the_segment_causally():
    zero = "0000"  # there are no rows of their own
    assert sight(None, False) == [f"11 {zero} 1000", f"11 {zero} 1100", f"11 {zero} 1110", f"11 {zero} 1111"]


def test_a_row_of_a_token_is_seen_from_that_token_on():
    assert sight(None, True) == ["11 1000 1000", "11 1100 1100", "11 1110 1110", "11 1111 1111"]


def test_a_window_narrows_the_segment_and_the_rows_of_tokens_alike():
    assert sight(3, True) == ["11 1000 11 1000", "11 1100 01 1100", "11 1110 00 1110", "11 0111 00 0111"]
    assert sight(1, True) == ["11 1000 1000", "11 0100 0100", "11 0010 0010", "11 0001 0001"]
    assert sight(1, False) == ["11 0000 1000", "11 0000 0100", "11 0000 0010", "11 0000 0001"]


def test_persistent_rows_are_seen_by_packed_documents():
    assert sight(None, False, [0, 0, 1, 1]) == ["11 0000 1000", "11 0000 1100", "11 0000 0010", "11 0000 0011"]


def combined(config, params, y, m):
    module = config.build(2, Precision())
    return module.apply({"params": params}, jnp.asarray([[y]], jnp.float32), jnp.asarray([[m]], jnp.float32), {})[0, 0]


def test_the_product_by_hand():
    """(3, 4) and (1, -1) have roots of mean squares of 12.5^0.5 and 1."""
    params = {"norm_attention": {"scale": jnp.array([1.0, 2.0])}, "norm_memory": {"scale": jnp.array([1.0, 0.0])}}
    o = combined(Product(), params, [3.0, 4.0], [1.0, -1.0])
    sigmoid = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(o, [3 / 12.5**0.5 * sigmoid, 2 * 4 / 12.5**0.5 * 0.5], rtol=1e-4)


def test_the_mix_by_hand():
    """Logits log 3 and 0 give 3/4 and 1/2 of attention, the rest of the memory."""
    ones, zeros = {"scale": jnp.ones(2)}, {"w": jnp.zeros((2, 2))}
    params = {"norm_attention": ones, "norm_memory": ones, "gate_attention": zeros, "gate_memory": zeros}
    params["gate_bias"] = {"b": jnp.array([np.log(3.0), 0.0], jnp.float32)}
    np.testing.assert_allclose(combined(Mix(), params, [8.0, 2.0], [4.0, 6.0]), [7.0, 4.0], rtol=1e-6)


def test_groups_of_a_mixed_decoder_are_its_parts():
    bank, titans = Part((0, 1, 4), BANK, GateJoin()), Part((3,), TITANS, ContextJoin())
    config = ModelConfig(memory=NoMemory(), join=MixedJoin(parts=(bank, titans)), decoder=DecoderConfig(num_layers=5))
    assert layer_groups(config) == [LayerGroup(0, 2), LayerGroup(2, 1), LayerGroup(3, 1), LayerGroup(4, 1)]
    assert config.has_memory
    assert config.block_of(3)[1].memory == TITANS
    assert config.block_of(2)[1].memory == NoMemory()
    state = lm2_jax.build_model(config).init_state(2)
    assert [type(group.memory).__name__ for group in state.groups] == [
        "BankState",
        "NoneType",
        "TitansState",
        "BankState",
    ]


@dataclasses.dataclass(frozen=True)
class Alternating(GateJoin, abstract=True):
    """A join with blocks of two kinds."""

    def block_of(self, layer, spec):
        return (Block, spec) if layer % 2 else super().block_of(layer, spec)


def test_a_part_with_several_kinds_of_blocks_says_which_is_where():
    config = mixed(Part((0, 1, 2), BANK, Alternating()))
    assert [config.block_of(layer)[0] for layer in range(3)] == [GateBlock, Block, GateBlock]


def mixed(*parts: Part) -> ModelConfig:
    return ModelConfig(memory=NoMemory(), join=MixedJoin(parts=parts), decoder=DecoderConfig(num_layers=3))


PACKED = DataConfig(source=TokenShards(path="shards", packing="packed"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ModelConfig(memory=BANK, join=MixerJoin()), ["join 'mixer'", "'titans'", "'gated_bank'"]),
        (lambda: ModelConfig(memory=TokensConfig(), join=GateJoin()), ["join 'gate'", "'gated_bank'", "'titans'"]),
        (lambda: ModelConfig(memory=NoMemory(), join=LayerJoin()), ["join 'layer'", "'none'"]),
        (lambda: ModelConfig(memory=GatedBankConfig(), join=ContextJoin()), ["'context'", "memory.write", "'slots'"]),
        (lambda: ModelConfig(memory=TITANS, join=ContextJoin(retrieve="rows")), ["join.retrieve='rows'", "'titans'"]),
        (
            lambda: ModelConfig(memory=dataclasses.replace(BANK, top_k=2), join=ContextJoin(retrieve="rows")),
            ["join.retrieve='rows'", "memory.top_k"],
        ),
        (lambda: ModelConfig(memory=BANK, join=ContextJoin(retrieve="queries")), ["join.num_queries=0", "'queries'"]),
        (lambda: ModelConfig(memory=BANK, join=ContextJoin(num_queries=2)), ["join.num_queries=2", "'tokens'"]),
        (lambda: ModelConfig(memory=BANK, join=GateJoin(num_persistent=33)), ["join.num_persistent=33", "=32"]),
        (lambda: ModelConfig(memory=NoMemory(), join=PlainJoin(num_persistent=-1)), ["join.num_persistent", "-1"]),
        (lambda: ModelConfig(memory=BANK, join=LayerJoin(layers=())), ["join.layers is empty"]),
        (lambda: ModelConfig(memory=BANK, join=GateJoin(layers=(2,))), ["join.layers=(2,)", "num_layers=2"]),
        (lambda: ModelConfig(memory=TITANS, join=ResidualJoin()), ["join.read='shared'", "'titans'", "'own'"]),
        (
            lambda: ModelConfig(memory=TITANS, join=ResidualJoin(read="own", topology="threaded")),
            ["join.topology='threaded'", "'per_layer'"],
        ),
        (
            lambda: ModelConfig(memory=TitansConfig(chunk_tokens=5), join=MixerJoin()),
            ["memory.chunk_tokens=5", "32", "model.segment_tokens"],
        ),
        (lambda: mixed(), ["join.parts is empty"]),
        (lambda: mixed(Part((), BANK, GateJoin())), ["join.parts[0].layers is empty"]),
        (lambda: mixed(Part((0,), BANK, GateJoin()), Part((0,), TITANS, GateJoin())), ["join.parts[*].layers=(0, 0)"]),
        (lambda: mixed(Part((3,), BANK, GateJoin())), ["join.parts[*].layers=(3,)", "num_layers=3"]),
        (lambda: mixed(Part((0,), BANK, GateJoin(layers=(1,)))), ["join.parts[0].join.layers", "None"]),
        (lambda: mixed(Part((0,), TITANS, GateJoin()), Part((1,), BANK, MixerJoin())), ["join.parts[1]", "'mixer'"]),
        (
            lambda: mixed(Part((0,), NoMemory(), MixedJoin(parts=(Part((0,), BANK, GateJoin()),)))),
            ["join.parts[0].join is 'mixed'", "into join.parts"],
        ),
        (lambda: mixed(Part((0,), TokensConfig(), TokensJoin())), ["join.parts[0].join", "'tokens'", "per layer"]),
        (
            lambda: mixed(Part((0,), GatedBankConfig(), ResidualJoin(topology="threaded"))),
            ["join.parts[0].join", "'residual'", "per layer"],
        ),
        (
            lambda: ModelConfig(memory=BANK, join=MixedJoin(parts=(Part((0,), BANK, GateJoin()),))),
            ["join 'mixed'", "'none'", "'gated_bank'"],
        ),
        (
            lambda: RunConfig(model=ModelConfig(memory=BANK, join=GateJoin()), data=PACKED),
            ["'gate'", "packed documents", "'ordered'"],
        ),
        (
            lambda: RunConfig(model=ModelConfig(memory=TITANS, join=ResidualJoin(read="own")), data=PACKED),
            ["'titans'", "packed documents"],
        ),
        (lambda: RunConfig(model=ModelConfig(memory=TokensConfig(), join=TokensJoin()), data=PACKED), ["packed"]),
    ],
)
def test_pairs_that_make_no_sense_are_refused_with_the_field_to_change(make, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the words below are the match)
        make()
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, caught.value


@pytest.mark.parametrize(
    ("memory", "join", "learns"),
    [
        (TITANS, GateJoin(), True),
        (TITANS, LayerJoin(), True),
        (TITANS, MixerJoin(), True),
        (TITANS, ContextJoin(), True),
        (TITANS, ResidualJoin(read="own"), False),
        (BANK, GateJoin(), False),
        (BANK, ContextJoin(), False),
        (NoMemory(), MixedJoin(parts=(Part((0,), TITANS, GateJoin()), Part((1,), TITANS, MixerJoin()))), True),
        (NoMemory(), MixedJoin(parts=(Part((0,), TITANS, GateJoin()), Part((1,), BANK, GateJoin()))), False),
    ],
)
def test_a_memory_that_shows_a_segment_its_own_writes_learns_within_it(memory, join, learns):
    model = ModelConfig(memory=memory, join=join)
    for one in ({"data": DataConfig(segments=(1,))}, {"train": TrainConfig(bptt_segments=1)}):
        with contextlib.nullcontext() if learns else pytest.raises(ValueError, match="writes would get no gradient"):
            RunConfig(model=model, **one)


@pytest.mark.parametrize(
    ("memory", "join"),
    [
        (LINEAR, MixerJoin()),
        pytest.param(LINEAR, ContextJoin(), marks=pytest.mark.slow),
        pytest.param(LINEAR, GateJoin(), marks=pytest.mark.slow),
        pytest.param(LINEAR, LayerJoin(), marks=pytest.mark.slow),
        pytest.param(LINEAR, ResidualJoin(read="own"), marks=pytest.mark.slow),
        (BANK, GateJoin()),
    ],
)
def test_writes_have_a_gradient_within_a_segment_where_the_join_says_so(memory, join):
    """The loss of one segment, with respect to what only writes use: values of Titans, the bank's writer."""
    decoder = DecoderConfig(width=D, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=8)
    config = ModelConfig(vocab_size=8, segment_tokens=8, decoder=decoder, memory=memory, join=join)
    model, tokens = lm2_jax.build_model(config), jnp.arange(8)[None]
    state = model.init_state(1)
    params = nn.unbox(jax.jit(model.init, compiler_options=UNOPTIMIZED)(jax.random.key(0), tokens, state))
    weight = jnp.sin(jnp.arange(64.0)).reshape(1, 8, 8)
    gradient = jax.grad(lambda p: jnp.sum(weight * model.apply(p, tokens, state)[0]))
    grads = jax.jit(gradient, compiler_options=UNOPTIMIZED)(params)
    grads = grads["params"]["blocks_0"]["memory"]["v" if isinstance(memory, TitansConfig) else "writer"]
    assert (max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(grads)) > 0) == join.learns_within_segment(memory)


def test_pairs_that_make_sense_may_be_packed_if_nothing_runs_along():
    for memory, join in ((GatedBankConfig(), ResidualJoin()), (NoMemory(), PlainJoin(num_persistent=2))):
        assert RunConfig(model=ModelConfig(memory=memory, join=join), data=PACKED).model.takes_packed
