"""Merging memories: what adds up, what is refused, and the file."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm2_jax
from lm2_jax import UserError, memory_file
from lm2_jax.decoder import DecoderConfig
from lm2_jax.inference.merging import check_mergeable, merge_states
from lm2_jax.inference.reading import TextFile
from lm2_jax.inference.saving import read_and_save
from lm2_jax.inference.snapshot import empty_memory
from lm2_jax.memory.associative import Associative, AssociativeConfig
from lm2_jax.memory.base import sum_of_changes
from lm2_jax.memory.compressive import Compressive, CompressiveConfig
from lm2_jax.memory.gated_delta import GatedDelta, GatedDeltaConfig
from lm2_jax.memory.titans import Titans, TitansConfig
from lm2_jax.state import map_axes
from tests.contract.subjects import FLOAT64
from tests.inference.subjects import text_of, tiny_run

DELTA, TITANS = "gated_delta_tiny", "titans_mag_tiny"
A, B = "The key is in the box. " * 3, "Nobody has looked under the stairs. " * 2  # 69 and 72 tokens
WIDTH = 8


def random_states(module, count=2, rows=3):
    """States with random numbers, as if each row had read three segments."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        if leaf.dtype == bool:
            return jnp.zeros(leaf.shape, bool)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.full(leaf.shape, 3, leaf.dtype)
        return jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)

    return [jax.tree.map(draw, module.init_state(rows)) for _ in range(count)]


def merged(module, states, start):
    """`module.merged`, whose result depends on no parameter."""
    return module.init_with_output(jax.random.key(0), states, start, method="merged")[0]


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


in_float64 = pytest.mark.usefixtures("x64")


@in_float64
@pytest.mark.parametrize(
    ("module", "names"),
    [
        (GatedDelta(GatedDeltaConfig(num_heads=2), WIDTH, FLOAT64), ("matrix",)),
        (Associative(AssociativeConfig(key_width=4, num_rolls=2), WIDTH, FLOAT64), ("matrix", "norm")),
    ],
    ids=["gated_delta", "associative"],
)
def test_linear_states_add_up(module, names):
    first, second = random_states(module)
    both = merged(module, [first, second], module.init_state(1))
    for name in names:
        expected = np.asarray(getattr(first, name)) + np.asarray(getattr(second, name))
        assert getattr(both, name).dtype == np.float64
        np.testing.assert_array_equal(getattr(both, name), expected)
    assert not both.is_start.any()
    if isinstance(module, GatedDelta):
        for tail, last in zip(both.tails, second.tails, strict=True):
            np.testing.assert_array_equal(tail, last)


@in_float64
def test_titans_weights_and_momentum_add_up_as_changes_from_the_start():
    module = Titans(TitansConfig(num_heads=2, chunk_tokens=4), WIDTH, FLOAT64)
    start, first, second = random_states(module, 3)
    start = jax.tree.map(lambda leaf: leaf[:1], start)
    both = merged(module, [first, second], start)
    for name in ("weights", "momentum"):
        for w, w0, w1, w2 in zip(*(getattr(s, name) for s in (both, start, first, second)), strict=True):
            np.testing.assert_allclose(w, w0 + (w1 - w0) + (w2 - w0), rtol=0, atol=1e-14)
    no_change = merged(module, [first, jax.tree.map(lambda w0, w: jnp.broadcast_to(w0, w.shape), start, first)], start)
    for w, w1 in zip(no_change.weights, first.weights, strict=True):
        np.testing.assert_allclose(w, w1, rtol=0, atol=1e-14)


@in_float64
def test_compressive_memories_of_two_texts_are_that_of_both_in_a_row():
    module = Compressive(CompressiveConfig(update="linear"), 2, 4, FLOAT64)
    rng, valid_BT = np.random.default_rng(1), jnp.ones((2, 5), bool)
    k, v = (jnp.asarray(rng.standard_normal((5, 2, 5, 2, 4))) for _ in range(2))  # five segments

    def read(segments, state):
        for i in segments:
            state = module.apply({}, k[i], v[i], valid_BT, state, method="write_heads")
        return state

    start = module.init_state(2)
    both = merged(module, [read((0, 1), start), read((2, 3, 4), start)], module.init_state(1))
    in_a_row = read(range(5), start)
    np.testing.assert_array_equal(both.segments, [5, 5])
    np.testing.assert_allclose(both.matrix, in_a_row.matrix, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(both.norm, in_a_row.norm, rtol=1e-13, atol=1e-15)


def test_a_sum_in_bfloat16_is_rounded_once():
    leaves = [jnp.full((1, 4), value, jnp.bfloat16) for value in (256, 1, 1)]
    total = sum_of_changes(leaves, jnp.zeros((1, 4), jnp.bfloat16))
    assert total.dtype == jnp.bfloat16
    np.testing.assert_array_equal(total.astype(np.float32), 258)


def assert_equal_memories(a, b):
    for x, y in zip(jax.tree.leaves(a.state), jax.tree.leaves(b.state), strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(a.logits_V, b.logits_V)
    np.testing.assert_array_equal(a.open_tokens, b.open_tokens)
    assert (a.tokens_read, a.sources, a.merged_from) == (b.tokens_read, b.sources, b.merged_from)


def test_an_empty_memory_changes_no_bit():
    run = tiny_run(DELTA)
    memory, empty = run.read(A), empty_memory(run)
    for pair in ([memory, empty], [empty, memory]):
        assert_equal_memories(memory_file.merge(run, pair), memory)
    assert memory_file.merge(run, [empty, empty]).tokens_read == 0


@pytest.mark.parametrize("name", [DELTA, pytest.param(TITANS, marks=pytest.mark.slow)])
def test_merging_models_sums_every_layer_from_its_start_and_reads_the_open_tokens(name):
    run = tiny_run(name)
    T = run.config.model.segment_tokens
    first, second = run.read(A), run.read(B)
    assert (first.position, second.position) == (69 % T, 72 % T)
    both = memory_file.merge(run, [first, second])
    assert both.tokens_read == 141
    assert both.sources == first.sources + second.sources
    assert both.merged_from == (1, 1)
    np.testing.assert_array_equal(both.open_tokens, np.concatenate([first.open_tokens, second.open_tokens]))

    (group,) = both.state.groups
    matrices = [jax.tree.leaves(m.state.groups[0].memory)[0] for m in (first, second, both)]
    params = run.params["blocks_0"]
    starts = []
    for layer in range(2):
        block, spec = run.config.model.block_of(layer)
        variables = {"params": jax.tree.map(lambda leaf, layer=layer: leaf[layer], params)}
        start = block(spec, parent=None).apply(variables, method="begin_document")[1]
        starts.append(jax.tree.leaves(start)[0])
    start = np.stack(starts)
    np.testing.assert_allclose(matrices[2], matrices[0] + matrices[1] - start, rtol=1e-5, atol=1e-6)
    assert np.abs(matrices[2] - matrices[1]).max() > 1e-3
    if group.window is not None:
        for x, y in zip(jax.tree.leaves(group.window), jax.tree.leaves(second.state.groups[0].window), strict=True):
            np.testing.assert_array_equal(x, y)


def test_open_tokens_of_a_segment_or_more_are_read_from_the_merged_state():
    run = tiny_run(DELTA)
    T = run.config.model.segment_tokens
    first, second = run.read("x" * (T + T - 5)), run.read("y" * (T + 7))
    both = memory_file.merge(run, [first, second])
    assert (both.tokens_read, both.position) == (3 * T + 2, 2)
    at_border = memory_file.merge(run, [run.read("x" * T), run.read("y" * T)])
    expected = run.read("x" * (T - 5) + "y" * 7, at_border)
    for x, y in zip(jax.tree.leaves(both.state), jax.tree.leaves(expected.state), strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(both.open_tokens, expected.open_tokens)


def test_rows_of_a_batch_are_merged_independently():
    run = tiny_run(DELTA)
    T, axes = run.config.model.segment_tokens, run.model.state_axes()
    memories = [run.read(text_of(200)[i : i + T]) for i in range(4)]

    def batch(pair):
        return map_axes(lambda names, x, y: jnp.concatenate([x, y], names.index("batch")), axes, *pair)

    both = merge_states(run, [batch([m.state for m in memories[:2]]), batch([m.state for m in memories[2:]])])
    alone = [merge_states(run, [memories[i].state, memories[i + 2].state]) for i in range(2)]
    for x, y in zip(jax.tree.leaves(both), jax.tree.leaves(batch(alone)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lm2_tiny", "memory.num_slots=6"),
        ("rmt_tiny", "no sum over texts"),
        ("hmt_tiny", "the summary of one text"),
        ("hybrid_tiny", "memory.num_slots=6"),
        ("none_tiny", "has no memory"),
        ("full_tiny", "full attention"),
    ],
)
def test_models_without_a_sum_are_refused_with_the_reason(name, reason):
    if name == "full_tiny":
        decoder = DecoderConfig(max_tokens=4096)
        config = dataclasses.replace(lm2_jax.preset("titans_lmm_tiny").model, decoder=decoder)
    else:
        config = lm2_jax.preset(name).model
    with pytest.raises(UserError, match=reason) as error:
        check_mergeable(config)
    assert "--memory FIRST --read SECOND_TEXT --save-memory BOTH" in str(error.value)


@pytest.mark.parametrize("name", ["armt_tiny", "infini_tiny", "titans_mac_tiny", "titans_residual_tiny", DELTA])
def test_models_with_a_sum_are_accepted(name):
    check_mergeable(lm2_jax.preset(name).model)


def test_one_memory_other_parameters_and_unfinished_texts_are_refused(tmp_path):
    run = tiny_run(DELTA)
    memory = run.read(A)
    with pytest.raises(UserError, match="at least two memories, got 1"):
        memory_file.merge(run, [memory])
    with pytest.raises(UserError, match="another model"):
        memory_file.merge(run, [memory, tiny_run(DELTA, seed=1).read(B)])
    source = dataclasses.replace(memory.sources[0], name="book.txt", is_complete=False)
    with pytest.raises(UserError, match=r"memory 2 holds only the first 69 tokens of 'book\.txt'"):
        memory_file.merge(run, [memory, dataclasses.replace(memory, sources=(source,))])


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command `merge` on a run that is not loaded from disk, with two memory files."""
    run = tiny_run(DELTA)
    monkeypatch.setattr("lm2_jax.runs.load_run", lambda workdir: run)
    files = [tmp_path / "a.memory", tmp_path / "b.memory"]
    for text, path in zip((A, B), files, strict=True):
        run.read(text).save(path)

    def call(*paths, out=tmp_path / "both.memory"):
        memory_file.main(["merge", *map(str, paths), "--workdir", "W", "--out", str(out)])
        return out

    return run, files, call


def test_a_merged_file_is_marked_and_comes_back(command, capsys, tmp_path):
    run, files, call = command
    out = call(*files)
    assert memory_file.read_memory_file(out).metadata["merged_from"] == [1, 1]
    loaded = lm2_jax.load_memory(out, run)
    assert_equal_memories(loaded, memory_file.merge(run, [lm2_jax.load_memory(path, run) for path in files]))
    memory_file.main(["inspect", str(out)])
    assert "merged from memories of 1 and 1 texts" in capsys.readouterr().out
    memory_file.main(["diff", str(out), str(files[0])])
    assert "merged_from: [1, 1] and -" in capsys.readouterr().out
    more = run.read("More.", loaded)
    assert (more.merged_from, len(more.sources)) == ((1, 1), 3)
    more.save(tmp_path / "more")
    assert lm2_jax.load_memory(tmp_path / "more", run).merged_from == (1, 1)


def test_bad_input_is_refused_and_nothing_is_lost(command, tmp_path):
    _, files, call = command
    before = [path.read_bytes() for path in files]
    for paths, out, message in (
        (files, files[0], "exists and is not overwritten"),
        (files[:1], tmp_path / "c", "at least two memories"),
        ([files[0], tmp_path / "missing"], tmp_path / "c", "no such file"),
        (files, tmp_path, "expected a file, this is a folder"),
    ):
        with pytest.raises(UserError, match=message):
            call(*paths, out=out)
    assert [path.read_bytes() for path in files] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.memory", "b.memory"]


@pytest.mark.parametrize("value", [[2, 1], [0, 2], ["a"], 5])
def test_a_damaged_mark_is_refused(command, tmp_path, value):
    _, files, call = command
    content = call(*files).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    metadata = json.loads(header["__metadata__"][memory_file.METADATA]) | {"merged_from": value}
    header["__metadata__"][memory_file.METADATA] = json.dumps(metadata)
    new = json.dumps(header).encode()
    bad = tmp_path / "bad"
    bad.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + size :])
    with pytest.raises(UserError, match="metadata are damaged"):
        memory_file.read_memory_file(bad)


def test_reading_the_same_files_does_not_take_a_merge_for_a_reading(command, tmp_path):
    run, files, call = command
    texts = []
    for name, text in (("a.txt", A), ("b.txt", B)):
        (tmp_path / name).write_text(text)
        texts.append(TextFile.open(tmp_path / name))
    out = call(*files)
    with pytest.raises(UserError, match=r"another text \(.*, merged\)"):
        read_and_save(run, texts, save_to=out)
