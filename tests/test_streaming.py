"""How text is cut for streaming; that the pieces give what the whole gives is tested in contract/."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lm2_jax
from lm2_jax.streaming import _pieces
from tests.contract.subjects import abstract_params


@pytest.fixture(scope="module")
def model():
    return lm2_jax.build_model(lm2_jax.preset("none_tiny").model)


@pytest.mark.parametrize(
    ("length", "sizes"),
    [
        (1, [1]),
        (2, [4]),
        (4, [4]),
        (5, [16]),
        (17, [32]),
        (32, [32]),
        (33, [32, 1]),
        (100, [32, 32, 32, 4]),
    ],
)
def test_pieces_have_one_of_few_sizes(model, length, sizes):
    """So that few programs are compiled; no token is lost or doubled."""
    tokens = np.arange(2 * length).reshape(2, length)
    pieces = _pieces(model, tokens, None)
    assert [piece.arrays[0].shape for piece in pieces] == [(2, size) for size in sizes]
    again = np.concatenate([piece.arrays[0][:, : piece.used] for piece in pieces], axis=1)
    np.testing.assert_array_equal(again, tokens)
    for piece in pieces:
        np.testing.assert_array_equal(piece.arrays[1], [piece.used] * 2)
        assert (piece.arrays[0][:, piece.used :] == 0).all()


def test_each_row_counts_its_own_tokens(model):
    lengths = np.array([40, 32, 3, 0])
    valid = np.arange(40)[None] < lengths[:, None]
    counts = [piece.arrays[1] for piece in _pieces(model, np.zeros((4, 40), int), valid)]
    np.testing.assert_array_equal(counts, [[32, 32, 3, 0], [8, 0, 0, 0]])


@pytest.mark.parametrize("feed", [lm2_jax.stream, lm2_jax.absorb])
def test_a_state_of_other_rows_is_refused(feed):
    """As `forward` says it, at a border and inside a segment."""
    config = lm2_jax.preset("none_tiny").model
    decoder = dataclasses.replace(config.decoder, num_layers=1, window_tokens=2)
    model = lm2_jax.build_model(dataclasses.replace(config, segment_tokens=4, decoder=decoder))
    params = nn.unbox(abstract_params(model))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    state, one = model.init_state(1), np.zeros((1, 1), np.int32)
    inside = feed(model, params, one, state)[1]
    for before in (state, inside):
        with pytest.raises(ValueError, match=r"state has 1 rows, tokens have 2; make it with init_state\(batch=2\)"):
            feed(model, params, np.zeros((2, 1), np.int32), before)


def test_an_open_segment_keeps_no_text_but_its_own():
    """Streaming's memory does not depend on how much was read."""
    model = lm2_jax.build_model(lm2_jax.preset("lm2_tiny").model)
    state = jax.eval_shape(lambda: model.init_state(1))
    opened = jax.eval_shape(lambda p, s: model.apply({"params": p}, s, 1, method="open"), abstract_params(model), state)
    T, D = model.config.segment_tokens, model.config.decoder.width
    largest = max(leaf.size for leaf in jax.tree.leaves(opened))
    assert largest <= model.config.decoder.num_layers * T * D
