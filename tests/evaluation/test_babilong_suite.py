"""The suite from sets to files; the model's own words come from the tiny LM2, right ones from a stand-in."""

import dataclasses
import functools
import io
import json
import pathlib
import runpy
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import sentencepiece
import tokenizers
from lm2_jax.evaluation.generate import greedy

import lm2_jax
from lm2_jax.babilong import Sample
from lm2_jax.data import babilong_source
from lm2_jax.data.babilong_source import BabilongSource
from lm2_jax.data.text_tokens import Encoder
from lm2_jax.data.tokenizers import TokenizerConfig, build_tokenizer
from lm2_jax.errors import UserError
from lm2_jax.evaluation import SUITES
from lm2_jax.evaluation import babilong as suite
from lm2_jax.evaluation.babilong import Babilong, QuestionSet, evaluate, prompt_tokens

QA1 = [
    Sample("Mary went to the office.\nJohn left.", "Where is Mary? ", "office"),
    Sample("John went to the garden. " * 9, "Where is John? ", "garden"),
    Sample("Mary went to the kitchen.", "Where is Mary?", "kitchen"),
    Sample("Mary went to the hallway.", "Where is Mary?", "garden"),  # the stand-in will be wrong
]
QA7 = [Sample("Mary sits.", "How many objects is Mary carrying?", "none")]


@pytest.fixture(scope="module")
def run():
    """An untrained run, as `load_run` would give it."""
    config = lm2_jax.preset("lm2_tiny")
    model = lm2_jax.build_model(config.model)
    tokens = jnp.zeros((1, config.model.segment_tokens), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens, model.init_state(1))["params"]
    # Away from the start, where answers hardly depend on the text; much further and rounding would grow over segments.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    tokenizer = build_tokenizer(TokenizerConfig(kind="bytes"), list, config.model.vocab_size)
    return SimpleNamespace(
        config=config, model=model, params=jax.tree.unflatten(tree, leaves), tokenizer=tokenizer, step=7
    )


def test_greedy_answers_of_a_model(run):
    """Rows of unequal length, across segment borders, say what one call over the whole text says."""
    size = run.config.model.segment_tokens
    draw = np.random.default_rng(0)
    prompts = [draw.integers(3, 259, length).tolist() for length in (1, size, size + 1, 2 * size - 2, 3 * size + 3)]
    answers = greedy(run.model, run.params, run.tokenizer, prompts, 4, batch_rows=3)
    apply = jax.jit(run.model.apply)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 4:
            padded_BS = np.zeros((1, 4 * size), np.int32)
            padded_BS[0, : len(tokens)] = tokens
            valid_BS = np.arange(4 * size)[None] < len(tokens)
            logits_BSV, _ = apply({"params": run.params}, padded_BS, run.model.init_state(1), None, valid_BS)
            tokens.append(int(logits_BSV[0, len(tokens) - 1].argmax()))
        ids = tokens[len(prompt) :]
        ids = ids[: ids.index(run.tokenizer.eos_id)] if run.tokenizer.eos_id in ids else ids
        assert answer == run.tokenizer.decode(ids)
    assert len(set(answers)) > 1


def test_prompt(run):
    """Blanks are as in training, and the answer's marker ends it."""
    tokens = prompt_tokens(run.tokenizer, QA1[0])
    assert tokens[-1] == run.tokenizer.answer_id
    assert run.tokenizer.decode(tokens) == " Mary went to the office. John left. Where is Mary?"
    assert run.tokenizer.decode(prompt_tokens(run.tokenizer, Sample("", "Where?", "x"))) == " Where?"


@pytest.mark.parametrize("real", [False, True])
def test_built_sets(run, tmp_path, request, real):
    """Contexts have the length that was asked for, and prompts are what training rows begin with."""
    folders = {}
    if real:
        data = request.getfixturevalue("data_dir")
        folders = {"babi_dir": str(data / "babi" / "en-10k"), "books_dir": str(data / "books")}
    tasks = ("qa1", "qa8") if real else ("qa1", "qa2")
    command = Babilong(workdir=str(tmp_path), tasks=tasks, lengths=("0k", "1k"), samples=3, **folders)
    sets = list(command.sets(run))
    assert [(made.task, made.length, len(made.samples)) for made in sets] == [
        (tasks[0], "0k", 3),
        (tasks[1], "0k", 3),
        (tasks[0], "1k", 3),
        (tasks[1], "1k", 3),
    ]
    encode = Encoder(run.tokenizer)
    for short, long in zip(sets[:2], sets[2:], strict=True):
        assert [sample.target for sample in short.samples] == [sample.target for sample in long.samples]
        for sample in long.samples:
            tokens = prompt_tokens(run.tokenizer, sample)
            question = encode.question(sample.question)
            assert tokens[-len(question) :] == question
            assert 990 <= len(tokens) - len(question) <= 1000  # a cut sentence may end in a blank
    assert ("simulator" in command.data) != real


def test_defaults_of_built_sets(run, tmp_path):
    """The tasks that the run was trained on."""
    names = [(made.task, made.length) for made in Babilong(workdir=str(tmp_path), samples=1).sets(run)]
    assert names == [("qa1", "0k"), ("qa1", "1k"), ("qa1", "2k"), ("qa1", "4k")]


def sentencepiece_file(path, texts, **options):
    """A model as SentencePiece makes them by default, or with `options`."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(texts), model_writer=out, vocab_size=300, model_type="bpe", minloglevel=2, **options
    )
    path.write_bytes(out.getvalue())
    return TokenizerConfig(kind="sentencepiece", path=str(path))


def json_file(path, texts):
    """The same kind of tokenizer as the `tokenizers` JSON of Llama 2 has it."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    blanks = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    inner.normalizer = tokenizers.normalizers.Sequence(blanks)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    back = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)]
    inner.decoder = tokenizers.decoders.Sequence(back)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], show_progress=False)
    inner.train_from_iterator(texts, trainer)
    inner.save(str(path))
    return TokenizerConfig(kind="json", path=str(path))


TOKENIZERS = {
    "bpe": lambda path, texts: TokenizerConfig(),
    "sentencepiece": sentencepiece_file,
    "llama2": functools.partial(sentencepiece_file, normalization_rule_name="identity", remove_extra_whitespaces=False),
    "llama2_json": json_file,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_prompt_is_a_training_row(kind, tmp_path, monkeypatch):
    """The tokens of a sample are those that `question_last` trains on, under any tokenizer that merges."""
    monkeypatch.setattr(babilong_source, "_CORPUS_CHARACTERS", 10_000)
    source = BabilongSource(tasks=("qa1", "qa4"), layout="question_last", plain_fraction=1.0)
    texts = [text.strip() for text in source.corpus(0)] + ["Answer:"]
    tokenizer = build_tokenizer(TOKENIZERS[kind](tmp_path / "file", texts), lambda: texts, 400)
    assert sum(len(tokenizer.encode(text)) for text in texts) < sum(map(len, texts)) / 2
    if kind != "bpe":  # whose bytes leave no room for whole words here
        BabilongSource().build(tokenizer, 32, 0)  # refuses answers of several tokens
    rows = source.build(tokenizer, 32, 0)
    for number in range(5):
        example = rows.example(0, number, 5, 6, held_out=True)
        marker = int(np.argmax(example.answer))
        text = tokenizer.decode(example.tokens[: marker + 1].tolist()).strip().removesuffix(" Answer:")
        told, asked = text.rsplit(". ", 1)
        sample = Sample(f"{told}.", asked, "")
        assert prompt_tokens(tokenizer, sample) == example.tokens[: marker + 1].tolist()


@pytest.fixture
def oracle(monkeypatch):
    """Answers in place of a model's: the last word of the first sentence, cut to `max_new_tokens` letters."""

    def answers(model, params, tokenizer, prompts, max_new_tokens, batch_rows):
        assert batch_rows == 3
        texts = [tokenizer.decode(list(prompt)) for prompt in prompts]
        said = [" none." if "many" in text else f" {text.split('.')[0].split()[-1]}." for text in texts]
        return [text[:max_new_tokens] for text in said]

    monkeypatch.setattr(suite, "greedy", answers)


def test_evaluate(run, oracle):
    seen = []
    sets = iter([QuestionSet("qa1", "0k", QA1), QuestionSet("qa7", "0k", QA7)])
    found = evaluate(run, sets, batch_rows=3, max_new_tokens=8, on_result=seen.append)
    assert seen == found.results
    first, second = found.results
    assert (first.task, first.length, first.samples) == ("qa1", "0k", 4)
    assert (first.accuracy, first.accuracy_strict) == (0.75, 0.75)
    assert (second.accuracy, second.accuracy_strict) == (0.0, 1.0)  # the official verdict on "none"
    assert first.mean_tokens == np.mean([len(prompt_tokens(run.tokenizer, sample)) for sample in QA1])
    assert [answer.output for answer in found.answers] == [" office.", " garden.", " kitchen", " hallway", " none."]
    assert [answer.correct for answer in found.answers] == [True, True, True, False, False]


def test_empty_set(run):
    with pytest.raises(UserError, match="the set qa1 at 0k holds no samples"):
        evaluate(run, [QuestionSet("qa1", "0k", [])])


@pytest.fixture
def published(tmp_path):
    for length in ("1k", "0k"):
        folder = tmp_path / "published" / length
        folder.mkdir(parents=True)
        (folder / "qa1.json").write_text(json.dumps([sample._asdict() for sample in QA1]))
        (folder / "qa7.jsonl").write_text(json.dumps(QA7[0]._asdict()))
    return tmp_path / "published"


@pytest.fixture
def command(run, monkeypatch, tmp_path, published):
    """The suite's command for a run in tmp_path."""
    monkeypatch.setattr(lm2_jax, "load_run", lambda workdir: run)
    return Babilong(workdir=str(tmp_path), data_dir=str(published), batch_rows=3)


def test_report(command, oracle, tmp_path, capsys):
    command.main()
    out = tmp_path / "eval"
    assert sorted(path.name for path in out.iterdir()) == [
        "answers.jsonl",
        "babilong.json",
        "babilong.md",
        "babilong.png",
    ]
    document = json.loads((out / "babilong.json").read_text())
    assert {name: document[name] for name in ("suite", "preset", "step", "segment_tokens")} == {
        "suite": "babilong",
        "preset": "lm2_tiny",
        "step": 7,
        "segment_tokens": 32,
    }
    assert [
        (r["task"], r["length"], r["accuracy"], r["accuracy_strict"], r["samples"]) for r in document["results"]
    ] == [
        ("qa1", "0k", 0.75, 0.75, 4),
        ("qa7", "0k", 0.0, 1.0, 1),
        ("qa1", "1k", 0.75, 0.75, 4),
        ("qa7", "1k", 0.0, 1.0, 1),
    ]
    assert all(result["mean_tokens"] > 30 for result in document["results"])
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 10
    assert answers[4]["output"] == " none."
    assert (answers[4]["correct"], answers[4]["correct_strict"]) == (False, True)
    table = (out / "babilong.md").read_text()
    assert "| qa1 | 75.0 / 75.0 | 75.0 / 75.0 |" in table
    assert "| qa7 | 0.0 / 100.0 | 0.0 / 100.0 |" in table
    pixels = matplotlib.image.imread(io.BytesIO((out / "babilong.png").read_bytes()), format="png")
    assert min(pixels.shape[:2]) > 300
    assert pixels.std() > 0.1
    printed = capsys.readouterr().out
    assert "official verdict" in printed
    assert str(out / "babilong.png") in printed


def test_selection(command, oracle, tmp_path):
    out = tmp_path / "else" / "where"
    dataclasses.replace(command, tasks=("qa1",), lengths=("1k",), samples=2, out=str(out)).main()
    (result,) = json.loads((out / "babilong.json").read_text())["results"]
    assert (result["task"], result["length"], result["samples"]) == ("qa1", "1k", 2)
    assert not (tmp_path / "eval").exists()


def test_untrained_model(command, tmp_path):
    """The whole way with a real model, whose answers are wrong."""
    dataclasses.replace(command, tasks=("qa1",), lengths=("0k",), samples=3, max_new_tokens=3).main()
    (result,) = json.loads((tmp_path / "eval" / "babilong.json").read_text())["results"]
    assert (result["samples"], result["accuracy"], result["accuracy_strict"]) == (3, 0.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("qa3",)}, "holds no 'qa3'"),
        ({"lengths": ("64k",)}, "holds no '64k'"),
        ({"tasks": ("qa99",)}, "'qa99'"),
        ({"data_dir": "nowhere"}, "no such folder"),
        ({"data_dir": None, "babi_dir": "nowhere"}, "babi_dir='nowhere': no such folder"),
        ({"data_dir": None, "books_dir": "nowhere"}, "books_dir='nowhere': no such folder"),
        ({"data_dir": None, "lengths": ("4K",)}, "'4K'"),
    ],
)
def test_a_mistake_writes_nothing(command, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(command, **changes).main()
    assert not (tmp_path / "eval").exists()


def test_a_damaged_set_keeps_the_old_report(command, oracle, tmp_path, published):
    command.main()
    before = {path.name: path.read_bytes() for path in (tmp_path / "eval").iterdir()}
    (published / "1k" / "qa7.jsonl").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        command.main()
    assert {path.name: path.read_bytes() for path in (tmp_path / "eval").iterdir()} == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"batch_rows": 0}, "batch_rows"),
        ({"data_dir": "a", "books_dir": "b"}, "data_dir holds finished sets"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Babilong(workdir="w", **fields)


def test_registered():
    assert SUITES["babilong"] is Babilong


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["babilong", "--workdir", "nowhere"], 2, "error: nowhere: no run there"),
        (["babilong"], 2, "--workdir"),
        (["babilong", "--workdir", "w", "--samples", "many"], 2, "samples"),
        (["babilong", "--workdir", "w", "--samples", "0"], 2, "samples must be at least 1, got 0"),
        (["babilong", "--workdir", "w", "--lenghts", "1k"], 2, "--lengths"),
        (["babilon"], 2, "babilong"),
        ([], 2, "babilong"),
    ],
)
def test_command_line(monkeypatch, capsys, tmp_path, arguments, status, message):
    """A mistake ends `eval.py` with a status and a message, and leaves nothing behind."""
    script = pathlib.Path(__file__).parents[2] / "eval.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(script), *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(script), run_name="__main__")
    assert caught.value.code == status
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []
