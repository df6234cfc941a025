"""The bAbI language and its files."""

import pytest

from lm2_jax.data import babi
from lm2_jax.data.babi import Event, Query
from lm2_jax.errors import UserError

STORY = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Mary got the milk there.
5 Where is John? \thallway\t2
1 Sandra went back to the office.
2 Where is Sandra? \toffice\t1
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "qa1_single-supporting-fact_train.txt").write_text(STORY)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "event"),
    [
        ("Mary went back to the kitchen.", Event("move", ("Mary", "kitchen"))),
        ("John picked up the apple there.", Event("take", ("John", "apple"))),
        ("John put down the apple.", Event("drop", ("John", "apple"))),
        ("Fred handed the football to Jeff.", Event("give", ("Fred", "football", "Jeff"))),
        ("The office is north of the garden.", Event("relation", ("office", "north", "garden"))),
    ],
)
def test_statements_by_hand(text, event):
    assert babi.parse_statement(text) == event


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("Where is Mary? ", Query("where_person", ("Mary",))),
        ("Where is the milk?", Query("where_object", ("milk",))),
        ("Where was the milk before the office? ", Query("before", ("milk", "office"))),
        ("What is west of the garden?", Query("which_is", ("west", "garden"))),
        ("What is the garden west of?", Query("is_of", ("garden", "west"))),
        ("What did Bill give to Fred? ", Query("what_given", ("Bill", "Fred"))),
        ("Who gave the milk to Fred? ", Query("giver_to", ("milk", "Fred"))),
        ("Who did Fred give the milk to? ", Query("receiver_from", ("Fred", "milk"))),
    ],
)
def test_questions_by_hand(text, query):
    assert babi.parse_question(text) == query


@pytest.mark.parametrize("task", babi.WORLD_TASKS)
def test_every_question_is_read_as_it_is_written(task):
    queries = babi.all_queries(task)
    assert len(set(queries)) == len(queries) > 2
    for query in queries:
        text = babi.write_question(query)
        assert babi.parse_question(text) == query
        assert text.endswith(" ") == (task != "qa4")


@pytest.mark.parametrize("text", ["Mary flew to the office.", "Where is Gandalf?", "Mary went to the office. ", ""])
def test_other_sentences_are_refused(text):
    with pytest.raises(UserError, match="not a statement"):
        babi.parse_statement(text)
    with pytest.raises(UserError, match="not a question"):
        babi.parse_question(text)


def test_samples_leave_earlier_questions_out(folder):
    samples = babi.read_samples(str(folder), "qa1", "train")
    assert [s.question for s in samples] == ["Where is Mary? ", "Where is John? ", "Where is Sandra? "]
    assert samples[1].facts == ("Mary moved to the bathroom.", "John went to the hallway.", "Mary got the milk there.")
    assert samples[1].support == (1,)
    assert samples[2].facts == ("Sandra went back to the office.",)
    assert [s.answer for s in samples] == ["bathroom", "hallway", "office"]


def test_missing_files_are_named(folder):
    with pytest.raises(UserError, match=r"babi_dir.*not a folder"):
        babi.read_stories(str(folder / "nowhere"), "qa1", "train")
    with pytest.raises(UserError, match=r"qa1_\*_test.txt"):
        babi.read_stories(str(folder), "qa1", "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [("1 fine.\nno number\n", "line 2 is not a line"), ("2 Late.\n", "expected a story that begins"), ("\n", "empty")],
)
def test_damaged_files_are_named(tmp_path, text, message):
    (tmp_path / "qa2_train.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        babi.read_stories(str(tmp_path), "qa2", "train")


@pytest.mark.parametrize("task", babi.WORLD_TASKS)
def test_real_files_are_in_the_grammar(data_dir, task):
    words = {word for vocabulary in (babi.PERSONS, babi.PLACES, babi.OBJECTS, babi.DIRECTIONS) for word in vocabulary}
    for split in ("train", "test"):
        statements, questions, answers = set(), set(), set()
        for story in babi.read_stories(str(data_dir / "babi" / "en-10k"), task, split):
            for line in story:
                (statements if line.answer is None else questions).add(line.text)
                answers.add(line.answer)
        for text in statements:
            event = babi.parse_statement(text)
            assert set(event.words) <= words
            verbs = babi.VERBS.get(event.kind, ("",))
            written = {babi.write_statement(event, verb, there) for verb in verbs for there in (False, True)}
            assert text in written
        for text in questions:
            assert babi.write_question(babi.parse_question(text)) == text
            assert babi.parse_question(text) in babi.all_queries(task)
        assert answers - {None} <= set(babi.answers_of(task))


def test_all_twenty_tasks_are_read(data_dir):
    folder = str(data_dir / "babi" / "en-10k")
    for task in babi.TASKS:
        samples = babi.read_samples(folder, task, "test")
        assert len(samples) == 1000
        assert all(s.answer and s.facts and "\t" not in s.question for s in samples)
