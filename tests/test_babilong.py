"""The scorers against published verdicts, and the reader of the published layout."""

import json
import re

import pyarrow
import pytest
from pyarrow import parquet

from lm2_jax import babilong
from lm2_jax.babilong import Sample, is_correct
from lm2_jax.errors import UserError

ROWS = [
    {"input": "Mary went to the office.", "question": "Where is Mary? ", "target": "office"},
    {"input": "John went to the garden. Mary left.", "question": "Where is John? ", "target": "garden", "extra": "x"},
]
SAMPLES = [Sample(row["input"], row["question"], row["target"]) for row in ROWS]


def test_official_verdicts_are_reproduced(data_dir):
    path = data_dir / "babilong_scorer" / "cases.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    cases = json.loads(path.read_text())
    assert len(cases) > 300
    wrong = [
        case
        for case in cases
        if is_correct(case["target"], case["output"], case["question"], case["task"]) != case["correct"]
    ]
    assert wrong == []


@pytest.mark.parametrize("task", babilong.TASKS)
def test_labels_cover_the_real_answers(data_dir, task):
    """Every real answer, given as the output, is right; but for qa7's quirk."""
    (path,) = (data_dir / "babi" / "en-10k").glob(f"{task}_*_test.txt")
    lines = [line.split("\t") for line in path.read_text().splitlines() if "\t" in line]
    assert len(lines) == 1000
    for question, target, _ in lines:
        question = question.split(" ", 1)[1]
        assert is_correct(target, f" {target}.", question, task, strict=True), (target, question)
        assert is_correct(target, f" {target}.", question, task) == (target != "none"), (target, question)


def test_labels():
    assert list(babilong.TASK_LABELS) == [f"qa{number}" for number in range(1, 21)]
    sizes = [len(labels) for labels in babilong.TASK_LABELS.values()]
    assert sizes == [6, 6, 6, 6, 7, 2, 4, 4, 2, 3, 6, 6, 6, 6, 4, 4, 2, 2, 12, 7]
    with pytest.raises(UserError, match=r"'qa21'.*Did you mean 'qa2"):
        babilong.labels("qa21")


WHERE = "Where is Mary? "


@pytest.mark.parametrize(
    ("task", "target", "output", "question", "official", "strict"),
    [
        ("qa1", "kitchen", "The kitchen", WHERE, True, True),
        ("qa1", "Kitchen", "KITCHEN.", WHERE, True, True),
        ("qa1", "kitchen", "", WHERE, False, False),
        ("qa1", "kitchen", "The kitchen or the garden.", WHERE, False, False),
        ("qa1", "kitchen", "The kitchen. Not the garden.", WHERE, True, True),
        ("qa1", "kitchen", "I think. The kitchen", WHERE, False, False),
        ("qa1", "kitchen", "kitchen<context>garden", WHERE, True, True),
        ("qa1", "kitchen", "kitchen <EXAMPLE> garden", WHERE, True, True),
        ("qa1", "kitchen", "kitchen Question: Where is the garden?", WHERE, False, False),
        ("qa1", "kitchen", "kitchens", WHERE, True, False),  # inside a longer word
        ("qa1", "kitchen", "kitchen_2", WHERE, True, False),
        ("qa1", "kitchen", "'kitchen'!", WHERE, True, True),
        ("qa3", "garden", "Before the office the garden", "Where was the milk before the office? ", True, True),
        ("qa3", "garden", "Before the office", "Where was the milk before the office? ", False, False),
        ("qa1", "office", "office", "Is the office where Mary is?", False, True),  # the target stands in the question
        ("qa7", "none", "none", "How many objects is Mary carrying? ", False, True),  # "one" in "none"
        ("qa7", "one", "none", "How many objects is Mary carrying? ", False, False),
        ("qa7", "one", "one", "How many objects is Mary carrying? ", True, True),
        ("qa6", "no", "I do not know", "Is Mary in the office? ", True, False),  # "no" in "not" and "know"
        ("qa6", "no", "no", "Is Mary in the north? ", False, True),  # "no" in "north"
        ("qa6", "yes", "yes and no", "Is Mary in the office? ", False, False),
        ("qa10", "maybe", "Maybe", "Is Bill in the park? ", True, True),
        ("qa8", "apple,milk", "milk, apple", "What is Mary carrying? ", True, True),
        ("qa8", "apple, milk", "milk, apple", "What is Mary carrying? ", False, True),  # blank in the target
        ("qa8", "apple,milk", "apple", "What is Mary carrying? ", False, False),
        ("qa8", "apple", "milk, apple", "What is Mary carrying? ", False, False),
        ("qa8", "apple,football,milk", "football milk apple", "What is Mary carrying? ", True, True),
        ("qa19", "n,w", "n,w", "How do you go from the den to the garden?", True, True),
        ("qa19", "n,w", "n,w,e", "How do you go from the den to the garden?", True, False),  # a third step
        ("qa19", "n,w", "w,n", "How do you go from the den to the garden?", False, False),
        ("qa19", "n,n", "north north", "How do you go from the den to the garden?", False, False),
    ],
)
def test_verdicts(task, target, output, question, official, strict):
    assert is_correct(target, output, question, task) is official
    assert is_correct(target, output, question, task, strict=True) is strict


def test_unknown_task():
    with pytest.raises(UserError, match="'qa0'"):
        is_correct("a", "b", "c", "qa0")


@pytest.mark.parametrize(("name", "tokens"), [("0k", 0), ("4k", 4000), ("128k", 128_000), ("10M", 10_000_000)])
def test_length_tokens(name, tokens):
    assert babilong.length_tokens(name) == tokens


@pytest.mark.parametrize("name", ["4", "4K", "k", "-1k", "1.5k", "4k "])
def test_no_length(name):
    with pytest.raises(UserError, match=re.escape(repr(name))):
        babilong.length_tokens(name)


def write(path):
    """Writes ROWS in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    else:
        parquet.write_table(pyarrow.Table.from_pylist([{"extra": None, **row} for row in ROWS]), path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_formats_read_alike(tmp_path, suffix):
    path = tmp_path / f"qa1{suffix}"
    write(path)
    assert babilong.read_samples(path) == SAMPLES


def test_layout(tmp_path):
    for name in ["16k/qa1.json", "2k/qa10.jsonl", "2k/qa2.parquet", "1M/qa1.json", "0k/qa1.json"]:
        write(tmp_path / name)
    (tmp_path / "README.md").write_text("not a set")
    (tmp_path / "2k" / "notes.json").write_text("{}")
    (tmp_path / "64k").mkdir()
    found = babilong.published_files(tmp_path)
    assert [(length, list(files)) for length, files in found.items()] == [
        ("0k", ["qa1"]),
        ("2k", ["qa2", "qa10"]),
        ("16k", ["qa1"]),
        ("1M", ["qa1"]),
    ]
    everything = babilong.select_files(tmp_path)
    assert list(everything) == [("qa1", "0k"), ("qa2", "2k"), ("qa10", "2k"), ("qa1", "16k"), ("qa1", "1M")]
    assert list(babilong.select_files(tmp_path, tasks=("qa10",), lengths=("2k",))) == [("qa10", "2k")]
    with pytest.raises(UserError, match=r"holds no 'qa5', only \['qa2', 'qa10'\]"):
        babilong.select_files(tmp_path, tasks=("qa5",), lengths=("2k",))
    with pytest.raises(UserError, match=r"holds no '4k', only \['0k', '2k', '16k', '1M'\]"):
        babilong.select_files(tmp_path, lengths=("4k",))
    with pytest.raises(UserError, match="'mmlu'"):
        babilong.select_files(tmp_path, tasks=("mmlu",))
    write(tmp_path / "0k/qa1.jsonl")
    with pytest.raises(UserError, match="one set in two files"):
        babilong.published_files(tmp_path)


def test_layout_missing(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        babilong.published_files(tmp_path / "nowhere")
    (tmp_path / "qa1.json").write_text("[]")
    with pytest.raises(UserError, match=r"such as 4k/qa1.json; it holds \['qa1.json'\]"):
        babilong.published_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message", "status"),
    [
        ("a.json", b"[]", "holds no rows", 1),
        ("a.jsonl", b"\n", "holds no rows", 1),
        ("a.json", b"{", "not valid JSON", 1),
        ("a.json", b"\xff\xfe\xfd", "not valid JSON", 1),
        ("a.json", b'{"input": "x"}\n{"input": "y"}', "must end in .jsonl", 1),
        ("a.json", b'{"input": "x"}', "expected a list of rows, got dict", 1),
        ("a.json", b'["x"]', "row 0: expected an object", 1),
        ("a.jsonl", b'{"input": 1}\nnonsense', "line 2: not valid JSON", 1),
        ("a.json", b'[{"input": "x", "question": "y"}]', "row 0: no field 'target', only", 1),
        ("a.json", b'[{"input": 1, "question": "y", "target": "z"}]', "'input' must be text, got 1", 1),
        ("a.json", b'[{"input": "x", "question": " ", "target": "z"}]', "'question' is empty", 1),
        ("a.parquet", b"PAR1 and then nothing", "not a valid Parquet file", 1),
        ("a.parquet", b"", "not a valid Parquet file", 1),
        ("a.csv", b"x", "expected a name that ends in", 2),
        ("gone.json", None, "no such file", 2),
    ],
)
def test_bad_files(tmp_path, name, content, message, status):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        babilong.read_samples(path)
    assert str(path) in str(caught.value)
    assert caught.value.status == status
