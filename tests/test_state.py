from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm2_jax import state


class Bank(NamedTuple):
    slots: object
    is_start: object


AXES = Bank(("layers", "batch", "slots"), ("batch",))


def bank(offset: float = 0.0, is_start=(False, False, False)) -> Bank:
    return Bank(jnp.arange(24.0).reshape(2, 3, 4) + offset, jnp.array(is_start))


def test_rows_are_chosen_by_the_name_of_their_axis():
    chosen = state.select_rows(jnp.array([True, False, True]), bank(100), bank(is_start=(True, True, True)), AXES)
    np.testing.assert_array_equal(chosen.slots[:, [0, 2]], bank(100).slots[:, [0, 2]])
    np.testing.assert_array_equal(chosen.slots[:, 1], bank().slots[:, 1])
    np.testing.assert_array_equal(chosen.is_start, [False, True, False])


def test_a_reset_sets_the_flag_and_nothing_else():
    before = bank(is_start=(False, True, False))
    after = state.reset_rows({"a": before}, jnp.array([True, False, False]), {"a": AXES})["a"]
    np.testing.assert_array_equal(after.is_start, [True, True, False])
    assert after.slots is before.slots


def test_the_mask_stands_at_the_batch_axis():
    mask = jnp.array([True, False])
    assert state.along_batch(mask, ("layers", "batch", None)).shape == (1, 2, 1)
    assert state.along_batch(mask, ("batch",)).shape == (2,)


def test_layers_are_stacked_in_front():
    one = Bank(jnp.ones((3, 4)), jnp.zeros(3, bool))
    stacked = state.stack_layers(one, 5)
    assert [leaf.shape for leaf in jax.tree.leaves(stacked)] == [(5, 3, 4), (5, 3)]
    axes = state.stack_axes(Bank(("batch", None), ("batch",)))
    assert axes == Bank(("layers", "batch", None), ("layers", "batch"))


def test_axes_are_told_from_trees():
    assert state.is_axes(("batch", None))
    assert state.is_axes(())
    assert not state.is_axes(AXES)
    assert not state.is_axes((("batch",), ("batch",)))
    assert not state.is_axes(["batch"])


@pytest.mark.parametrize(("cut", "gradient"), [(False, 2.0), (True, 0.0)])
def test_a_cut_stops_the_gradient_and_keeps_the_value(cut, gradient):
    def total(x):
        stopped = state.stop_where(jnp.array(cut), Bank(2 * x, jnp.array([True])))
        return stopped.slots, stopped.is_start

    (value, is_start), grad = total(jnp.array(3.0)), jax.grad(lambda x: total(x)[0])(jnp.array(3.0))
    assert (float(value), bool(is_start[0]), float(grad)) == (6.0, True, gradient)


def test_the_size_counts_numbers_and_no_flags():
    assert state.state_floats(bank()) == 24
