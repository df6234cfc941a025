"""The models against the numpy reference: logits and memories of every variant and preset, to 1e-9 in float64."""

import numpy as np
import pytest

from tests.contract.subjects import NAMES, TINY, config_of, small, subject
from tests.parity.joins_reference import JoinsReference, knows
from tests.parity.reference import llama_frequencies

KNOWN = [name for name in NAMES if knows(config_of(name.values[0]))]


@pytest.mark.parametrize("name", KNOWN)
def test_logits_and_memories_equal_the_reference(name):
    case = small(name) if name in TINY else subject(name)
    logits, state = case.apply(case.tokens) if name in TINY else (case.run().logits, case.run().state)
    reference, row = JoinsReference(case.config, case.params), 1
    expected, memories = reference.run(case.tokens[row])
    np.testing.assert_allclose(logits[row], expected, rtol=1e-9, atol=1e-9)
    got = memories_of(case.row(state, row), case)
    assert len(got) == len(memories)
    for memory, expected in zip(got, memories, strict=True):
        np.testing.assert_allclose(memory, expected, rtol=1e-9, atol=1e-9)


def memories_of(leaves, case):
    """The [N D] memories among one row of a state, layer by layer."""
    if not case.config.has_memory:
        return []
    rows = getattr(case.config.memory, "num_slots", None) or case.config.memory.num_tokens
    shape = (rows, case.config.decoder.width)
    found = []
    for leaf in leaves:
        if leaf.shape == shape:
            found.append(leaf)
        elif leaf.shape[1:] == shape:
            found += list(leaf)
    return found


def test_the_reference_scales_frequencies_as_llama_3_does():
    """The three regimes occur in the variant, so that its parity says something."""
    config = subject("window_scaled_rope_untied").config
    scaling, plain = config.decoder.rope_scaling, [10_000.0 ** (-i / 4) for i in range(4)]
    ratio = np.array(plain) / llama_frequencies(8, config)
    assert ratio[0] == 1
    assert 1 < ratio[1] < scaling.factor
    assert ratio[3] == pytest.approx(scaling.factor)
