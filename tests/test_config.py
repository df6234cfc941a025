import dataclasses

import pytest

import lm2_jax
from lm2_jax.blocks import JOINS
from lm2_jax.blocks.plain import PlainJoin
from lm2_jax.blocks.residual import ResidualJoin
from lm2_jax.blocks.tokens import TokensJoin
from lm2_jax.config import (
    CheckpointConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from lm2_jax.decoder import DecoderConfig
from lm2_jax.errors import UserError
from lm2_jax.memory import REGISTRY
from lm2_jax.memory.bank_writes import SlotsWrite
from lm2_jax.memory.base import MemoryConfig
from lm2_jax.memory.gated_bank import GatedBankConfig
from lm2_jax.memory.none import NoMemory
from lm2_jax.memory.tokens import TokensConfig
from lm2_jax.rope import LinearScaling, Llama3Scaling


@pytest.mark.parametrize("name", sorted(lm2_jax.PRESETS))
def test_every_preset_survives_its_dictionary(name):
    run = lm2_jax.preset(name)
    assert run.name == name
    assert from_dict(RunConfig, to_dict(run)) == run


def test_a_nested_optional_config_survives_its_dictionary():
    decoder = DecoderConfig(rope_scaling=Llama3Scaling(factor=4.0), window_tokens=5)
    model = ModelConfig(decoder=decoder, join=ResidualJoin(layers=(1,)), schedule="segment_major")
    assert from_dict(ModelConfig, to_dict(model)) == model


def test_an_unknown_preset_is_named_with_near_misses():
    with pytest.raises(KeyError, match=r"unknown preset 'lm2_tinny'.*'lm2_tiny'"):
        lm2_jax.preset("lm2_tinny")


def test_every_memory_and_join_has_a_tiny_preset():
    """Small enough to be tried in seconds, as the contract says."""
    tiny = [run.model for name, run in lm2_jax.PRESETS.items() if name.endswith("_tiny")]
    assert {model.memory.kind for model in tiny} == set(REGISTRY)
    assert {model.join.kind for model in tiny} == set(JOINS)
    for model in tiny:
        assert model.decoder.width <= 64
        assert model.decoder.num_layers <= 4
        assert model.vocab_size <= 512
        assert model.segment_tokens == 32


def bank(**changes):
    return ModelConfig(memory=GatedBankConfig(**changes))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DecoderConfig(width=30, num_heads=4), ["decoder.width=30", "decoder.num_heads=4", "head_width"]),
        (lambda: DecoderConfig(num_heads=4, num_kv_heads=3), ["decoder.num_heads=4", "decoder.num_kv_heads=3"]),
        (lambda: DecoderConfig(width=12, num_heads=4), ["even head width", "3"]),
        (lambda: DecoderConfig(head_width=0), ["even head width", "0", "decoder.head_width"]),
        (lambda: DecoderConfig(rope_theta=0.0), ["decoder.rope_theta", "positive", "0.0"]),
        (lambda: DecoderConfig(num_layers=0), ["decoder.num_layers", "at least 1", "0"]),
        (lambda: ModelConfig(vocab_size=1), ["model.vocab_size", "at least 2"]),
        (lambda: ModelConfig(segment_tokens=0), ["model.segment_tokens", "at least 1", "0"]),
        (
            lambda: ModelConfig(segment_tokens=8, decoder=DecoderConfig(window_tokens=9)),
            ["decoder.window_tokens=9", "model.segment_tokens=8"],
        ),
        (lambda: ModelConfig(decoder=DecoderConfig(window_tokens=0)), ["decoder.window_tokens=0", "between 1 and"]),
        (lambda: bank(num_slots=0), ["memory.num_slots", "at least 1", "0"]),
        (lambda: bank(num_slots=3, top_k=4), ["memory.top_k=4", "memory.num_slots=3"]),
        (lambda: bank(num_slots=3, top_k=0), ["memory.top_k=0", "between 1 and"]),
        (lambda: bank(num_heads=0), ["memory.num_heads", "at least 1"]),
        (lambda: bank(num_heads=7), ["decoder.width=64", "memory.num_heads=7"]),
        (lambda: bank(num_heads=64, write=SlotsWrite()), ["memory.write.positions", "even head width, got 1"]),
        (lambda: TokensConfig(num_tokens=0), ["memory.num_tokens", "at least 1", "0"]),
        (
            lambda: ModelConfig(memory=TokensConfig(), join=ResidualJoin()),
            ["join 'residual'", "'gated_bank'", "'tokens'", "model.memory or model.join"],
        ),
        (lambda: ModelConfig(memory=GatedBankConfig(), join=TokensJoin()), ["join 'tokens'", "'gated_bank'"]),
        (lambda: ModelConfig(memory=GatedBankConfig(), join=PlainJoin()), ["join 'plain'", "'none'"]),
        (lambda: ModelConfig(memory=NoMemory(), join=ResidualJoin()), ["join 'residual'", "'none'"]),
        (lambda: ModelConfig(join=ResidualJoin(layers=(0, 2))), ["join.layers=(0, 2)", "decoder.num_layers=2"]),
        (lambda: ModelConfig(join=ResidualJoin(layers=(-1,))), ["model.join.layers", "negative", "(-1,)"]),
        (lambda: ModelConfig(join=ResidualJoin(layers=(1, 0))), ["join.layers=(1, 0)", "increasing"]),
        (lambda: ModelConfig(join=ResidualJoin(layers=(1, 1))), ["join.layers=(1, 1)", "increasing"]),
        (lambda: ModelConfig(join=ResidualJoin(layers=())), ["join.layers is empty", "'none'", "'plain'"]),
        (
            lambda: ModelConfig(memory=TokensConfig(), join=TokensJoin(), schedule="layer_major"),
            ["model.schedule='layer_major'", "'tokens'", "'segment_major'"],
        ),
        (
            lambda: ModelConfig(join=ResidualJoin(topology="threaded"), schedule="layer_major"),
            ["model.schedule='layer_major'", "'residual'"],
        ),
        (
            lambda: ModelConfig(
                memory=TokensConfig(), join=TokensJoin(), decoder=DecoderConfig(window_tokens=4), segment_tokens=8
            ),
            ["join 'tokens'", "decoder.window_tokens"],
        ),
        (
            lambda: ModelConfig(memory=GatedBankConfig(start="learned"), join=ResidualJoin(topology="threaded")),
            ["join.topology='threaded'", "memory.start"],
        ),
        (lambda: LossConfig(answer_weight=0.0), ["both weights are 0"]),
        (lambda: LossConfig(text_weight=-1.0), ["loss.text_weight", "negative"]),
        (lambda: LossConfig(time_chunk=0), ["loss.time_chunk", "at least 1", "0"]),
        (lambda: DataConfig(prefetch=-1), ["data.prefetch", "negative", "-1"]),
        (lambda: DataConfig(rows=0), ["data.rows", "at least 1"]),
        (lambda: DataConfig(segments=(2, 0), stage_steps=(5,)), ["data.segments", "(2, 0)"]),
        (lambda: DataConfig(segments=(2, 4)), ["data.stage_steps", "1 increasing", "(2, 4)"]),
        (lambda: DataConfig(segments=(2, 4, 8), stage_steps=(9, 5)), ["data.stage_steps", "(9, 5)"]),
        (lambda: OptimConfig(steps=10, warmup_steps=10), ["optim.warmup_steps=10", "optim.steps=10"]),
        (lambda: OptimConfig(learning_rate=0.0), ["optim.learning_rate", "positive"]),
        (lambda: OptimConfig(clip_norm=0.0), ["optim.clip_norm", "positive", "0.0"]),
        (lambda: OptimConfig(beta1=1.0), ["optim.beta1", "below 1", "1.0"]),
        (lambda: OptimConfig(beta2=-0.1), ["optim.beta2", "at least 0", "-0.1"]),
        (lambda: OptimConfig(final_fraction=-2.0), ["optim.final_fraction", "between 0 and 1", "-2.0"]),
        (lambda: OptimConfig(final_fraction=1.5), ["optim.final_fraction", "between 0 and 1", "1.5"]),
        (lambda: OptimConfig(weight_decay=-1.0), ["optim.weight_decay", "negative", "-1.0"]),
        (lambda: TrainConfig(eval_batches=-1), ["train.eval_batches", "negative", "-1"]),
        (lambda: TrainConfig(bptt_segments=0), ["train.bptt_segments", "at least 1"]),
        (lambda: CheckpointConfig(every_steps=0), ["checkpoint.every_steps"]),
        (lambda: CheckpointConfig(memory_every=0), ["checkpoint.memory_every", "at least 1", "0"]),
        (lambda: RunConfig(data=DataConfig(rows=6), optim=OptimConfig(accumulate=4)), ["data.rows=6", "accumulate=4"]),
        (lambda: DecoderConfig(max_positions=8, window_tokens=4), ["decoder.max_positions", "decoder.window_tokens"]),
        (lambda: DecoderConfig(max_positions=8, max_tokens=9), ["decoder.max_tokens=9", "decoder.max_positions=8"]),
        (
            lambda: DecoderConfig(max_positions=8, rope_scaling=LinearScaling()),
            ["decoder.rope_scaling", "max_positions"],
        ),
        (lambda: ModelConfig(decoder=DecoderConfig(max_positions=31)), ["model.segment_tokens=32", "max_positions=31"]),
        (
            lambda: dataclasses.replace(
                lm2_jax.preset("rmt_gpt2_tiny").model,
                decoder=dataclasses.replace(lm2_jax.preset("rmt_gpt2_tiny").model.decoder, max_positions=37),
            ),
            ["model.segment_tokens=32 and the 6 rows that the memory adds", "max_positions=37"],
        ),
        (lambda: RunConfig(train=TrainConfig(bptt_segments=1)), ["no gradient", "train.bptt_segments"]),
        (lambda: RunConfig(data=DataConfig(segments=(1,))), ["no gradient", "data.segments"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_field_to_change(make, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the words below are the match)
        make()
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, caught.value


def test_values_at_the_border_are_legal():
    assert DataConfig(prefetch=0).prefetch == TrainConfig(eval_every=0, eval_batches=0).eval_batches == 0
    assert OptimConfig(beta1=0.0, final_fraction=0.0, weight_decay=0.0, clip_norm=float("inf")).beta1 == 0.0
    assert OptimConfig(final_fraction=1.0).final_fraction == 1.0


def altered(*path, **changes):
    """The dictionary of lm2_tiny with keys added or replaced in one of its tables; None removes a key."""
    plain = to_dict(lm2_jax.preset("lm2_tiny"))
    table = plain
    for name in path:
        table = table[name]
    for key, value in changes.items():
        if value is None:
            del table[key]
        else:
            table[key] = value
    return plain


@pytest.mark.parametrize(
    ("plain", "words"),
    [
        (
            altered("optim", learning_rat=1.0),
            ["config.optim", "unknown 'learning_rat'", "Did you mean 'learning_rate'"],
        ),
        (altered("optim", steps=None), ["config.optim", "missing ['steps']"]),
        (altered("optim", steps="ten"), ["config.optim.steps", "expected int", "'ten'"]),
        (altered("optim", steps=2.5), ["config.optim.steps", "expected int", "2.5"]),
        (altered("optim", steps=True), ["config.optim.steps", "expected int", "True"]),
        (altered("optim", learning_rate="1e-3"), ["config.optim.learning_rate", "expected float"]),
        (altered("model", remat="ful"), ["config.model.remat", "'full'", "'ful'"]),
        (altered("model", "memory", kind="gated_bnk"), ["unknown kind 'gated_bnk'", "Did you mean 'gated_bank'"]),
        (altered("model", "memory", kind=None), ["config.model.memory.kind", "missing", "'gated_bank'"]),
        (altered("model", "memory", kind=5), ["config.model.memory.kind", "expected a name", "5"]),
        (altered("data", "source", kind=["x"]), ["config.data.source.kind", "expected a name", "['x']"]),
        (altered("model", "memory", num_slots=0), ["config.model.memory", "memory.num_slots"]),
        (altered("model", "memory", "write", kind="pper"), ["Did you mean 'paper'"]),
        (altered("model", decoder=3), ["config.model.decoder", "expected a table", "3"]),
        (altered("data", segments=4), ["config.data.segments", "expected a list", "4"]),
        (altered("data", segments=["4"]), ["config.data.segments[0]", "expected int"]),
        ("text", ["config", "expected a table", "'text'"]),
    ],
)
def test_a_wrong_dictionary_is_refused_with_the_path_to_it(plain, words):
    with pytest.raises(UserError) as caught:
        from_dict(RunConfig, plain)
    assert caught.value.status == 1, "a damaged file is no wrong usage"
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, caught.value


def test_an_integer_passes_for_a_float():
    run = from_dict(RunConfig, altered("optim", learning_rate=1))
    assert run.optim.learning_rate == 1.0
    assert isinstance(run.optim.learning_rate, float)


def test_a_kind_that_is_taken_is_refused():
    with pytest.raises(ValueError, match=r"Other: kind 'gated_bank' is taken by GatedBankConfig"):

        @dataclasses.dataclass(frozen=True)
        class Other(MemoryConfig):
            kind = "gated_bank"

    assert REGISTRY["gated_bank"] is GatedBankConfig
