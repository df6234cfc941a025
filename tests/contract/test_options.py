"""Options that change what a call means: a memory that is silent at first, documents packed into a segment."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm2_jax
from lm2_jax.blocks.plain import PlainJoin
from lm2_jax.blocks.residual import ResidualJoin
from lm2_jax.memory.none import NoMemory
from tests.contract.subjects import SEGMENTS, UNOPTIMIZED, Subject, config_of, generic_params, precise, subject


def without_extra(params, like):
    """The part of `params` that has the names of `like`."""
    return {k: without_extra(params[k], v) if isinstance(v, dict) else params[k] for k, v in like.items()}


@pytest.mark.parametrize("source", ["attention", "block"])
def test_a_silent_memory_changes_nothing_at_first(source):
    """Logits are those of the decoder without memory, bit for bit, before the scale has learned anything."""
    config = dataclasses.replace(lm2_jax.preset("lm2_tiny").model, join=ResidualJoin(silent_start=True, source=source))
    silent = Subject(config)
    plain = Subject(dataclasses.replace(config, memory=NoMemory(), join=PlainJoin()))
    params = generic_params(silent.model)
    block = params["blocks_0"]
    assert set(block) > set(plain.params["blocks_0"])
    start = jax.eval_shape(silent.model.init, jax.random.key(0), silent.tokens[:, : silent.T], silent.start())
    assert "loudness" in start["params"]["blocks_0"]
    params = {**params, "blocks_0": {**block, "loudness": {"b": jnp.zeros_like(block["loudness"]["b"])}}}
    silent.params, plain.params = params, without_extra(params, plain.params)
    np.testing.assert_array_equal(silent.apply(silent.tokens)[0], plain.apply(plain.tokens)[0])
    loud = {**params, "blocks_0": {**block, "loudness": {"b": jnp.full_like(block["loudness"]["b"], 1e-2)}}}
    silent.params = loud
    assert (np.asarray(silent.apply(silent.tokens)[0]) != np.asarray(plain.apply(plain.tokens)[0])).any()


def packed(case: Subject, starts: list[int]):
    """One row of documents that begin at `starts`, and a row for each of them alone.

    Returns:
      tokens, reset, valid and document of all rows, and the documents' spans.
    """
    spans = list(zip(starts, [*starts[1:], case.S], strict=True))
    tokens = np.repeat(case.tokens[:1], 1 + len(spans), axis=0)
    reset, valid = np.zeros((len(tokens), SEGMENTS), bool), np.ones(tokens.shape, bool)
    document = np.zeros(tokens.shape, np.int32)
    for first in starts[1:]:
        if first % case.T == 0:
            reset[0, first // case.T] = True
        else:  # all that is left of the segment belongs to a document of a higher number
            document[0, first : (first // case.T + 1) * case.T] += 1
    for row, (first, end) in enumerate(spans, 1):
        valid[row, :first] = valid[row, end:] = False
    return tokens, reset, valid, document, spans


@pytest.mark.parametrize(
    "name",
    [
        "middle_layer_learned_window",
        "block_write_window",
        pytest.param("window_scaled_rope_untied", marks=pytest.mark.slow),
        pytest.param("paper_shared", marks=pytest.mark.slow),
        pytest.param("full_persistent", marks=pytest.mark.slow),
        pytest.param("more_slots_than_width", marks=pytest.mark.slow),
    ],
)
def test_packed_documents_equal_each_document_alone(name):
    """Documents that end in a segment, begin and end in it, begin at its border, or go on for several."""
    case = subject(name)
    tokens, reset, valid, document, spans = packed(case, [0, 5, 7, 17, 24])

    def forward(params, state):
        return case.model.apply(
            {"params": params},
            jnp.asarray(tokens),
            state,
            jnp.asarray(reset),
            jnp.asarray(valid),
            method="forward",
            document=jnp.asarray(document),
            with_logits=True,
        )

    with precise(case.config):
        out = jax.jit(forward, compiler_options=UNOPTIMIZED)(case.params, case.start(len(tokens)))
    for row, (first, end) in enumerate(spans, 1):
        np.testing.assert_allclose(out.logits[0, first:end], out.logits[row, first:end], rtol=1e-9, atol=1e-9)
    last = len(spans)
    for together, alone in zip(case.row(out.state, 0), case.row(out.state, last), strict=True):
        np.testing.assert_allclose(together, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["rmt_tiny", "hmt_tiny"])
def test_packed_documents_need_state_per_layer(name):
    case = Subject(config_of(name))
    tokens = jnp.zeros((1, case.T), jnp.int32)
    with pytest.raises(ValueError, match="packed documents"):
        jax.eval_shape(
            lambda params: case.model.apply(
                {"params": params}, tokens, case.start(1), method="forward", document=tokens
            ),
            case.params,
        )
