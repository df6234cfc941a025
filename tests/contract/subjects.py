"""Models under test: generic parameters, and programs that are compiled once for all tests of a model."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lm2_jax
from lm2_jax.blocks.combine import Mix
from lm2_jax.blocks.context import ContextJoin
from lm2_jax.blocks.gate import GateJoin
from lm2_jax.blocks.layer import LayerJoin
from lm2_jax.blocks.layer_tokens import LayerTokensJoin
from lm2_jax.blocks.mixed import MixedJoin, Part
from lm2_jax.blocks.mixer import MixerJoin
from lm2_jax.blocks.plain import PlainJoin
from lm2_jax.blocks.recall import RecallJoin
from lm2_jax.blocks.residual import ResidualJoin
from lm2_jax.blocks.tokens import TokensJoin
from lm2_jax.config import ModelConfig
from lm2_jax.decoder import DecoderConfig
from lm2_jax.memory.associative import AssociativeConfig
from lm2_jax.memory.bank_writes import BlockWrite, ContentWrite, PaperWrite, SlotsWrite
from lm2_jax.memory.gated_bank import GatedBankConfig
from lm2_jax.memory.hierarchical import HierarchicalConfig
from lm2_jax.memory.none import NoMemory
from lm2_jax.memory.titans import GateConfig, TitansConfig
from lm2_jax.memory.tokens import TokensConfig
from lm2_jax.precision import Precision
from lm2_jax.rope import Llama3Scaling
from lm2_jax.state import map_axes

FLOAT64 = Precision("float64", "float64", "float64", "float64", "float64")
ROWS, SEGMENTS = 3, 3

# Compilation is most of the tests' time; without the optimizer it takes half as long.
UNOPTIMIZED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Programs that `lm2_jax` jits itself are compiled without the optimizer too."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@contextlib.contextmanager
def precise(config: ModelConfig) -> Iterator[None]:
    """Inside it, 64-bit arrays exist if the model uses them; jax's own attention then mixes them with float32."""
    if "float64" not in dataclasses.astuple(config.precision):
        yield
        return
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def generic_params(model: Any, seed: int = 0) -> Any:
    """Random parameters of sensible scale, none at the special value that it starts from."""
    shapes = nn.unbox(abstract_params(model))
    rng, width = np.random.default_rng(seed), model.config.decoder.width

    def draw(path: Any, leaf: Any) -> jax.Array:
        noise = rng.standard_normal(leaf.shape)
        value = {"scale": 1 + 0.1 * noise, "b": 0.5 + 0.3 * noise}.get(path[-1].key, noise * width**-0.5)
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith("memory/gate_forget/b/b"):
            value = value - 4  # Titans forgets this at every token: 60% would leave nothing of one after a segment
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def abstract_params(model: Any) -> Any:
    """Shapes of the parameters, in the boxes that name their axes."""
    tokens = jax.ShapeDtypeStruct((1, model.config.segment_tokens), jnp.int32)
    state = jax.eval_shape(lambda: model.init_state(1))
    return jax.eval_shape(model.init, jax.random.key(0), tokens, state)["params"]


class Result(NamedTuple):
    """One call of a model and the gradient of a weighted sum of what it returns."""

    logits: Any
    hidden: Any
    state: Any
    grads: Any


class Subject:
    """A model with generic parameters and three rows of three segments, in which no token stands twice.

    As no token stands twice, the embedding's gradient tells which position it comes from.
    """

    def __init__(self, config: ModelConfig, bptt_segments: int | None = None):
        self.config, self.bptt_segments = config, bptt_segments
        self.model = lm2_jax.build_model(config)
        self.T, self.S = config.segment_tokens, SEGMENTS * config.segment_tokens
        rng = np.random.default_rng(1)
        self.tokens = rng.permutation(config.vocab_size)[: ROWS * self.S].reshape(ROWS, self.S).astype(np.int32)
        self.float64 = config.precision.compute == "float64"
        self.optimized = config.precision.compute == "float32"
        self.tolerance = 1e-9 if self.float64 else 1e-4
        memories = {config.block_of(layer)[1].memory.kind for layer in range(config.decoder.num_layers)}
        self.stream_tolerance = 1e-5 if "titans" in memories and not self.float64 else self.tolerance

    @functools.cached_property
    def params(self) -> Any:
        with precise(self.config):
            return generic_params(self.model)

    @functools.cached_property
    def axes(self) -> Any:
        return self.model.state_axes()

    def start(self, rows: int = ROWS) -> Any:
        with precise(self.config):
            return self.model.init_state(rows)

    @property
    def remembers(self) -> bool:
        """Whether anything crosses a segment border."""
        return bool(jax.tree.leaves(self.start(1)))

    @functools.cached_property
    def _forward(self) -> Any:
        def forward(params: Any, tokens: Any, state: Any, reset: Any, valid: Any) -> Any:
            return self.model.apply({"params": params}, tokens, state, reset, valid)

        return jax.jit(forward, compiler_options=OPTIMIZED if self.optimized else UNOPTIMIZED)

    def apply(self, tokens: Any, state: Any = None, reset: Any = None, valid: Any = None) -> tuple[Any, Any]:
        """`model.apply`, compiled once per number of segments; `reset` is [B] for one segment.

        In float32 the program has all optimizations.
        """
        rows, segments = tokens.shape[0], tokens.shape[1] // self.T
        reset = np.zeros((rows, segments) if segments > 1 else rows, bool) if reset is None else reset
        valid = np.ones(tokens.shape, bool) if valid is None else valid
        with precise(self.config):
            state = self.model.init_state(rows) if state is None else state
            return self._forward(self.params, tokens, state, reset, valid)

    @functools.cached_property
    def _full(self) -> Any:
        def full(params: Any, tokens: Any, state: Any, reset: Any, valid: Any, weights: Any) -> Any:
            def loss(params: Any) -> Any:
                out = self.model.apply(
                    {"params": params},
                    tokens,
                    state,
                    reset,
                    valid,
                    method="forward",
                    bptt_segments=self.bptt_segments,
                    with_logits=True,
                )
                floats = [leaf for leaf in jax.tree.leaves(out.state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
                of_state = weights[2] * sum((jnp.sum(leaf * leaf) for leaf in floats), jnp.zeros((), out.hidden.dtype))
                total = jnp.sum(out.hidden * weights[0]) + jnp.sum(out.logits * weights[1]) + of_state
                return total, (out.logits, out.hidden, out.state)

            grads, rest = jax.grad(loss, has_aux=True)(params)
            return Result(*rest, grads)

        return jax.jit(full, compiler_options=UNOPTIMIZED)

    def run(
        self,
        tokens: Any = None,
        state: Any = None,
        reset: Any = None,
        valid: Any = None,
        hidden_weight: Any = 0.0,
        logits_weight: Any = 0.0,
        state_weight: float = 0.0,
    ) -> Result:
        """All segments and the gradient, in one program.

        Args:
          tokens: [ROWS S]; None: the subject's own.
          state: before them; None: fresh.
          reset: [ROWS SEGMENTS].
          valid: [ROWS S].
          hidden_weight: of each hidden value in the sum whose gradient is taken.
          logits_weight: of each logit in it.
          state_weight: of the squares of the state.
        """
        dtype, V, D = np.dtype(self.config.precision.params), self.config.vocab_size, self.config.decoder.width
        weights = (
            np.broadcast_to(np.asarray(hidden_weight, dtype), (ROWS, self.S, D)),
            np.broadcast_to(np.asarray(logits_weight, dtype), (ROWS, self.S, V)),
            np.asarray(state_weight, dtype),
        )
        with precise(self.config):
            return self._full(
                self.params,
                self.tokens if tokens is None else tokens,
                self.model.init_state(ROWS) if state is None else state,
                np.zeros((ROWS, SEGMENTS), bool) if reset is None else reset,
                np.ones((ROWS, self.S), bool) if valid is None else valid,
                weights,
            )

    @functools.cached_property
    def result(self) -> Result:
        """The subject's own tokens from a fresh start, with the gradient of random weights on the logits."""
        weight = np.random.default_rng(2).standard_normal((ROWS, self.S, self.config.vocab_size))
        return self.run(logits_weight=weight, hidden_weight=weight[:, :, : self.config.decoder.width])

    def reach(self, result: Result) -> np.ndarray:
        """[ROWS S] size of the gradient at each position's embedding; the loss must not use the tied head."""
        table_VD = np.asarray(result.grads["embed"]["table"])
        return np.abs(table_VD).max(axis=-1)[self.tokens]

    def hidden_weight(self, where: np.ndarray) -> np.ndarray:
        """Random weights at the positions of a [ROWS S] mask."""
        noise = np.random.default_rng(3).standard_normal((ROWS, self.S, self.config.decoder.width))
        return noise * where[:, :, None]

    def stream(self, tokens: Any, state: Any, valid: Any = None) -> tuple[Any, Any]:
        """`lm2_jax.stream`."""
        with precise(self.config):
            return lm2_jax.stream(self.model, self.params, tokens, state, valid)

    def row(self, state: Any, index: int) -> list[np.ndarray]:
        """One row of a state."""
        picked = map_axes(lambda axes, leaf: np.take(np.asarray(leaf), index, axes.index("batch")), self.axes, state)
        return jax.tree.leaves(picked)


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Trees of arrays that agree to an absolute and relative tolerance."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(np.asarray(a), np.asarray(e), rtol=tolerance, atol=tolerance, err_msg=name)


def assert_equal(actual: Any, expected: Any) -> None:
    """Trees of arrays that are equal bit for bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(e), err_msg=jax.tree_util.keystr(path))


TINY = sorted(name for name in lm2_jax.PRESETS if name.endswith("_tiny"))

# Each of these shares its memory, and most of its join, with a faster one: the slow lane holds their promises
# (`conftest`), all other tests of them are long.
_LONG_TINY = (
    "hybrid_tiny",
    "lm2_context_tiny",
    "none_window_tiny",
    "titans_lmm_tiny",
    "titans_mag_tiny",
    "titans_mal_tiny",
    "titans_residual_tiny",
    "window_tiny",
)

_DECODER = DecoderConfig(width=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=24)
_BASE = ModelConfig(
    vocab_size=113,
    segment_tokens=12,
    decoder=_DECODER,
    memory=GatedBankConfig(num_slots=5, num_heads=2),
    join=ResidualJoin(),
    precision=FLOAT64,
)
_SCALED = DecoderConfig(
    width=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    mlp_width=24,
    head_width=8,
    rope_scaling=Llama3Scaling(original_tokens=128),
    attention_bias="qkvo",
    qk_norm=True,
    tie_head=False,
    window_tokens=9,
)


def _decoder(**changes: Any) -> DecoderConfig:
    return dataclasses.replace(_DECODER, **changes)


def _variant(
    memory: Any = _BASE.memory, join: Any = _BASE.join, decoder: DecoderConfig = _DECODER, **changes: Any
) -> ModelConfig:
    return dataclasses.replace(_BASE, memory=memory, join=join, decoder=decoder, **changes)


def _bank(**changes: Any) -> GatedBankConfig:
    return dataclasses.replace(_BASE.memory, **changes)


# Nothing is forgotten, which no preset has.
_TITANS = TitansConfig(num_heads=2, chunk_tokens=4, forget=GateConfig(per="off"))

# Options that no preset has, several to a model; in float64, so that each comparison is exact to 1e-9.
VARIANTS: dict[str, ModelConfig] = {
    "window_scaled_rope_untied": _variant(NoMemory(), PlainJoin(), _SCALED),
    "window_of_a_segment": _variant(NoMemory(), PlainJoin(), _decoder(window_tokens=12)),
    "middle_layer_learned_window": _variant(
        _bank(start="learned", top_k=2, write=SlotsWrite()),
        ResidualJoin(layers=(1,)),
        _decoder(num_layers=3, window_tokens=5),
    ),
    "more_slots_than_width": _variant(
        _bank(
            num_slots=19,
            write=SlotsWrite(positions=False, codes=True, attend_slots=False, candidate="linear", mlp_width=None),
        ),
        ResidualJoin(read="own", source="attention"),
    ),
    "no_gates": _variant(
        _bank(write=SlotsWrite(gated=False, mlp_width=20)), ResidualJoin(read="own", gate=False), _decoder(head_width=6)
    ),
    "block_write_window": _variant(_bank(write=BlockWrite()), decoder=_decoder(window_tokens=7)),
    "block_write_own_no_gates": _variant(
        _bank(write=BlockWrite(gated=False, codes=False), start="learned"),
        ResidualJoin(read="own", topology="per_layer"),
    ),
    "paper_shared": _variant(_bank(write=PaperWrite(), top_k=3), ResidualJoin(read="shared", source="block")),
    "content": _variant(_bank(write=ContentWrite()), ResidualJoin(read="own", source="attention")),
    "content_shared_no_norm": _variant(
        _bank(write=ContentWrite(normalised=False, content=False), top_k=3, norm_slots=False),
        ResidualJoin(read="shared", source="block"),
    ),
    "content_gate_no_positions": _variant(
        _bank(write=ContentWrite(positions=False)), GateJoin(layers=(1,), num_persistent=1)
    ),
    "threaded_outer_layers_window": _variant(
        _bank(top_k=4), ResidualJoin(topology="threaded", layers=(0, 2)), _decoder(num_layers=3, window_tokens=4)
    ),
    "silent_learned": _variant(_bank(start="learned"), ResidualJoin(silent_start=True, source="attention")),
    "persistent_window": _variant(NoMemory(), PlainJoin(num_persistent=3), _decoder(window_tokens=7)),
    "context_window": _variant(
        _bank(write=SlotsWrite()),
        ContextJoin(num_persistent=2, source="attention"),
        _decoder(window_tokens=5, num_kv_heads=1),
    ),
    "context_rows_mix": _variant(
        _bank(write=PaperWrite()), ContextJoin(retrieve="rows", num_persistent=2, combine=Mix(bias=0.5))
    ),
    "context_queries": _variant(
        _TITANS,
        ContextJoin(retrieve="queries", num_queries=3, num_persistent=2, source="attention"),
        _decoder(window_tokens=7),
    ),
    "gate_mix_middle_layer": _variant(
        _bank(write=PaperWrite(), top_k=2),
        GateJoin(layers=(1,), num_persistent=3, combine=Mix()),
        _decoder(num_layers=3, window_tokens=7),
    ),
    "layer_learned": _variant(
        _bank(write=PaperWrite(), start="learned"), LayerJoin(num_persistent=3), _decoder(window_tokens=7)
    ),
    "mixer_outer_layers": _variant(_TITANS, MixerJoin(layers=(0, 2)), _decoder(num_layers=3, window_tokens=4)),
    "mixed_with_plain": _variant(
        NoMemory(),
        MixedJoin(
            parts=(
                Part(layers=(0, 3), memory=_TITANS, join=ResidualJoin(read="own")),
                Part(layers=(2,), memory=_bank(write=SlotsWrite()), join=LayerJoin(num_persistent=1)),
            )
        ),
        _decoder(num_layers=4),
    ),
    "full_persistent": _variant(NoMemory(), PlainJoin(num_persistent=2), _decoder(max_tokens=100)),
    "full_gate": _variant(
        _bank(write=PaperWrite()), GateJoin(layers=(1,), num_persistent=1), _decoder(max_tokens=97, num_kv_heads=1)
    ),
    "hmt_no_sensory": _variant(HierarchicalConfig(4, sensory_tokens=0, summary_tokens=12, key_width=3), RecallJoin()),
    "hmt_all_sensory_untied": _variant(
        HierarchicalConfig(num_memories=2, sensory_tokens=12, summary_tokens=5, key_width=6),
        RecallJoin(),
        _decoder(tie_head=False, num_kv_heads=1),
    ),
    "armt_learned_positions": _variant(
        AssociativeConfig(num_tokens=2, key_width=3),
        LayerTokensJoin(),
        _decoder(max_positions=12, norm="layer", mlp="gelu", attention_bias="qkvo"),
    ),
    "block_write_learned_positions": _variant(
        _bank(write=BlockWrite()), decoder=_decoder(max_positions=14, norm="layer", head_width=5)
    ),
    "rmt_mutual": _variant(TokensConfig(num_tokens=3), TokensJoin(mask="mutual")),
    "rmt_untied": _variant(TokensConfig(num_tokens=2), TokensJoin(), _decoder(tie_head=False, num_kv_heads=1)),
}

# Each of these shares all but one option with a faster one.
_SLOW = (
    "armt_learned_positions",
    "block_write_learned_positions",
    "block_write_own_no_gates",
    "block_write_window",
    "content_gate_no_positions",
    "content_shared_no_norm",
    "context_queries",
    "full_gate",
    "full_persistent",
    "hmt_all_sensory_untied",
    "hmt_no_sensory",
    "middle_layer_learned_window",
    "more_slots_than_width",
    "no_gates",
    "rmt_mutual",
    "rmt_untied",
    "silent_learned",
    "window_of_a_segment",
)
_LONG_VARIANTS = (
    "context_window",
    "persistent_window",
    "context_rows_mix",
    "gate_mix_middle_layer",
    "layer_learned",
    "mixer_outer_layers",
    "mixed_with_plain",
)
LONG = frozenset({*_LONG_TINY, *_LONG_VARIANTS})
# Of these the fast lane runs causality, padding and any split in float64; the slow lane all.
SLOW_TINY = frozenset({"armt_tiny", "gpt2_tiny", "hmt_tiny", "infini_tiny", "llama_tiny", "rmt_gpt2_tiny"})
# Whatever is slow of these is too long for the slow lane.
LONG_WHERE_SLOW = frozenset({"titans_mac_tiny"})
assert {*_SLOW, *LONG, *LONG_WHERE_SLOW} <= {*VARIANTS, *TINY}

NAMES = [
    pytest.param(name, marks=pytest.mark.slow if name in _SLOW or name in LONG else ()) for name in [*TINY, *VARIANTS]
]

# Their pieces take longest to compile.
_SLOW_IN_PIECES = (*_SLOW, "titans_mac_tiny")


def in_pieces(names: list[str]) -> list[Any]:
    """Names as parameters of a test of streaming."""
    return [pytest.param(name, marks=pytest.mark.slow if name in _SLOW_IN_PIECES else ()) for name in names]


def config_of(name: str) -> ModelConfig:
    """The model of a preset or variant."""
    return VARIANTS[name] if name in VARIANTS else lm2_jax.preset(name).model


@functools.cache
def subject(name: str) -> Subject:
    """The one subject of this name."""
    return Subject(config_of(name))


@functools.cache
def changed(name: str, bptt_segments: int | None = None, **changes: Any) -> Subject:
    """As `subject`, fields of its model changed."""
    return Subject(dataclasses.replace(config_of(name), **changes), bptt_segments)


@functools.cache
def small(name: str) -> Subject:
    """A preset in float64, its segments short, and its window shorter."""
    decoder = config_of(name).decoder
    if decoder.window_tokens is not None:
        decoder = dataclasses.replace(decoder, window_tokens=7)
    return changed(name, segment_tokens=12, decoder=decoder, precision=FLOAT64)
