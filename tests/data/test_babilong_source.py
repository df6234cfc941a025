"""BABILong rows: what stands in them, read back by an independent reader."""

import dataclasses
import itertools
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from lm2_jax.config import from_dict, to_dict
from lm2_jax.data import babilong_source
from lm2_jax.data.babi import WORLD_TASKS, Sample, answers_of, read_samples
from lm2_jax.data.babilong_source import BabilongSource
from lm2_jax.data.background import Prose
from lm2_jax.data.base import SourceConfig
from lm2_jax.data.event_stream import simulated
from lm2_jax.data.interleaved import InterleavedRows, Recipe
from lm2_jax.data.philox import Draws
from lm2_jax.data.protocol import babilong_sample, build_babilong_set, facts_tokens, limit_facts
from lm2_jax.data.text_tokens import Encoder, noise
from lm2_jax.data.tokenizers import TokenizerConfig, build_tokenizer
from lm2_jax.errors import UserError
from tests.data.reading import WordTokenizer, read_answer

ROOT = pathlib.Path(__file__).parents[2]
T = 32
NAMES = "Mary|John|Daniel|Sandra|Fred|Bill|Jeff"
VERBS = "went|journeyed|travelled|moved|picked|grabbed|got|took|put|dropped|left|discarded|passed|gave|handed"
FACT = re.compile(rf"(?:{NAMES}) (?:{VERBS})\b[^.?]*\.|The \w+ is (?:north|south|east|west) of the \w+\.")
QUESTION = re.compile(r"(?:Where|What|Who) [^.?]*\?$")


def build(tokenizer=None, **fields):
    return BabilongSource(**fields).build(tokenizer or WordTokenizer(), T, seed=0)


def equal(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def read_row(tokenizer, example):
    """(marker, question, answer, latest token it can be read from) of each label, by reading the text before it."""
    tokens = example.tokens[example.valid]
    words = ["\0" if t == tokenizer.answer_id else tokenizer.decode([t]) for t in tokens]
    ends = list(itertools.accumulate(len(word) for word in words))
    text = "".join(words)
    found = []
    for at in np.flatnonzero(example.distance >= 0):
        before = text[: ends[at] - 1]
        facts = list(FACT.finditer(before))
        question = QUESTION.search(before)
        assert question is not None, before[-60:]
        read = read_answer([fact[0] for fact in facts], question[0])
        assert read is not None, (before, question[0])
        answer, fact = read
        found.append((int(at), question[0], answer, int(np.searchsorted(ends, facts[fact].end()))))
    return found


LAYOUTS = [
    {},
    {"tasks": ("qa2", "qa3")},
    {"tasks": ("qa4",), "closing": False},
    {"tasks": ("qa5", "qa1"), "noise_fraction": 0.0},
    {"layout": "question_last", "tasks": ("qa1", "qa4")},
]


def test_questions_are_about_more_and_more_persons():
    tokenizer = WordTokenizer()
    source = build(tokenizer, asked=(1, 3), asked_steps=(2,), question_rate=1.0)

    def persons(step, held_out=False):
        rows = [source.example(step, row, 8, 4, held_out) for row in range(8)]
        asked = {question for row in rows for _, question, _, _ in read_row(tokenizer, row)}
        return {question.removeprefix("Where is ").rstrip("?") for question in asked}

    assert [persons(step) for step in (0, 1)] == [{"Daniel"}] * 2
    assert persons(2) == persons(0, held_out=True) == {"Daniel", "John", "Mary"}
    told = "".join(tokenizer.decode(source.example(0, row, 8, 4).tokens) for row in range(8))
    assert all(name in told for name in ("John", "Mary", "Sandra"))


def test_a_preset_with_stages_can_be_given_the_other_layout():
    source, plain = (build(layout="question_last", **more) for more in ({"asked": (1, 3), "asked_steps": (2,)}, {}))
    for step in (1, 2, 3):
        assert equal(source.example(step, 0, 1, 4), plain.example(step, 0, 1, 4))


@pytest.mark.parametrize("fields", LAYOUTS)
def test_an_example_is_a_function_of_its_index(fields):
    tokenizer = WordTokenizer()
    first, second = build(tokenizer, **fields), build(tokenizer, **fields)
    rows = [first.example(3, row, 8, 4) for row in range(8)]
    backwards = [second.example(3, row, 8, 4) for row in reversed(range(8))][::-1]
    assert all(equal(a, b) for a, b in zip(rows, backwards, strict=True))
    assert equal(first.example(6, 1, 4, 4), rows[1]), "index = step * rows + row"
    assert not equal(rows[0], rows[1])
    assert not equal(first.example(3, 0, 8, 4, held_out=True), rows[0])
    other = BabilongSource(**fields).build(tokenizer, T, seed=1)
    assert not equal(other.example(3, 0, 8, 4), rows[0])


def test_an_example_does_not_depend_on_the_order_of_a_set():
    """Strings have other hashes in each process; a resumed run must read the rows of the one before it."""
    program = (
        "import hashlib; from tests.data.test_babilong_source import build; "
        "source = build(tasks=('qa2', 'qa3', 'qa5')); "
        "rows = b''.join(source.example(step, 0, 1, 32).tokens.tobytes() for step in range(12)); "
        "print(hashlib.sha256(rows).hexdigest())"
    )
    found = {
        subprocess.check_output(
            [sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, cwd=ROOT, text=True
        )
        for seed in ("0", "1")
    }
    assert len(found) == 1


@pytest.mark.parametrize("fields", LAYOUTS)
@pytest.mark.parametrize("segments", [1, 3, 8])
def test_shapes_and_flags(fields, segments):
    source = build(**fields)
    for row in range(6):
        e = source.example(0, row, 6, segments)
        size = segments * T
        for array, dtype in zip(e, (np.int32, np.int32, bool, bool, bool, bool, np.int32, np.int32), strict=True):
            assert array.dtype == dtype
            assert array.shape == ((segments,) if array is e.reset else (size,))
        assert e.reset.tolist() == [True] + [False] * (segments - 1)
        assert not (e.answer & e.text).any()
        assert not ((e.answer | e.text) & ~e.valid).any()
        assert (np.diff(e.valid.astype(int)) <= 0).all(), "padding is a tail"
        assert (e.distance[~e.answer] == -1).all()
        text = np.flatnonzero(e.text[:-1])
        assert (e.targets[text] == e.tokens[text + 1]).all(), "outside answers the target is the next token"


@pytest.mark.parametrize("task", WORLD_TASKS)
def test_interleaved_answers_and_distances_are_right(task):
    tokenizer = WordTokenizer()
    source = build(tokenizer, tasks=(task,), noise_fraction=0.3)
    labels = 0
    for row in range(12):
        example = source.example(0, row, 12, 10)
        for at, question, answer, latest in read_row(tokenizer, example):
            assert tokenizer.decode([example.targets[at]]) == " " + answer, question
            assert example.distance[at] == at // T - latest // T
            labels += 1
    assert labels > 60


def test_mixed_tasks_are_right_and_weighted():
    tokenizer = WordTokenizer()
    source = build(tokenizer, tasks=("qa1", "qa2", "qa4"), task_weights=(1.0, 1.0, 6.0), noise_fraction=0.0)
    asked = []
    for row in range(12):
        for at, question, answer, _ in read_row(tokenizer, example := source.example(0, row, 12, 10)):
            assert tokenizer.decode([example.targets[at]]) == " " + answer
            asked.append("of" in question)
    assert 0.6 < np.mean(asked) < 0.9


@pytest.mark.parametrize("fields", [{}, {"noise_fraction": 0.0}, {"tasks": ("qa2",)}])
def test_no_answer_stands_in_the_text_after_its_question(fields):
    tokenizer = WordTokenizer()
    source = build(tokenizer, **fields)
    closed = 0
    for row in range(30):
        e = source.example(0, row, 30, 8)
        markers = np.flatnonzero((e.tokens == tokenizer.answer_id) & e.valid)
        assert (np.flatnonzero(e.distance >= 0) == markers).all(), "every marker has its label"
        for at in markers[:-1]:
            follower = tokenizer.decode([e.tokens[at + 1]]).strip()
            assert not any(follower in answers_of(task) for task in ("qa1", "qa5")) or follower in NAMES
            assert e.targets[at] != e.tokens[at + 1] or follower in NAMES, "names may begin the next statement"
        if not len(markers):  # nothing could be asked about in this row
            continue
        last = np.flatnonzero(e.answer)[-1]
        if e.distance[last] == -1:  # the closing answer: fed, and followed by the end
            closed += 1
            assert last == markers[-1] + 1 == e.valid.sum() - 1
            assert e.tokens[last] == e.targets[last - 1]
            assert e.targets[last] == tokenizer.eos_id
            if fields.get("noise_fraction") != 0.0:
                assert e.valid.all(), "background fills the row exactly"
    assert closed >= 25
    open_end = build(tokenizer, closing=False, **fields)
    for row in range(10):
        e = open_end.example(0, row, 10, 4)
        assert e.valid.all()
        assert tokenizer.eos_id not in e.targets
        assert (e.answer == (e.distance >= 0)).all()


def test_distances_are_spread_and_far_ones_occur():
    source = build()
    found = np.concatenate(
        [e.distance[e.answer & (e.distance >= 0)] for e in (source.example(0, r, 60, 16) for r in range(60))]
    )
    share = [np.mean((found >= low) & (found < high)) for low, high in ((0, 1), (1, 2), (2, 4), (4, 8), (8, 16))]
    assert min(share[:4]) > 0.1, share
    assert share[4] > 0.02, share
    assert max(share) < 0.5, share


def test_the_share_of_background_is_held():
    tokenizer = WordTokenizer()
    for fraction in (0.2, 0.5, 0.8):
        source = build(tokenizer, noise_fraction=fraction, closing=False, question_rate=0.01)
        told = total = 0
        for row in range(10):
            text = tokenizer.decode(source.example(0, row, 10, 20).tokens)
            told += sum(len(tokenizer.encode(fact)) for fact in FACT.findall(text))
            total += 20 * T
        assert abs(1 - told / total - fraction) < 0.05


def test_rows_draw_their_share_of_background():
    tokenizer = WordTokenizer()
    source = build(tokenizer, noise_fraction=0.1, noise_up_to=0.9, closing=False, question_rate=0.01)
    shares = []
    for row in range(40):
        text = tokenizer.decode(source.example(0, row, 40, 20).tokens)
        shares.append(1 - sum(len(tokenizer.encode(fact)) for fact in FACT.findall(text)) / (20 * T))
    assert min(shares) < 0.25 < 0.75 < max(shares), "the bounds are reached"
    assert np.histogram(shares, 4, (0.05, 0.95))[0].min() >= 4, "and all between them"


def test_answers_of_several_tokens_are_refused_with_advice():
    class Letters(WordTokenizer):
        def encode(self, text):
            return [i for letter in text for i in super(Letters, self).encode(letter)]

    with pytest.raises(UserError, match=r"one token each.*larger vocabulary.*question_last"):
        build(Letters())
    assert build(Letters(), layout="question_last", min_sentence_tokens=1).example(0, 0, 1, 32).answer.sum() > 3


class Pieces(WordTokenizer):
    """Cuts the words in -room as a small vocabulary does: bathroom and bedroom begin with the same token."""

    def encode(self, text):
        pieces = re.sub(r"(\s?b)(ath|ed)(room)", r"\1\0\2\0\3", text).split("\0")
        return [i for piece in pieces for i in super(Pieces, self).encode(piece)]


def test_answers_of_several_tokens_are_asked_for_where_they_differ():
    """Read back from the text: what answers share is written, what tells them apart is only in the targets."""
    tokenizer = Pieces()
    source, seen = build(tokenizer, split_answers=True, min_sentence_tokens=1), set()
    for row in range(20):
        e = source.example(0, row, 20, 8)
        labels = [at for at in np.flatnonzero(e.distance >= 0) if e.tokens[at] == tokenizer.answer_id]
        text = {at: tokenizer.decode(e.tokens[: at + 1]) for at in labels}
        for at in labels:
            question = QUESTION.search(text[at].rstrip())
            assert question is not None
            read = read_answer(FACT.findall(text[at]), question[0])
            assert read is not None
            ids = tokenizer.encode(f" {read[0]}")
            asked = 2 if len(ids) > 1 else 1
            seen.add(asked)
            assert e.targets[at : at + asked].tolist() == ids[:asked]
            assert e.tokens[at + 1 : at + asked].tolist() == ids[: asked - 1]
            assert (e.distance[at : at + asked] == e.distance[at]).all()
            assert e.answer[at : at + asked].all()
            is_closing = at == labels[-1] and tokenizer.eos_id in e.targets[at:].tolist()
            if is_closing:
                assert e.targets[at : at + len(ids) + 1].tolist() == [*ids, tokenizer.eos_id]
                assert e.answer[at : at + len(ids) + 1].all()
            else:
                assert e.tokens[at + asked] != ids[asked - 1], "the answer itself is not in the text"
    assert seen == {1, 2}
    with pytest.raises(UserError, match="one token each"):
        build(tokenizer)


def test_an_answer_that_begins_another_is_refused():
    class Short(WordTokenizer):
        def encode(self, text):
            ids = super().encode(text.replace("bathroom", "bath").replace("bedroom", "bath"))
            return [*ids, *super().encode("x")] if text == " bedroom" else ids

    with pytest.raises(UserError, match="another answer begins with all tokens of 'bathroom'"):
        build(Short(), split_answers=True)


def test_single_tokens_are_the_same_rows_with_and_without_split_answers():
    tokenizer = WordTokenizer()
    for tasks in (("qa1",), ("qa2", "qa5")):
        plain, split = (build(tokenizer, tasks=tasks, split_answers=on) for on in (False, True))
        assert all(equal(plain.example(0, row, 6, 4), split.example(0, row, 6, 4)) for row in range(6))


def test_without_a_marker_token_a_word_stands_for_it():
    tokenizer = WordTokenizer(answer_id=None)
    e = build(tokenizer).example(0, 0, 1, 4)
    for at in np.flatnonzero(e.distance >= 0):
        assert tokenizer.decode(e.tokens[at - 1 : at + 1]) == " Answer:"
        assert tokenizer.decode([e.targets[at]]).strip() in answers_of("qa1")


def test_question_last_is_context_question_marker_answer_end():
    tokenizer = WordTokenizer()
    source = build(tokenizer, layout="question_last", tasks=("qa1", "qa2", "qa4", "qa5"), max_facts=20)
    distances = set()
    for row in range(40):
        e = source.example(0, row, 40, 10)
        assert e.valid.all(), "background fills the row exactly"
        ((at, _, answer, latest),) = read_row(tokenizer, e)
        assert at == 10 * T - 2
        assert e.tokens[at] == tokenizer.answer_id
        assert np.flatnonzero(e.answer).tolist() == [at, at + 1]
        assert tokenizer.decode([e.targets[at]]) == " " + answer
        assert e.tokens[at + 1] == e.targets[at]
        assert e.targets[at + 1] == tokenizer.eos_id
        # A person's later deeds are mentions for the reader, no support in the protocol.
        assert e.distance[at] >= at // T - latest // T
        distances.add(int(e.distance[at]))
    assert len(distances) > 4


def test_margin_and_plain_rows_leave_padding():
    tokenizer = WordTokenizer()
    fixed = build(tokenizer, layout="question_last", margin=20).example(0, 0, 1, 10)
    assert fixed.valid.sum() == 10 * T - 20
    plain = build(tokenizer, layout="question_last", plain_fraction=1.0)
    for row in range(5):
        e = plain.example(0, row, 5, 10)
        text = tokenizer.decode(e.tokens[e.valid])
        rest = FACT.sub("", text).replace(" ", "")
        assert re.fullmatch(r"Whereis\w+\?\w+", rest), "facts, question and answer alone"
        assert (e.tokens[e.valid.sum() + 1 :] == tokenizer.pad_id).all()
    some = build(tokenizer, layout="question_last", plain_fraction=0.5)
    full = [some.example(0, row, 40, 10).valid.all() for row in range(40)]
    assert 8 < sum(full) < 32


def test_a_row_too_short_for_the_task_is_named():
    with pytest.raises(UserError, match=r"qa1 fits in a row of 9 tokens"):
        BabilongSource(layout="question_last").build(WordTokenizer(), 8, 0).example(0, 0, 1, 1)


def sample_of(count):
    facts = tuple(f"Mary went to the {place}." for place in ("office", "garden", "kitchen", "hallway")[:count])
    return Sample(facts, "Where is Mary? ", "garden", (count - 1,))


@pytest.mark.parametrize("total", [0, 20, 80, 400])
def test_published_protocol(total):
    """Exact size, order kept, slots anywhere, the facts whole; a short budget leaves the facts alone."""
    tokenizer = WordTokenizer()
    encode = Encoder(tokenizer)
    sample = sample_of(3)
    first, adjacent, leading = [], 0, 0
    for key in range(60):
        draws = Draws(key)
        placed = babilong_sample(sample, noise(Prose(), encode, draws, False, (10, None)), encode, total, draws)
        assert len(placed.tokens) == max(total, facts_tokens(sample, encode))
        assert [m[0] for m in FACT.finditer(placed.text)] == list(sample.facts)
        assert tokenizer.decode(placed.tokens) == " " + placed.text
        assert tokenizer.decode(placed.tokens[: placed.latest + 1]).endswith(sample.facts[-1])
        assert placed.row() == {"input": placed.text, "question": "Where is Mary? ", "target": "garden"}
        spans = [m.span() for m in FACT.finditer(placed.text)]
        first.append(spans[0][0] / len(placed.text))
        adjacent += any(b[0] == a[1] + 1 for a, b in itertools.pairwise(spans))
        leading += spans[0][0] == 0
    if total == 400:
        assert 0 < adjacent < 60, "slots are drawn with replacement"
        assert 0 < leading < 30
        assert 0.15 < np.mean(first) < 0.35, "the first of three uniform slots"


def test_sets_in_the_published_layout():
    tokenizer = WordTokenizer()
    rows = build_babilong_set("qa2", 300, 10, tokenizer, max_facts=20)
    assert rows == build_babilong_set("qa2", 300, 10, tokenizer, max_facts=20)
    assert rows != build_babilong_set("qa2", 300, 10, tokenizer, max_facts=20, seed=1)
    assert [set(row) for row in rows] == [{"input", "question", "target"}] * 10
    for row in rows:
        facts = FACT.findall(row["input"])
        assert len(facts) <= 20
        assert read_answer(facts, row["question"])[0] == row["target"]
        assert abs(len(tokenizer.encode(row["input"])) - 300) <= 3
    bare = build_babilong_set("qa2", 0, 10, tokenizer, max_facts=20)
    assert all(" ".join(FACT.findall(row["input"])) == row["input"] for row in bare)
    assert [r["question"] for r in bare] == [r["question"] for r in rows], "the same questions at every length"


def test_sets_of_real_questions_in_books(data_dir):
    babi, books = str(data_dir / "babi" / "en-10k"), str(data_dir / "books")
    tokenizer = WordTokenizer()
    for task in ("qa1", "qa8", "qa20"):
        rows = build_babilong_set(task, 400, 20, tokenizer, babi_dir=babi, books_dir=books)
        assert len({row["input"] for row in rows}) == 20
        assert all(abs(len(tokenizer.encode(row["input"])) - 400) <= 4 for row in rows)
    with pytest.raises(UserError, match="1000 test samples of qa1; ask for fewer"):
        build_babilong_set("qa1", 0, 1001, tokenizer, babi_dir=babi)
    with pytest.raises(UserError, match="max_facts=1: all 1000 samples"):
        build_babilong_set("qa1", 0, 1, tokenizer, babi_dir=babi, max_facts=1)
    with pytest.raises(UserError, match="beyond qa5 need real files"):
        build_babilong_set("qa6", 0, 1, tokenizer)


@pytest.mark.parametrize("layout", ["interleaved", "question_last"])
def test_real_files_in_both_layouts(data_dir, layout):
    tokenizer = WordTokenizer()
    folders = {"babi_dir": str(data_dir / "babi" / "en-10k"), "books_dir": str(data_dir / "books")}
    source = build(tokenizer, layout=layout, tasks=("qa1",), max_sentence_tokens=60, **folders)
    texts = []
    for row in range(6):
        e = source.example(0, row, 6, 12)
        # Books name a Mary too: only what is written like a fact is read, and books never are.
        for at, _, answer, latest in read_row(tokenizer, e):
            assert tokenizer.decode([e.targets[at]]) == " " + answer
            assert e.distance[at] == at // T - latest // T
        texts.append(tokenizer.decode(e.tokens))
    assert equal(source.example(0, 5, 6, 12), e)
    known = {
        fact for path in sorted((data_dir / "babi" / "en-10k").glob("qa1_*")) for fact in FACT.findall(path.read_text())
    }
    assert {fact for text in texts for fact in FACT.findall(text)} <= known


def test_held_out_rows_read_the_test_file(tmp_path):
    for split, place in (("train", "garden"), ("test", "office")):
        (tmp_path / f"qa1_{split}.txt").write_text(f"1 Mary went to the {place}.\n2 Where is Mary? \t{place}\t1\n")
    for layout in ("interleaved", "question_last"):
        tokenizer = WordTokenizer()
        source = build(tokenizer, layout=layout, babi_dir=str(tmp_path))
        for held_out, place, other in ((False, "garden", "office"), (True, "office", "garden")):
            text = tokenizer.decode(source.example(0, 0, 1, 4, held_out).tokens)
            assert place in text
            assert other not in text


def test_the_corpus_teaches_every_word_that_is_needed(monkeypatch):
    monkeypatch.setattr(babilong_source, "_CORPUS_CHARACTERS", 40_000)
    config = BabilongSource(tasks=("qa2", "qa5"))
    corpus = config.corpus(0)
    assert corpus == config.corpus(0)
    assert corpus != config.corpus(1)
    assert 60_000 < sum(map(len, corpus)) < 120_000
    text = "".join(corpus)
    for word in (*answers_of("qa2"), *answers_of("qa5"), "Where", "received", "telescope"):
        assert f" {word}" in text
    facts = sum(len(fact) for fact in FACT.findall(text))
    assert 0.3 < facts / len(text) < 0.55


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": ()}, "tasks is empty"),
        ({"tasks": ("qa21",)}, "unknown task 'qa21'"),
        ({"tasks": ("qa7",)}, "'qa7' needs layout 'question_last' and real files"),
        ({"tasks": ("qa7",), "babi_dir": "x"}, "'qa7' needs layout"),
        ({"task_weights": (1.0, 2.0)}, "one positive number per task"),
        ({"task_weights": (0.0,)}, "one positive number per task"),
        ({"asked": (1, 2)}, "one increasing step per stage"),
        ({"asked": (0,)}, "one positive number per stage"),
        ({"asked": (1, 2, 3), "asked_steps": (5, 5)}, "one increasing step per stage"),
        ({"asked_steps": (5,)}, "one increasing step per stage"),
        ({"noise_fraction": 1.0}, "noise_fraction"),
        ({"noise_up_to": 0.4}, "at least noise_fraction=0.5 and below 1"),
        ({"noise_up_to": 1.0}, "at least noise_fraction=0.5 and below 1"),
        ({"question_rate": 0.0}, "question_rate"),
        ({"plain_fraction": 1.5}, "plain_fraction"),
        ({"min_sentence_tokens": 0}, "min_sentence_tokens"),
        ({"max_sentence_tokens": 5}, "max_sentence_tokens"),
        ({"max_facts": 1}, "max_facts"),
        ({"margin": -1}, "margin"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        BabilongSource(**fields)


def test_missing_folders_are_named(tmp_path):
    for layout in ("interleaved", "question_last"):
        with pytest.raises(UserError, match="babi_dir"):
            build(layout=layout, babi_dir=str(tmp_path / "nowhere"))
        with pytest.raises(UserError, match="books_dir"):
            build(layout=layout, books_dir=str(tmp_path))


def test_the_config_survives_json():
    config = BabilongSource(tasks=("qa1", "qa7"), layout="question_last", babi_dir="x", task_weights=(1.0, 2.0))
    assert from_dict(SourceConfig, to_dict(config)) == config
    assert dataclasses.is_dataclass(config)


def test_rows_can_be_written_without_a_source():
    """The probe's pieces alone: any tokenizer, any statements."""
    encode = Encoder(WordTokenizer())
    recipe = Recipe(("qa1",), (1.0,), (0.0, 0.0), 1.0, False)
    rows = InterleavedRows(recipe, encode, simulated(("qa1",)), lambda draws, held_out: iter(()))
    e = rows.example(Draws(0), 4, T, False)
    assert (e.distance >= 0).sum() > 5


@pytest.mark.parametrize(("task", "kept"), [("qa1", 800), ("qa2", 196), ("qa5", 189), ("qa8", 570)])
def test_max_facts_keeps_what_the_published_filter_keeps(data_dir, task, kept):
    """Counted with the published code, at 10 facts and with the test files."""
    samples = read_samples(str(data_dir / "babi" / "en-10k"), task, "test")
    assert len(limit_facts(samples, 10, task)) == kept


def test_answers_that_small_files_lack_are_tokens(tmp_path):
    story = "1 Mary moved to the kitchen.\n2 John went to the garden.\n3 Where is Mary? \tkitchen\t1\n"
    for split in ("train", "test"):
        (tmp_path / f"qa1_x_{split}.txt").write_text(story)
    source = BabilongSource(babi_dir=str(tmp_path))
    tokenizer = build_tokenizer(TokenizerConfig(), lambda: source.corpus(0), 512)
    assert {len(tokenizer.encode(f" {answer}")) for answer in answers_of("qa1")} == {1}
