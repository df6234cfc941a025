import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm2_jax.attention import Attention, attend
from lm2_jax.decoder import DecoderConfig
from lm2_jax.precision import Precision

T = 4


def attention(window_tokens: int | None = None) -> Attention:
    decoder = DecoderConfig(
        width=8, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=4, window_tokens=window_tokens
    )
    return Attention(decoder, Precision(), parent=None)


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
    layer = attention(window_tokens)
    keys = layer.window_keys + T
    mask = layer._mask(jnp.arange(T)[None], jnp.ones((1, keys), bool))
    expected = np.array([[c == "1" for c in row.replace(" ", "")] for row in sees])
    np.testing.assert_array_equal(mask[0], expected)


def test_a_key_that_does_not_count_is_not_seen():
    seen = jnp.array([[True, False, True, True, False, True]])
    mask = attention(3)._mask(jnp.arange(T)[None], seen)
    assert not np.asarray(mask)[0][:, [1, 4]].any()


def test_without_a_window_no_key_is_carried():
    assert attention().window_keys == 0
    assert attention().init_window(3) is None
    window = attention(3).init_window(5)
    assert window is not None
    assert window.k.shape == (5, 2, 1, 4)
    assert window.fresh.all()
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
