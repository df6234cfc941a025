import jax.numpy as jnp
import numpy as np
import pytest

from lm2_jax import UserError
from lm2_jax.inference import sampling
from lm2_jax.inference.sampling import Sampling, choose, sampling_rows

LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.0625, 0.0625], [0.1, 0.2, 0.4, 0.2, 0.1]], jnp.float32))


def kept(logits) -> list[list[int]]:
    return [np.flatnonzero(row).tolist() for row in np.isfinite(np.asarray(logits))]


def of_rows(*values, dtype=np.float32):
    return jnp.array(values, dtype)


def test_filters_keep_the_tokens_of_their_definitions():
    assert kept(sampling.keep_top_k(LOGITS, of_rows(2, 0, dtype=np.int32))) == [[0, 1], [0, 1, 2, 3, 4]]
    assert kept(sampling.keep_top_k(LOGITS, of_rows(9, 2, dtype=np.int32))) == [[0, 1, 2, 3, 4], [1, 2, 3]]
    assert kept(sampling.keep_top_p(LOGITS, of_rows(0.7, 0.3))) == [[0, 1], [2]]
    assert kept(sampling.keep_top_p(LOGITS, of_rows(1.0, 0.01))) == [[0, 1, 2, 3, 4], [2]]
    assert kept(sampling.keep_min_p(LOGITS, of_rows(0.3, 0.0))) == [[0, 1], [0, 1, 2, 3, 4]]


def test_top_p_counts_only_what_other_filters_kept():
    logits = sampling.keep_top_k(LOGITS, of_rows(2, 3, dtype=np.int32))  # the first row is now 2/3 and 1/3
    assert kept(sampling.keep_top_p(logits, of_rows(0.6, 0.99))) == [[0], [1, 2, 3]]


def test_repetition_penalty_lowers_seen_tokens_of_either_sign():
    logits = jnp.array([[2.0, -2.0, 2.0, -2.0]], jnp.float32)
    seen = jnp.array([[True, True, False, False]])
    np.testing.assert_array_equal(sampling.penalize_repetition(logits, seen, of_rows(2.0)), [[1.0, -4.0, 2.0, -2.0]])


def test_frequencies_of_draws_are_the_probabilities():
    draws = 4000
    logits = jnp.broadcast_to(LOGITS[0], (draws, 5))
    rows = sampling_rows([(Sampling(temperature=1.0), prompt) for prompt in range(draws)])
    tokens = choose(logits, jnp.zeros((draws, 5), bool), rows, jnp.zeros(draws, jnp.int32))
    share = np.bincount(np.asarray(tokens), minlength=5) / draws
    np.testing.assert_allclose(share, np.exp(LOGITS[0]), atol=4 * 0.5 / draws**0.5)


def test_a_draw_depends_on_seed_prompt_and_token_and_not_on_the_row():
    logits = jnp.zeros((4, 1000))
    seen = jnp.zeros((4, 1000), bool)

    def tokens(settings, numbers):
        return np.asarray(choose(logits, seen, sampling_rows(settings), jnp.array(numbers, jnp.int32))).tolist()

    hot = Sampling(temperature=1.0)
    first = tokens([(hot, 0), (hot, 1), (hot, 0), (Sampling(temperature=1.0, seed=1), 0)], [0, 0, 1, 0])
    assert len(set(first)) == 4
    assert tokens([(hot, 1), (hot, 0), (Sampling(temperature=1.0, seed=1), 0), (hot, 0)], [0, 0, 0, 1]) == [
        first[1],
        first[0],
        first[3],
        first[2],
    ]


def test_greedy_rows_take_the_largest_logit_next_to_rows_that_draw():
    rows = sampling_rows([(Sampling(), 0), (Sampling(temperature=5.0), 1)])
    for number in range(5):
        token = choose(LOGITS, jnp.zeros((2, 5), bool), rows, jnp.full(2, number, jnp.int32))
        assert int(token[0]) == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_impossible_settings_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=f"{field}=.*expected"):
        Sampling(**{field: value})
