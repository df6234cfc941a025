"""The verdicts against published ones, the names of lengths, and the reader of published data sets."""

import json
import re

import pyarrow
import pytest
from pyarrow import parquet

from lm2_jax import babilong
from lm2_jax.babilong import Sample, is_correct
from lm2_jax.errors import UserError
from lm2_jax.evaluation.published import read_set

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
        ("qa1", "office", "office", "Is the office where Mary is?", False, True),  # the target occurs in the question
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


@pytest.mark.parametrize(
    ("name", "tokens", "published"),
    [
        ("0k", 0, "0k"),
        ("4k", 4000, "4k"),
        ("128k", 128_000, "128k"),
        ("10M", 10_000_000, "10M"),
        ("16K", 16_000, "16k"),
        ("1m", 1_000_000, "1M"),
        ("1000k", 1_000_000, "1M"),
        ("4096", 4096, "4096"),
        ("4000", 4000, "4k"),
        ("0", 0, "0k"),
    ],
)
def test_lengths(name, tokens, published):
    assert babilong.length_tokens(name) == tokens
    assert babilong.length_name(name) == published


@pytest.mark.parametrize("name", ["4", "k", "-1k", "1.5k", "4k ", "4kb", "\uff14k", "9" * 400, ""])
def test_no_length(name):
    with pytest.raises(UserError, match=re.escape(repr(name))):
        babilong.length_tokens(name)


def write(path):
    """Writes ROWS in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    else:
        parquet.write_table(pyarrow.Table.from_pylist([{"extra": None, **row} for row in ROWS]), path)


NAMES = ["input", "question", "target"]
PLAIN = [{name: row[name] for name in NAMES} for row in ROWS]
CONTAINERS = {  # the names of pandas are those of its `orient`
    "lines": "\n".join(map(json.dumps, ROWS)),
    "lines with blank ones": "\n\n".join(map(json.dumps, ROWS)) + "\r\n",
    "indented": json.dumps(ROWS, indent=2),
    "lists": json.dumps({name: [row[name] for row in ROWS] for name in NAMES}),
    "wrapped": json.dumps({"version": 1, "data": ROWS}),
    "viewer": json.dumps({"rows": [{"row_idx": index, "row": row} for index, row in enumerate(ROWS)]}),
    "pandas columns": json.dumps({name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in NAMES}),
    "pandas index": json.dumps({str(i): row for i, row in enumerate(ROWS)}),
    "pandas split": json.dumps(
        {"columns": NAMES, "index": [0, 1], "data": [[row[name] for name in NAMES] for row in ROWS]}
    ),
    "pandas table": json.dumps(
        {"schema": {"fields": []}, "data": [{"index": i, **row} for i, row in enumerate(PLAIN)]}
    ),
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_rows_in_all_containers(tmp_path, container, encoding, suffix):
    path = tmp_path / f"qa1{suffix}"
    path.write_bytes(CONTAINERS[container].encode(encoding))
    assert babilong.read_samples(path) == SAMPLES


def test_one_row(tmp_path):
    path = tmp_path / "qa1.json"
    path.write_text(json.dumps(ROWS[0]))
    assert babilong.read_samples(path) == SAMPLES[:1]


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    path = tmp_path / "qa1.json"
    path.write_text(r'[{"input": "a \ud83d b \ud83d\ude00", "question": "\udc00?", "target": "x"}]')
    assert babilong.read_samples(path) == [Sample("a \ufffd b \U0001f600", "\ufffd?", "x")]


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
    (tmp_path / ".cache" / "8k").mkdir(parents=True)
    write(tmp_path / ".cache" / "8k" / "qa1.json")
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
    assert list(babilong.select_files(tmp_path, lengths=("2K", "1000k"))) == [
        ("qa2", "2k"),
        ("qa10", "2k"),
        ("qa1", "1M"),
    ]
    with pytest.raises(UserError, match=r"holds no 'qa5', only \['qa2', 'qa10'\]"):
        babilong.select_files(tmp_path, tasks=("qa5",), lengths=("2k",))
    with pytest.raises(UserError, match=r"holds no '4k', only \['0k', '2k', '16k', '1M'\]"):
        babilong.select_files(tmp_path, lengths=("4k",))
    with pytest.raises(UserError, match="'mmlu'"):
        babilong.select_files(tmp_path, tasks=("mmlu",))
    write(tmp_path / "0k/qa1.jsonl")
    with pytest.raises(UserError, match="one set in two files"):
        babilong.published_files(tmp_path)


@pytest.mark.parametrize(
    ("names", "lengths"),
    [
        (["data/qa1/0k.json", "data/qa1/16K.json"], ["0k", "16k"]),
        (["qa1/0k.json", "qa1/4096.json"], ["0k", "4096"]),
        (["0k/qa1-00000-of-00001.parquet"], ["0k"]),
        (["data/0k/qa1-00000-of-00001.parquet", "data/1m/QA1-00000-of-00001.parquet"], ["0k", "1M"]),
        (["0k/qa1/0000.parquet", "1k/qa1/0000.parquet"], ["0k", "1k"]),
        (["some/where/4k/qa1.JSON"], ["4k"]),
    ],
)
def test_layouts_of_the_hub(tmp_path, names, lengths):
    for name in names:
        write(tmp_path / name)
    found = babilong.select_files(tmp_path)
    assert list(found) == [("qa1", length) for length in lengths]
    assert all(read_set(files) == SAMPLES for files in found.values())


@pytest.mark.parametrize("pattern", ["0k/qa1-0000{}-of-00003.parquet", "0k/qa1/000{}.parquet"])
def test_shards_are_joined_in_order(tmp_path, pattern):
    for number in (2, 0, 1):
        path = tmp_path / pattern.format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist([{**ROWS[0], "input": f"part {number}"}]), path)
    (files,) = babilong.select_files(tmp_path).values()
    assert [sample.input for sample in read_set(files)] == ["part 0", "part 1", "part 2"]
    (tmp_path / pattern.format(1)).unlink()
    with pytest.raises(UserError, match="qa1 at 0k lacks shards"):
        babilong.published_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("4 k/qa1.json", "'qa1' without a length.*got '4 k'"),
        ("qa1/long.json", "'qa1' without a length.*got 'long'"),
        ("4k/qa21.json", "unknown task 'qa21'"),
        ("qa0/4k.json", "unknown task 'qa0'"),
    ],
)
def test_no_set_is_skipped(tmp_path, name, message):
    write(tmp_path / "0k/qa1.json")
    write(tmp_path / name)
    with pytest.raises(UserError, match=message):
        babilong.published_files(tmp_path)


def test_a_dangling_link_is_refused(tmp_path):
    (tmp_path / "0k").mkdir()
    (tmp_path / "0k" / "qa1.json").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"qa1\.json: not a file that can be read"):
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
        ("a.json", b"\xff\xfe\xfd", "not UTF-8 text", 1),
        ("a.json", b'[{"input": "caf\xe9"}]', "not UTF-8 text", 1),
        ("a.json", b'{"input": "x"}\n{"input": "y"}', "row 0: no field 'question'", 1),
        ("a.json", b'{"input": "x"}', "row 0: no field 'question'", 1),
        ("a.json", b'{"a": "x"}', "expected rows with ['input', 'question', 'target']", 1),
        ("a.json", b'{"input": ["x"], "question": [], "target": ["z"]}', "columns of different rows: [1, 0, 1]", 1),
        ("a.json", b'{"columns": ["input"], "data": [["x", "y"]]}', "row 0: expected a list of 1 values", 1),
        ("a.json", b"3", "expected a list of rows, got int", 1),
        ("a.json", b"[" * 100_000, "nested too deeply", 1),
        ("a.json", b"[" + b"9" * 5000 + b"]", "not valid JSON", 1),
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
