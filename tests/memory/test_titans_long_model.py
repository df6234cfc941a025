"""Whole models with a Titans memory over 65,536 tokens, in calls of `stream`."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lm2_jax
from lm2_jax.precision import Precision

pytestmark = pytest.mark.slow
TOKENS, CALL = 65_536, 2048


@functools.cache
def started(name: str, compute: str) -> tuple[Any, Any]:
    """The model and the parameters that training starts from; the state is float32."""
    config = dataclasses.replace(lm2_jax.preset(name).model, precision=Precision(compute=compute))
    model = lm2_jax.build_model(config)
    tokens = jnp.zeros((1, config.segment_tokens), jnp.int32)
    return model, nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens, model.init_state(1)))["params"]


def noise(folder: Callable[[], Path]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 512, (1, TOKENS), np.int32)


def book(folder: Callable[[], Path]) -> np.ndarray:
    """Bytes out of the middle of a book."""
    text = next(path for path in sorted((folder() / "books").glob("*.txt")) if path.stat().st_size > 2 * TOKENS)
    return np.frombuffer(text.read_bytes()[TOKENS // 2 :][:TOKENS], np.uint8)[None].astype(np.int32)


def fast_weights(state: Any) -> list[np.ndarray]:
    return [np.asarray(w) for group in state.groups for w in (*group.memory.weights, *group.memory.momentum)]


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["titans_mac_tiny", "titans_mag_tiny"])
@pytest.mark.parametrize("text", [noise, book])
def test_a_whole_model_stays_bounded_over_64k_tokens(text, name, compute, request):
    """All logits and states are finite; weights are bounded, and mostly no larger late in the text than early."""
    model, params = started(name, compute)
    carry, sizes = model.init_state(1), []
    tokens = text(lambda: request.getfixturevalue("data_dir"))
    for first in range(0, TOKENS, CALL):
        logits, carry = lm2_jax.stream(model, params, tokens[:, first : first + CALL], carry)
        assert np.isfinite(logits).all()
        assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(carry.state))
        sizes.append(max(float(np.abs(w).max()) for w in fast_weights(carry.state)))
    assert {w.dtype for w in fast_weights(carry.state)} == {np.dtype("float32")}
    assert sizes[0] > 0
    assert max(sizes) < 20
    early, late = np.median(np.split(np.array(sizes), 2), axis=1)
    assert late < 1.5 * early
