import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm2_jax.attention import Attention
from lm2_jax.attention.keys import Keys, Queries, visible
from lm2_jax.attention.softmax import dot_product_attention as attend
from lm2_jax.decoder import DecoderConfig
from lm2_jax.precision import Precision

T = 4


def attention(window_tokens: int | None = None) -> Attention:
    decoder = DecoderConfig(
        width=8, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=4, window_tokens=window_tokens
    )
    return Attention(decoder, Precision(), parent=None)


def segment_keys(window_tokens: int | None, valid=None) -> Keys:
    """The keys of a window and of a segment of T tokens."""
    W = attention(window_tokens).window_keys
    zeros = jnp.zeros((1, W + T, 1, 2))
    return Keys(zeros, zeros, np.arange(-W, T), valid)


def seen_by_segment(window_tokens: int | None, valid=None):
    return visible(Queries(jnp.zeros((1, T, 1, 2))), segment_keys(window_tokens, valid), window_tokens)


@pytest.mark.parametrize(
    ("window_tokens", "sees"),
    [
        (
            3,  # two keys of the segment before, at -2 and -1
            [
                "11 1000",
                "01 1100",
                "00 1110",
                "00 0111",
            ],
        ),
        (
            4,
            [
                "111 1000",
                "011 1100",
                "001 1110",
                "000 1111",
            ],
        ),
        (2, ["1 1000", "0 1100", "0 0110", "0 0011"]),
        (1, ["1000", "0100", "0010", "0001"]),  # itself alone, and nothing crosses a border
        (None, ["1000", "1100", "1110", "1111"]),
    ],
)
def test_a_token_of_the_window_sees_itself_and_those_before(window_tokens, sees):
    mask = seen_by_segment(window_tokens)
    expected = np.array([[c == "1" for c in row.replace(" ", "")] for row in sees])
    np.testing.assert_array_equal(mask[0], expected)


def test_a_key_that_does_not_count_is_not_seen():
    valid = jnp.array([[True, False, True, True, False, True]])
    mask = seen_by_segment(3, valid)
    assert not np.asarray(mask)[0][:, [1, 4]].any()
    assert np.asarray(mask)[0][:, [0, 2, 3, 5]].any(axis=0).all()


def test_a_piece_of_a_segment_sees_what_its_positions_see():
    rows = visible(Queries(jnp.zeros((1, 2, 1, 2)), jnp.array([[1, 3]])), segment_keys(3), 3)
    np.testing.assert_array_equal(rows[0], np.asarray(seen_by_segment(3))[0][[1, 3]])


def test_every_query_sees_a_prefix_and_its_own_document():
    queries = Queries(jnp.zeros((1, 3, 1, 2)), document=jnp.array([[0, 0, 1]]))
    zeros = jnp.zeros((1, 3, 1, 2))
    assert visible(queries, Keys(zeros, zeros), 1).all()
    tokens = visible(queries, Keys(zeros, zeros, np.arange(3), document=queries.document), None)
    np.testing.assert_array_equal(tokens[0], [[1, 0, 0], [1, 1, 0], [0, 0, 1]])


def test_without_a_window_no_key_is_carried():
    assert attention().window_keys == 0
    assert attention().init_window(3) is None
    window = attention(3).init_window(5)
    assert window is not None
    assert window.k.shape == (5, 2, 1, 4)
    assert window.is_start.all()
    assert not window.valid.any()


def random(*shapes, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@pytest.mark.parametrize("causal", [True, False])
def test_attend_in_float64_is_attend_in_float32(causal):
    q, k, v = random((2, 4, 4, 6), (2, 4, 2, 6), (2, 4, 2, 6))
    mask = jnp.asarray(np.random.default_rng(1).random((2, 1, 1, 4)) < 0.7).at[:, :, :, 0].set(True)
    narrow = attend(q, k, v, mask, causal)
    with jax.enable_x64(True):
        wide = attend(*(a.astype(jnp.float64) for a in (q, k, v)), mask, causal)
    assert wide.dtype == np.float64
    np.testing.assert_allclose(wide, narrow, rtol=1e-5, atol=1e-6)


def test_attend_by_hand():
    """Scores 0 and log 3 mix two values as 1 : 3; the causal mask hides the second key from the first query."""
    q = jnp.ones((1, 2, 1, 1))
    k = jnp.array([0.0, np.log(3.0)], jnp.float32).reshape(1, 2, 1, 1)
    v = jnp.array([4.0, 8.0]).reshape(1, 2, 1, 1)
    everything = jnp.ones((1, 1, 1, 2), bool)
    np.testing.assert_allclose(attend(q, k, v, everything).ravel(), [7, 7], rtol=1e-6)
    np.testing.assert_allclose(attend(q, k, v, everything, causal=True).ravel(), [4, 7], rtol=1e-6)


def test_a_query_that_may_see_nothing_is_finite():
    q, k, v = random((1, 2, 1, 4), (1, 2, 1, 4), (1, 2, 1, 4))
    nothing = jnp.zeros((1, 1, 1, 2), bool)
    assert np.isfinite(attend(q, k, v, nothing)).all()
    gradient = jax.grad(lambda q: attend(q, k, v, nothing).sum())(q)
    assert np.isfinite(gradient).all()
