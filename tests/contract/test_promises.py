"""What every preset promises, on its own model and on options that no preset has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm2_jax.sharding import RULES
from tests.contract.subjects import NAMES, ROWS, SEGMENTS, TINY, Subject, assert_close, assert_equal, precise, subject


@pytest.fixture(params=NAMES, scope="module")
def case(request) -> Subject:
    return subject(request.param)


def test_state_tree(case):
    """The same tree, shapes and types after a call as before it; its axes fit and are all known to the sharding."""
    state, names = case.start(), {name for name, _ in RULES}
    after = case.result.state
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(after)] == [(a.shape, a.dtype) for a in jax.tree.leaves(state)]
    axes = jax.tree.structure(state).flatten_up_to(case.axes)
    for leaf, names_of_leaf in zip(jax.tree.leaves(state), axes, strict=True):
        assert len(names_of_leaf) == leaf.ndim
        assert leaf.shape[names_of_leaf.index("batch")] == ROWS
        assert names_of_leaf.count("batch") == 1
        assert {name for name in names_of_leaf if name is not None} <= names


def test_logits_have_their_shape_and_type(case):
    logits = case.result.logits
    assert logits.shape == (ROWS, case.S, case.config.vocab_size)
    assert logits.dtype == case.config.precision.logits
    assert np.isfinite(logits).all()


def test_a_token_changes_nothing_before_it(case):
    """Bit for bit, in one program: neither earlier positions nor other rows."""
    T, row = case.T, 1
    before = case.run().logits
    for position in (0, 1, T - 1, T, T + T // 2, 2 * T, case.S - 1):
        tokens = case.tokens.copy()
        tokens[row, position] = (tokens[row, position] + 1) % case.config.vocab_size
        after = case.run(tokens).logits
        np.testing.assert_array_equal(after[:, :position], before[:, :position])
        np.testing.assert_array_equal(np.delete(after, row, 0), np.delete(before, row, 0))
        assert (np.asarray(after)[row, position:] != np.asarray(before)[row, position:]).any()
        if case.remembers and position < T:
            changed = np.asarray(after)[row, T:] != np.asarray(before)[row, T:]
            assert changed.any(), "the next segments remember nothing"


@pytest.mark.parametrize("name", TINY)
def test_a_token_changes_nothing_before_it_in_an_optimized_program(name):
    case = subject(name)
    before, _ = case.apply(case.tokens)
    for position in (1, case.T - 1, case.T, case.T + 5, case.S - 1):
        tokens = case.tokens.copy()
        tokens[1, position] = (tokens[1, position] + 1) % case.config.vocab_size
        after, _ = case.apply(tokens)
        np.testing.assert_array_equal(after[:, :position], before[:, :position])
        np.testing.assert_array_equal(np.delete(after, 1, 0), np.delete(before, 1, 0))


def test_gradient_comes_from_no_later_token(case):
    row, position = 1, case.T + case.T // 2
    where = np.zeros((ROWS, case.S), bool)
    where[row, position] = True
    reach = case.reach(case.run(hidden_weight=case.hidden_weight(where)))
    assert (reach[row, position + 1 :] == 0).all()
    assert (np.delete(reach, row, 0) == 0).all()
    assert reach[row, position] > 0
    assert reach[row, position - 1] > 0
    assert (reach[row, : case.T] > 0).any() == case.remembers


def test_rows_do_not_influence_each_other(case):
    order = np.roll(np.arange(ROWS), 1)
    direct, permuted = case.run(), case.run(case.tokens[order])
    np.testing.assert_array_equal(permuted.logits, np.asarray(direct.logits)[order])
    for row, source in enumerate(order):
        assert_equal(case.row(permuted.state, row), case.row(direct.state, source))


def test_the_same_call_twice_gives_the_same(case):
    assert_equal(case.run(), case.run())


@pytest.mark.parametrize("name", TINY)
def test_segments_in_one_call_equal_one_call_each(name):
    """Resets too: [B] before the one segment of a call, [B K] before each of several."""
    case = subject(name)
    reset = np.zeros((ROWS, SEGMENTS), bool)
    reset[0, 1] = reset[1, 2] = True
    state, logits = case.start(), []
    for s in range(SEGMENTS):
        piece, state = case.apply(case.tokens[:, s * case.T : (s + 1) * case.T], state, reset[:, s])
        logits.append(piece)
    together, after = case.apply(case.tokens, reset=reset)
    assert_close(np.concatenate(logits, axis=1), together, case.tolerance)
    assert_close(state, after, case.tolerance)


def used_state(case: Subject):
    """A state that holds other text."""
    return case.run(np.roll(case.tokens, 5, axis=1)).state


def test_a_reset_row_equals_a_fresh_run(case):
    """Row 0 starts anew at its second segment, row 1 at its first, row 2 goes on."""
    T, used = case.T, used_state(case)
    reset, valid = np.zeros((ROWS, SEGMENTS), bool), np.ones((ROWS, case.S), bool)
    reset[0, 1] = reset[1, 0] = True
    got = case.run(state=used, reset=reset)
    valid[0, 2 * T :] = False
    fresh = case.run(np.concatenate([np.roll(case.tokens[:1], -T, axis=1), case.tokens[1:]]), valid=valid)
    tolerance = 1e-5 if not case.float64 else 1e-12
    np.testing.assert_allclose(got.logits[0, T:], fresh.logits[0, : 2 * T], rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(got.logits[1], fresh.logits[1])
    for row in (0, 1):
        assert_close(case.row(got.state, row), case.row(fresh.state, row), tolerance)
    if case.remembers:
        assert (np.asarray(got.logits[2]) != np.asarray(fresh.logits[2])).any()


def test_padding_changes_nothing(case):
    """What stands at masked positions, in the middle or at the end of a segment, is seen nowhere."""
    rng = np.random.default_rng(4)
    valid = rng.random((ROWS, case.S)) < 0.7
    valid[0], valid[0, case.T + 3 : 2 * case.T] = True, False
    tokens = np.where(valid, case.tokens, (case.tokens + 7) % case.config.vocab_size)
    one, other = case.run(valid=valid), case.run(tokens, valid=valid)
    assert_equal(one.state, other.state)
    mask = valid[:, :, None]
    np.testing.assert_array_equal(np.where(mask, one.logits, 0), np.where(mask, other.logits, 0))
    # Tokens before the padding are as in a text without it.
    np.testing.assert_array_equal(one.logits[0, : case.T + 3], case.run().logits[0, : case.T + 3])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((one, other)))


def test_a_segment_of_padding_leaves_the_state_bit_equal(case):
    used = used_state(case)
    nothing = case.run(state=used, valid=np.zeros((ROWS, case.S), bool))
    assert_equal(nothing.state, used)
    T, valid = case.T, np.ones((ROWS, case.S), bool)
    tokens = case.tokens.copy()
    tokens[0] = np.concatenate([tokens[0, :T], tokens[0, 2 * T :], tokens[0, T : 2 * T]])
    valid[0, T : 2 * T] = valid[1, 2 * T :] = False  # row 0: text, padding, text; row 1: text, text, padding
    tokens[0] = np.concatenate([tokens[1, :T], tokens[2, :T], tokens[1, T : 2 * T]])
    result = case.run(tokens, used_rows_alike(case, used), valid=valid)
    tolerance = 1e-5 if not case.float64 else 1e-12
    np.testing.assert_allclose(result.logits[0, 2 * T :], result.logits[1, T : 2 * T], rtol=tolerance, atol=tolerance)
    assert_close(case.row(result.state, 0), case.row(result.state, 1), tolerance)


def used_rows_alike(case: Subject, state):
    """`state` with row 0 a copy of row 1."""
    axes = jax.tree.structure(state).flatten_up_to(case.axes)
    leaves = [
        jnp.take(leaf, jnp.asarray([1, 1, 2]), axis=names.index("batch"))
        for names, leaf in zip(axes, jax.tree.leaves(state), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def test_a_row_of_padding_may_hold_nan(case):
    """Its state stays as it is; nothing of it is in other rows or in a gradient."""
    valid = np.ones((ROWS, case.S), bool)
    valid[1] = False
    state = case.start()
    axes = jax.tree.structure(state).flatten_up_to(case.axes)

    def spoiled(leaf, names):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros_like(leaf)  # no row begins a document
        rows = (slice(None),) * names.index("batch")
        return leaf.at[(*rows, 1)].set(jnp.nan)

    with precise(case.config):
        leaves = [spoiled(leaf, names) for leaf, names in zip(jax.tree.leaves(state), axes, strict=True)]
        bad = jax.tree.unflatten(jax.tree.structure(state), leaves)
        good = jax.tree.map(lambda leaf: jnp.nan_to_num(leaf), bad)
    weight = np.where(valid[:, :, None], 1.0, 0.0)
    got, expected = (case.run(state=one, valid=valid, hidden_weight=weight) for one in (bad, good))
    np.testing.assert_array_equal(np.asarray(got.logits)[[0, 2]], np.asarray(expected.logits)[[0, 2]])
    assert_equal(case.row(got.state, 1), case.row(bad, 1))
    jax.tree.map(np.testing.assert_array_equal, got.grads, expected.grads)


def test_a_reset_segment_of_padding_is_a_fresh_start(case):
    T, used = case.T, used_state(case)
    reset, valid = np.zeros((ROWS, SEGMENTS), bool), np.ones((ROWS, case.S), bool)
    reset[0, 0], valid[0, :T] = True, False
    got = case.run(state=used, reset=reset, valid=valid)
    fresh = case.run(valid=valid)
    tolerance = 1e-5 if not case.float64 else 1e-12
    np.testing.assert_allclose(got.logits[0, T:], fresh.logits[0, T:], rtol=tolerance, atol=tolerance)
    assert_close(case.row(got.state, 0), case.row(fresh.state, 0), tolerance)


def test_every_parameter_has_a_gradient(case):
    """Over three segments, in each layer of a stack, learned starts included."""
    grads = case.result.grads
    sizes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name, leaf = jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(leaf)
        layers = leaf if name.startswith("blocks_") else leaf[None]
        sizes |= {f"{name}[{i}]": float(np.abs(layer).max()) for i, layer in enumerate(layers)}
    floor = 1e-8 * max(sizes.values())
    dead = [name for name, size in sizes.items() if not size > floor]
    if case.model.config.decoder.max_positions:
        # Without RoPE, a bias of the keys adds the same to all scores of a query, which the softmax ignores.
        dead = [name for name in dead if "attention/k_proj/b[" not in name]
    assert not dead
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
