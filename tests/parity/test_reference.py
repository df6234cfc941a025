"""The models against the numpy reference: logits and memories of every variant and preset, to 1e-9 in float64."""

import dataclasses

import jax
import numpy as np
import pytest

from lm2_jax.blocks.combine import Mix
from lm2_jax.blocks.context import ContextJoin
from tests.contract.subjects import NAMES, TINY, Subject, config_of, small, subject
from tests.parity.joins_reference import JoinsReference
from tests.parity.reference import llama_frequencies
from tests.parity.titans_reference import TitansReference

REFERENCES = {"none": JoinsReference, "tokens": JoinsReference, "gated_bank": JoinsReference, "titans": TitansReference}
KNOWN = [
    name
    for name in NAMES
    if config_of(name.values[0]).join.kind != "mixed" and config_of(name.values[0]).memory.kind in REFERENCES
]


def check(case: Subject, logits, state) -> None:
    reference, row = REFERENCES[case.config.memory.kind](case.config, case.params), 1
    expected, memories = reference.run(case.tokens[row])
    np.testing.assert_allclose(logits[row], expected, rtol=1e-9, atol=1e-9)
    found = neural_of if case.config.memory.kind == "titans" else memories_of
    got, want = found(state, row, case), jax.tree.leaves(memories)
    assert len(got) == len(want)
    for memory, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(memory, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", KNOWN)
def test_logits_and_memories_equal_the_reference(name):
    case = small(name) if name in TINY else subject(name)
    logits, state = case.apply(case.tokens) if name in TINY else (case.run().logits, case.run().state)
    check(case, logits, state)


@pytest.mark.slow
def test_a_context_that_writes_attention_alone_equals_the_reference():
    """With the mix, and a window that reaches over borders; `titans_mac_tiny` writes the stream."""
    config = small("titans_mac_tiny").config
    decoder = dataclasses.replace(config.decoder, window_tokens=7)
    join = ContextJoin(num_persistent=2, source="attention", combine=Mix(bias=0.5))
    case = Subject(dataclasses.replace(config, join=join, decoder=decoder))
    check(case, *case.apply(case.tokens))


def memories_of(state, row: int, case: Subject):
    """The [N D] memories of one row of a state, layer by layer."""
    if not case.config.has_memory:
        return []
    rows = getattr(case.config.memory, "num_slots", None) or case.config.memory.num_tokens
    shape = (rows, case.config.decoder.width)
    found = []
    for leaf in case.row(state, row):
        if leaf.shape == shape:
            found.append(leaf)
        elif leaf.shape[1:] == shape:
            found += list(leaf)
    return found


def neural_of(state, row: int, case: Subject):
    """Weights, momentum and tails of one row of a state, layer by layer."""
    memories = [group.memory for group in state.groups if group.memory is not None]
    leaves = [jax.tree.leaves((m.weights, m.momentum, m.tails)) for m in memories]
    return [leaf[layer, row] for run in leaves for layer in range(len(run[0])) for leaf in run]


def test_the_reference_scales_frequencies_as_llama_3_does():
    """The three regimes occur in the variant, so that its parity says something."""
    config = subject("window_scaled_rope_untied").config
    scaling, plain = config.decoder.rope_scaling, [10_000.0 ** (-i / 4) for i in range(4)]
    ratio = np.array(plain) / llama_frequencies(8, config)
    assert ratio[0] == 1
    assert 1 < ratio[1] < scaling.factor
    assert ratio[3] == pytest.approx(scaling.factor)
