"""Batches are a function of the step: over resumes, over processes, over the curriculum."""

import dataclasses
import itertools
import threading
from typing import ClassVar

import numpy as np
import pytest

from lm2_jax.config import DataConfig
from lm2_jax.data.babilong_source import BabilongSource
from lm2_jax.data.base import Example, SourceConfig
from lm2_jax.data.documents import DocumentFields
from lm2_jax.data.mixed import MixedSource
from lm2_jax.data.pipeline import batches, segments_at
from lm2_jax.data.text_source import TextFiles
from lm2_jax.data.tokenizers import TokenizerConfig, build_tokenizer
from lm2_jax.errors import UserError
from tests.data.reading import WordTokenizer

BYTES = build_tokenizer(TokenizerConfig(kind="bytes"), lambda: [], 259)
T = 4


class Ruler:
    """Writes its arguments into the tokens: [step, row, rows, held_out, name, ...]."""

    def __init__(self, name: int = 0):
        self.name = name

    def example(self, step, row, rows, segments, held_out=False):
        size = segments * T
        tokens = np.resize(np.array([step, row, rows, int(held_out), self.name, 0, 0, 0], np.int32), size)
        flags = np.zeros(size, bool)
        return Example(tokens, tokens, flags, flags, flags, np.arange(segments) == 0, tokens, tokens)


@dataclasses.dataclass(frozen=True)
class RulerSource(SourceConfig):
    """Opens a `Ruler`."""

    kind: ClassVar[str] = "ruler_of_tests"

    name: int = 0
    goes_on: bool = False

    @property
    def continues(self) -> bool:
        return self.goes_on

    def build(self, tokenizer, segment_tokens, seed):
        return Ruler(self.name)

    def corpus(self, seed):
        return [f"ruler {self.name}"]


def take(count: int, config: DataConfig, source=None, **options) -> list[Example]:
    return list(itertools.islice(batches(config, source or Ruler(), **options), count))


def assert_equal(got: Example, wanted: Example) -> None:
    for name in wanted._fields:
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name), err_msg=name)


@pytest.fixture
def story_source(tmp_path):
    """Real sources of both packings over the same files."""

    def build(packing: str):
        for i in range(12):
            (tmp_path / f"{i}.txt").write_text(f"Story {i}. " + "It went on and on. " * (i % 5))
        return TextFiles(path=str(tmp_path), packing=packing).build(BYTES, T, 0)

    return build


def test_a_batch_in_full():
    (first, second) = take(2, DataConfig(rows=3, segments=(2,)), start_step=7)
    np.testing.assert_array_equal(first.tokens[:, :5], [[7, 0, 3, 0, 0], [7, 1, 3, 0, 0], [7, 2, 3, 0, 0]])
    np.testing.assert_array_equal(second.tokens[:, :2], [[8, 0], [8, 1], [8, 2]])
    assert first.tokens.shape == (3, 8)
    assert first.reset.shape == (3, 2)


def test_held_out_reaches_the_source():
    (batch,) = take(1, DataConfig(rows=1, segments=(2,)), held_out=True)
    assert batch.tokens[0, 3] == 1


def test_curriculum():
    config = DataConfig(segments=(1, 2, 4), stage_steps=(3, 5))
    assert [segments_at(config, step) for step in range(8)] == [1, 1, 1, 2, 2, 4, 4, 4]
    shapes = [batch.tokens.shape[1] for batch in take(8, dataclasses.replace(config, rows=2))]
    assert shapes == [4, 4, 4, 8, 8, 16, 16, 16]


def test_at_first_every_segment_begins_with_a_fresh_memory():
    config = DataConfig(source=RulerSource(), rows=2, segments=(3,), alone_steps=2)
    assert [batch.reset.all() for batch in take(4, config)] == [True, True, False, False]
    assert [batch.reset[0].tolist() for batch in take(1, config, held_out=True)] == [[True, False, False]]
    plain = take(1, dataclasses.replace(config, alone_steps=0))[0]
    np.testing.assert_array_equal(take(1, config)[0].tokens, plain.tokens)


def test_short_documents_fill_rows_and_none_is_read_twice():
    config = DataConfig(source=RulerSource(), rows=2, segments=(1, 2, 4), stage_steps=(1, 2), fill_rows=True)
    shown = [batch.tokens.reshape(2, 4, T)[:, :, :2].tolist() for batch in take(3, config)]
    # [step, document] at the first tokens of each segment: four documents of one segment, two of two, one of four.
    assert shown[0] == [[[0, 0], [0, 1], [0, 2], [0, 3]], [[0, 4], [0, 5], [0, 6], [0, 7]]]
    assert [row[0] for row in shown[1]] == [[1, 0], [1, 4]]
    assert [row[2] for row in shown[1]] == [[1, 1], [1, 5]]
    assert [row[0] for row in shown[2]] == [[2, 0], [2, 4]]
    assert all(batch.tokens.shape == (2, 4 * T) and batch.reset.shape == (2, 4) for batch in take(3, config))


@pytest.mark.parametrize("fields", [{"segments": (3, 4)}, {"segments": (2, 4), "vary_segments": True}])
def test_stages_that_do_not_fill_rows(fields):
    with pytest.raises(ValueError, match="fill_rows"):
        DataConfig(source=RulerSource(), stage_steps=(1,), fill_rows=True, **fields)


@pytest.mark.parametrize("packing", ["packed", "ordered"])
def test_documents_that_are_read_on_do_not_fill_rows(packing):
    """Rows are numbered as if all documents had one segment: of a text most would be skipped."""
    with pytest.raises(ValueError, match=r"data\.fill_rows.*'text'.*left out"):
        DataConfig(source=TextFiles(path="unread", packing=packing), fill_rows=True)


def test_varying_segments_stay_within_the_stage_and_depend_on_the_seed():
    config = DataConfig(segments=(2, 4), stage_steps=(100,), vary_segments=True)
    drawn = [segments_at(config, step) for step in range(400)]
    assert set(drawn[:100]) == {1, 2}
    counts = np.bincount(drawn[100:], minlength=5)
    assert counts[0] == 0
    assert counts[1:].min() > 50
    assert drawn == [segments_at(config, step) for step in range(400)]
    assert drawn != [segments_at(dataclasses.replace(config, seed=1), step) for step in range(400)]


@pytest.mark.parametrize("packing", ["packed", "ordered"])
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_a_resume_goes_on_as_if_nothing_had_happened_on_any_number_of_processes(story_source, packing, process_count):
    source = story_source(packing)
    stages = {"segments": (2,)} if packing == "ordered" else {"segments": (1, 3), "stage_steps": (6,)}
    config = DataConfig(rows=8, vary_segments=packing == "packed", **stages)
    uninterrupted = take(12, config, source)
    for start in (0, 5, 9):
        parts = [
            take(12 - start, config, source, start_step=start, process_index=p, process_count=process_count)
            for p in range(process_count)
        ]
        for step, of_processes in enumerate(zip(*parts, strict=True), start=start):
            assert all(part.tokens.shape[0] == 8 // process_count for part in of_processes)
            assert_equal(Example(*map(np.concatenate, zip(*of_processes, strict=True))), uninterrupted[step])


def test_rows_that_processes_cannot_share_evenly():
    with pytest.raises(UserError, match=r"data\.rows=6 is not a multiple of the 4 processes"):
        batches(DataConfig(rows=6), Ruler(), process_count=4)


@pytest.mark.parametrize(
    "stages", [{"segments": (1, 2), "stage_steps": (4,)}, {"segments": (2,), "vary_segments": True}]
)
def test_ordered_rows_need_a_constant_number_of_segments(stages):
    config = DataConfig(source=TextFiles(path="unread", packing="ordered"), **stages)
    with pytest.raises(UserError, match=r"same number of segments at every step.*data\.segments="):
        batches(config, Ruler())


def test_an_error_of_the_source_arrives_as_it_is():
    class Broken:
        def example(self, step, row, rows, segments, held_out=False):
            raise UserError("shard 3 is damaged", status=1)

    with pytest.raises(UserError, match="shard 3 is damaged"):
        next(batches(DataConfig(rows=2), Broken()))


def test_batches_are_prepared_ahead_by_other_threads():
    seen = threading.Event()
    makers = set()

    class Watched(Ruler):
        def example(self, step, row, rows, segments, held_out=False):
            makers.add(threading.get_ident())
            if step == 3:
                seen.set()
            return super().example(step, row, rows, segments, held_out)

    iterator = batches(DataConfig(rows=2, prefetch=4), Watched())
    next(iterator)
    assert seen.wait(timeout=20)  # step 3 is made though only step 0 was asked for
    assert threading.get_ident() not in makers


def mixture(weights: tuple[float, ...], goes_on: bool = False):
    parts = tuple(RulerSource(name=i, goes_on=goes_on and i == 1) for i in range(len(weights)))
    return MixedSource(parts=parts, weights=weights)


def test_mixed_rows_follow_the_weights():
    source = mixture((1.0, 3.0)).build(BYTES, T, 0)
    names = np.array([[source.example(step, row, 8, 2).tokens[4] for row in range(8)] for step in range(250)])
    assert abs(names.mean() - 0.75) < 0.04
    assert 0 < names.mean(axis=0).min() <= names.mean(axis=0).max() < 1  # each row sees both
    again = mixture((1.0, 3.0)).build(BYTES, T, 0)
    assert again.example(17, 3, 8, 2).tokens[4] == names[17, 3]
    other = mixture((1.0, 3.0)).build(BYTES, T, 1)
    assert any(other.example(step, 0, 8, 2).tokens[4] != names[step, 0] for step in range(50))


def test_rows_of_sources_that_go_on_keep_their_source_and_are_counted_apart():
    config = mixture((1.0, 3.0), goes_on=True)
    assert config.continues
    source = config.build(BYTES, T, 0)
    rows = [source.example(0, row, 8, 2).tokens for row in range(8)]
    shares = {name: sorted((row[1], row[2]) for row in rows if row[4] == name) for name in (0, 1)}
    assert shares == {0: [(0, 2), (1, 2)], 1: [(i, 6) for i in range(6)]}
    for step in range(1, 9):
        assert [source.example(step, row, 8, 2).tokens[4] for row in range(8)] == [row[4] for row in rows]
    with pytest.raises(UserError, match="one would get none"):
        source.example(0, 0, 1, 2)


def test_equal_parts_of_a_mixture_by_row_read_different_rows():
    story = BabilongSource()
    config = MixedSource(parts=(story, story, RulerSource(goes_on=True)), weights=(1.0, 1.0, 1.0))
    tokenizer = WordTokenizer()
    source, again = (config.build(tokenizer, 32, 0) for _ in range(2))
    assert len({source.example(0, row, 6, 2).tokens.tobytes() for row in range(6)}) == 6
    np.testing.assert_array_equal(again.example(3, 1, 6, 2).tokens, source.example(3, 1, 6, 2).tokens)


def test_mixed_corpus_and_weights():
    assert mixture((1.0, 1.0)).corpus(0) == ["ruler 0", "ruler 1"]
    assert not mixture((1.0, 1.0)).continues
    for weights in ((1.0,), (1.0, 0.0), ()):
        with pytest.raises(ValueError, match="a positive number for each of the 2 parts"):
            MixedSource(parts=(RulerSource(), RulerSource()), weights=weights)


def test_packing_decides_whether_rows_go_on():
    assert DocumentFields(packing="ordered").continues
    assert TextFiles(path="x", packing="ordered").continues
    assert not TextFiles(path="x").continues
    assert not RulerSource().continues
