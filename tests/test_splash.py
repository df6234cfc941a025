"""The TPU kernel, run as plain operations, against plain attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lm2_jax
from lm2_jax.attention import splash
from lm2_jax.attention.backends import attend as attend_sets
from lm2_jax.attention.keys import Keys, Queries
from lm2_jax.attention.softmax import dot_product_attention as attend
from lm2_jax.blocks.plain import PlainJoin
from lm2_jax.precision import Precision
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from tests.contract.subjects import FLOAT64, abstract_params, generic_params, precise

R, T, H, G, K = 2, 256, 4, 2, 8


@pytest.fixture(autouse=True)
def four_blocks(monkeypatch):
    """Two blocks of queries by two of keys, one of which is skipped."""
    monkeypatch.setattr(splash, "LONGEST_BLOCK", 128)


def inputs(past: int):
    """A row with padding, and one with two documents."""
    rng = np.random.default_rng(0)
    q, k, v, dy = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((R, T, H, K), (R, past + T, G, K), (R, past + T, G, K), (R, T, H, K))
    )
    valid = np.ones((R, past + T), bool)
    valid[0, past + 200 :] = valid[0, past + 30 : past + 90] = valid[0, : past // 2] = False
    document = np.zeros((R, past + T), np.int32)
    document[1, past + 100 :] = 1
    return (q, k, v), dy, valid, document


def visible(past, window, valid, document):
    place = np.arange(past + T)[None] - past - np.arange(T)[:, None]  # of keys, relative to the query
    return (
        ((place <= 0) & (place >= -(window or past + T)))
        & valid[:, None]
        & (document[:, past:, None] == document[:, None])
    )


def fused(past, window, valid, document, q, k, v):
    keys = jnp.asarray(np.where(valid, document, splash.PADDING))
    return splash.splash_attend(q, k, v, jnp.asarray(document[:, past:]), keys, window, interpret=True)


@pytest.mark.parametrize(("past", "window"), [(0, None), (40, 40), (6, None)], ids=["segment", "window", "rows"])
def test_it_equals_plain_attention_forward_and_backward(past, window):
    arrays, dy, valid, document = inputs(past)
    mask = visible(past, window, valid, document)
    seeing = mask.any(axis=2)[:, :, None, None]  # what a query without a key gives is of no use in either form
    assert 0.5 < seeing.mean() <= 1

    def run(form, *arrays):
        y, backward = jax.vjp(form, *arrays)
        return jnp.where(seeing, y, 0), backward(jnp.where(seeing, dy, 0))

    expected = run(lambda q, k, v: attend(q, k, v, jnp.asarray(mask[:, None])), *arrays)
    result = jax.jit(lambda *a: run(lambda *b: fused(past, window, valid, document, *b), *a))(*arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), result, expected)


@pytest.mark.parity
@pytest.mark.slow
def test_on_a_mesh_it_equals_one_device():
    arrays, dy, valid, document = inputs(0)
    layout = Layout(make_mesh(MeshConfig(data=2, fsdp=1, model=2, slots=2)))

    def run(*arrays):
        y, backward = jax.vjp(lambda *a: fused(0, None, valid, document, *a), *arrays)
        return y, backward(dy)

    expected = jax.jit(run)(*arrays)
    axes = [("batch", "time", heads, "head") for heads in ("heads", "kv_heads", "kv_heads")]
    arrays = jax.device_put(arrays, tuple(layout.shardings(axes, list(arrays))))
    with layout.context():
        y, gradients = jax.jit(run)(*arrays)
    assert y.sharding.shard_shape(y.shape) == (R // 2, T // 2, H // 2, K)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), (y, gradients), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "packed"), [(None, False), (40, True), (1, False)])
def test_a_model_attends_alike_in_both_forms(window, packed):
    """Padding, packed documents and a window that reaches into the segment before."""
    run = lm2_jax.preset("none_tiny").model
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, run.vocab_size, (2, 3 * T)), jnp.int32)
    valid = jnp.ones(tokens.shape, bool).at[0, 2 * T + 100 :].set(False)
    document = jnp.zeros(tokens.shape, jnp.int32).at[1, T + 100 : 2 * T].set(1) if packed else None

    def hidden(kernel):
        decoder = dataclasses.replace(run.decoder, window_tokens=window, attention_kernel=kernel, num_layers=1)
        model = lm2_jax.build_model(dataclasses.replace(run, decoder=decoder, segment_tokens=T))
        state = model.init_state(2)
        params = nn.unbox(model.init(jax.random.key(0), tokens[:, :T], state))
        forward = jax.jit(lambda *a: model.apply(*a, document=document, method="forward"))
        return forward(params, tokens, state, None, valid).hidden

    seen = valid[:, :, None]
    np.testing.assert_allclose(
        jnp.where(seen, hidden("splash"), 0), jnp.where(seen, hidden("plain"), 0), rtol=1e-4, atol=1e-4
    )


def beside(name):
    """A layer with persistent tokens beside a segment, alone or with a bank's rows."""
    run = lm2_jax.preset(name).model
    if name == "none_tiny":
        run = dataclasses.replace(run, join=PlainJoin(num_persistent=3))
    return dataclasses.replace(run, decoder=dataclasses.replace(run.decoder, num_layers=1), segment_tokens=T)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none_tiny", "lm2_context_tiny"])
def test_persistent_tokens_and_rows_of_a_bank_are_seen_alike_in_both_forms(name):
    """Over two segments, the second of which meets a written bank; with padding; value and gradient."""
    config, rng = beside(name), np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (2, 2 * T)), jnp.int32)
    valid = jnp.ones(tokens.shape, bool).at[0, T + 100 :].set(False)
    weights = jnp.asarray(rng.standard_normal((2, 2 * T, config.decoder.width)), jnp.float32)

    def run(kernel):
        decoder = dataclasses.replace(config.decoder, attention_kernel=kernel)
        model = lm2_jax.build_model(dataclasses.replace(config, decoder=decoder))
        state = model.init_state(2)

        def loss(params):
            hidden = model.apply({"params": params}, tokens, state, None, valid, method="forward").hidden
            hidden = jnp.where(valid[:, :, None], hidden, 0)
            return jnp.sum(weights * hidden), hidden

        (_, hidden), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(generic_params(model))
        return hidden, gradient

    here, there = run("splash"), run("plain")
    assert jnp.abs(there[1]["blocks_0"]["persistent"]["start"]).max() > 0
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    ("name", "types", "words"),
    [
        ("rmt_tiny", Precision(), r"multiple of 128 tokens .* got 134 in all \(.*twice memory.num_tokens\)"),
        ("titans_mac_tiny", Precision(), "no retrieved row per token"),
        ("none_window_tiny", Precision(), "no persistent tokens .* with an attention window"),
        ("lm2_tiny", FLOAT64, "precision.compute is float64"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused_where_it_is_asked_for(name, types, words):
    config = dataclasses.replace(lm2_jax.preset(name).model, segment_tokens=128, precision=types)

    def trace(kernel):
        decoder = dataclasses.replace(config.decoder, attention_kernel=kernel)
        return abstract_params(lm2_jax.build_model(dataclasses.replace(config, decoder=decoder)))

    with precise(config):
        assert trace("auto")
        with pytest.raises(ValueError, match=f"'splash' takes .*{words}.*; set it to 'auto' or 'plain'"):
            trace("splash")


def test_rows_that_all_tokens_see_are_taken_alone():
    zeros = jnp.zeros((1, 128, 2, 8))
    sets = [Keys(zeros[:, :3], zeros[:, :3]), Keys(zeros, zeros, np.arange(128))]
    documents = jnp.zeros((1, 128), jnp.int32)
    assert splash.unsupported(Queries(zeros), sets, None) is None
    assert "with packed documents" in splash.unsupported(Queries(zeros, document=documents), sets, None)
    assert "decoder.window_tokens" in splash.unsupported(Queries(zeros), sets, 8)
    assert "pieces" in splash.unsupported(Queries(zeros, position=documents), sets, None)


def test_cudnn_is_asked_for_by_name_and_needs_its_hardware():
    zeros = jnp.zeros((1, 4, 2, 8))
    keys = [Keys(zeros, zeros, np.arange(4))]
    with pytest.raises(
        ValueError, match="'cudnn' needs an NVIDIA GPU, this runs on 'cpu'; set it to 'auto' or 'plain'"
    ):
        attend_sets(Queries(zeros), keys, None, "cudnn")


def test_short_segments_stay_with_plain_attention():
    assert splash.fits(256)
    assert not splash.fits(200)
    with Layout(make_mesh(MeshConfig(slots=4))).context():
        assert not splash.fits(256)


def test_operations_of_the_kernels():
    q, k = (3, H, T, K), (3, G, T, K)
    assert (
        splash.kernel_flops("splash_10_of_16/splash_mha_fwd_segmented_no_residuals", [q, k, k])
        == 4 * 3 * H * T * T * K * 10 // 16
    )
    assert splash.kernel_flops("splash_16_of_16/splash_mha_dkv_segmented", [q, k]) == 8 * 3 * H * T * T * K
    assert splash.kernel_flops("another kernel", [q, k]) == 0
