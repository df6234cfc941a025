"""The suite from sets to files, with the answers of the tiny LM2 or those of a stand-in that knows them."""

import dataclasses
import functools
import io
import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import sentencepiece
import tokenizers
from etils import epath

import lm2_jax
from lm2_jax.babilong import Sample
from lm2_jax.data import babilong_source
from lm2_jax.data.babilong_source import BabilongSource
from lm2_jax.data.text_tokens import Encoder
from lm2_jax.data.tokenizers import TokenizerConfig, build_tokenizer
from lm2_jax.errors import UserError
from lm2_jax.evaluation import SUITES
from lm2_jax.evaluation.answerer import Answer, Prompt, RunAnswerer
from lm2_jax.evaluation.answers import AnswerLog
from lm2_jax.evaluation.babilong import Asking, Babilong, evaluate
from lm2_jax.evaluation.gpt2 import find_gpt2
from lm2_jax.evaluation.questions import QuestionSet
from lm2_jax.runs import Run

QA1 = [
    Sample("Mary went to the office.\nJohn left.", "Where is Mary? ", "office"),
    Sample("John went to the garden. " * 9, "Where is John? ", "garden"),
    Sample("Mary went to the kitchen.", "Where is Mary?", "kitchen"),
    Sample("Mary went to the hallway.", "Where is Mary?", "garden"),  # the stand-in is wrong here
]
QA7 = [Sample("Mary sits.", "How many objects is Mary carrying?", "none")]


def prompt_tokens(tokenizer, sample):
    return Prompt(tokenizer, sample.input, sample.question).tokens.tolist()


@pytest.fixture(scope="module")
def run():
    """An untrained run, as `load_run` gives it."""
    return untrained_run("lm2_tiny")


def untrained_run(preset):
    config = lm2_jax.preset(preset)
    model = lm2_jax.build_model(config.model)
    tokens = jnp.zeros((1, config.model.segment_tokens), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens, model.init_state(1))["params"]
    # Away from the start, where answers hardly depend on the text; much further and rounding would grow over segments.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    tokenizer = build_tokenizer(TokenizerConfig(kind="bytes"), list, config.model.vocab_size)
    return Run(config, model, jax.tree.unflatten(tree, leaves), tokenizer, 7)


def texts_of(run, lengths):
    """Texts of so many tokens: the tokenizer's are bytes."""
    draw = np.random.default_rng(0)
    return ["".join(chr(97 + letter) for letter in draw.integers(0, 26, length)) for length in lengths]


def logits_of(run, ids):
    """The logits of one call over a text."""
    size = run.config.model.segment_tokens
    padded_BS = np.zeros((1, 4 * size), np.int32)
    padded_BS[0, : len(ids)] = ids
    valid_BS = np.arange(4 * size)[None] < len(ids)
    inputs = (jnp.asarray(padded_BS), run.model.init_state(1), None, jnp.asarray(valid_BS))
    return np.asarray(jitted(run.model)({"params": run.params}, *inputs)[0][0, : len(ids)], np.float64)


@functools.cache
def jitted(model):
    return jax.jit(model.apply)


def test_greedy_answers_of_a_model(run):
    """Rows of unequal length, across segment borders, say what one call over the text says."""
    size = run.config.model.segment_tokens
    prompts = [Prompt(run.tokenizer, text) for text in texts_of(run, (1, size, size + 1, 2 * size - 2, 3 * size + 3))]
    given = {answer.number: answer.text for answer in RunAnswerer(run).answers(prompts, 4, rows=3)}
    answers = [given[number] for number in range(len(prompts))]
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = prompt.tokens.tolist()
        while len(tokens) < len(prompt.tokens) + 4:
            tokens.append(int(logits_of(run, tokens)[-1].argmax()))
        ids = tokens[len(prompt.tokens) :]
        ids = ids[: ids.index(run.tokenizer.eos_id)] if run.tokenizer.eos_id in ids else ids
        assert answer == run.tokenizer.decode(ids)
    assert len(set(answers)) > 1


def test_loglikelihood(run):
    """The log-probabilities of the continuation's tokens in one call over the text."""
    size = run.config.model.segment_tokens
    texts = texts_of(run, (1, size, 2 * size + 3))
    pairs = [(Prompt(run.tokenizer, text), end) for text, end in zip(texts, ("a", "hello", "x" * size), strict=True)]
    found = RunAnswerer(run).loglikelihood(pairs)
    for (prompt, end), value in zip(pairs, found, strict=True):
        ids = [*prompt.tokens.tolist(), *run.tokenizer.encode(end)]
        logits_SV = logits_of(run, ids)
        logs_SV = logits_SV - np.log(np.exp(logits_SV).sum(-1, keepdims=True))
        wanted = sum(logs_SV[at - 1, ids[at]] for at in range(len(prompt.tokens), len(ids)))
        assert value == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(ValueError, match="empty"):
        RunAnswerer(run).loglikelihood([(Prompt(run.tokenizer, "a"), "")])


def test_prompt(run):
    """Blanks are as in training, and the marker of an answer is last."""
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
    command = Babilong(workdir=str(tmp_path), tasks=tasks, lengths=("0K", "1k"), samples=3, count_in="own", **folders)
    sets = command.sets(RunAnswerer(run), None)
    assert [(made.task, made.length, len(made.samples())) for made in sets] == [
        (tasks[0], "0k", 3),
        (tasks[1], "0k", 3),
        (tasks[0], "1k", 3),
        (tasks[1], "1k", 3),
    ]
    encode = Encoder(run.tokenizer)
    for short, long in zip(sets[:2], sets[2:], strict=True):
        assert [sample.target for sample in short.samples()] == [sample.target for sample in long.samples()]
        for sample in long.samples():
            tokens = prompt_tokens(run.tokenizer, sample)
            question = encode.question(sample.question)
            assert tokens[-len(question) :] == question
            assert 990 <= len(tokens) - len(question) <= 1000  # a cut sentence may end in a blank
    assert ("simulated" in command.data(None)) != real


def test_lengths_in_gpt2_tokens(run, tmp_path, data_dir):
    """Contexts have the length in the tokens of the published sets, and both lengths are reported."""
    gpt2 = find_gpt2(str(data_dir / "tokenizers" / "gpt2"))
    assert gpt2.encode("Hello world") == [15496, 995]  # as published
    command = Babilong(workdir=str(tmp_path), tasks=("qa1",), lengths=("1k",), samples=2)
    (made,) = command.sets(RunAnswerer(run), gpt2)
    for sample in made.samples():
        assert 990 <= len(gpt2.encode(" " + sample.input)) <= 1000
        assert len(prompt_tokens(run.tokenizer, sample)) > 2500, "bytes"
    assert command.data(gpt2).endswith("lengths in GPT-2 tokens")
    with pytest.raises(UserError, match="gpt2_dir='nowhere'"):
        find_gpt2("nowhere")


def test_defaults_of_built_sets(run, tmp_path):
    """The tasks that the run was trained on."""
    sets = Babilong(workdir=str(tmp_path), samples=1).sets(RunAnswerer(run), None)
    names = [(made.task, made.length) for made in sets]
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
    if kind != "bpe":  # whose bytes leave no room for complete words here
        BabilongSource().build(tokenizer, 32, 0)  # refuses answers of several tokens
    rows = source.build(tokenizer, 32, 0)
    for number in range(5):
        example = rows.example(0, number, 5, 6, held_out=True)
        marker = int(np.argmax(example.answer))
        text = tokenizer.decode(example.tokens[: marker + 1].tolist()).strip().removesuffix(" Answer:")
        facts, question = text.rsplit(". ", 1)
        sample = Sample(f"{facts}.", question, "")
        assert prompt_tokens(tokenizer, sample) == example.tokens[: marker + 1].tolist()


class Oracle:
    """Answers in place of a model's: the last word of the first sentence, cut to `max_new_tokens` letters.

    Args:
      most: answers before it is interrupted.
    """

    def __init__(self, most=10**9):
        self.asked, self.most = 0, most

    def answers(self, prompts, max_new_tokens, rows):
        assert rows <= 3
        for number, prompt in enumerate(prompts):
            if self.asked == self.most:
                raise KeyboardInterrupt
            self.asked += 1
            text = prompt.tokenizer.decode(prompt.tokens.tolist())
            said = " none." if "many" in text else f" {text.split('.')[0].split()[-1]}."
            yield Answer(number, prompt, said[:max_new_tokens])

    def loglikelihood(self, pairs):
        raise NotImplementedError


@pytest.fixture
def oracle(monkeypatch):
    """Puts the stand-in in the place of every model; `oracle()` gives the newest."""
    made = []

    def use(most=10**9):
        made.append(Oracle(most))
        monkeypatch.setattr(RunAnswerer, "answers", lambda self, *args, **options: made[-1].answers(*args, **options))
        return made[-1]

    use()
    return use


def asking(run, tmp_path, **options):
    log = AnswerLog(epath.Path(tmp_path) / "answers.jsonl", {})
    return Asking(Oracle(), run.tokenizer, log, batch_rows=3, **options)


def test_evaluate(run, tmp_path):
    seen = []
    sets = iter([QuestionSet("qa1", "0k", lambda: QA1), QuestionSet("qa7", "0k", lambda: QA7)])
    asked = asking(run, tmp_path, max_new_tokens=8)
    results, ids = evaluate(asked, sets, lambda result, seconds: seen.append(result))
    assert seen == results
    first, second = results
    assert (first.task, first.length, first.samples) == ("qa1", "0k", 4)
    assert (first.accuracy, first.accuracy_strict) == (0.75, 0.75)
    assert (second.accuracy, second.accuracy_strict) == (0.0, 1.0)  # the official verdict on "none"
    assert first.mean_tokens == np.mean([len(prompt_tokens(run.tokenizer, sample)) for sample in QA1])
    assert first.mean_gpt2_tokens is None
    answers = [asked.log[id] for id in ids]
    assert [answer["output"] for answer in answers] == [" office.", " garden.", " kitchen", " hallway", " none."]
    assert [answer["correct"] for answer in answers] == [True, True, True, False, False]


def test_empty_set(run, tmp_path):
    with pytest.raises(UserError, match="the set qa1 at 0k holds no samples"):
        asking(run, tmp_path).ask(QuestionSet("qa1", "0k", list))


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
    monkeypatch.setattr(RunAnswerer, "load", lambda workdir, layout_of=None: RunAnswerer(run, workdir=workdir))
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
    assert all("mean_gpt2_tokens" in result for result in document["results"])
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
    """From the files to the report with a real model, whose answers are wrong."""
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
        ({"data_dir": None, "lengths": ("4x",)}, "'4x'"),
        ({"data_dir": None, "count_in": "gpt2", "gpt2_dir": "nowhere"}, "gpt2_dir='nowhere'"),
    ],
)
def test_a_mistake_writes_nothing(command, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(command, **changes).main()
    assert not (tmp_path / "eval").exists()


def test_a_damaged_set_keeps_the_old_report(command, oracle, tmp_path, published):
    command.main()
    before = contents(tmp_path / "eval")
    (published / "1k" / "qa7.jsonl").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        command.main()
    assert contents(tmp_path / "eval") == before


def test_a_damaged_set_is_found_before_the_first_question(command, oracle, tmp_path, published):
    (published / "1k" / "qa7.jsonl").write_text("{")
    model = oracle()
    with pytest.raises(UserError, match="not valid JSON"):
        command.main()
    assert model.asked == 0
    assert not (tmp_path / "eval").exists()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("most", [0, 2, 5])
def test_an_interrupted_evaluation_resumes(command, oracle, tmp_path, most):
    """Answers are on the disk when they are given; the second call asks only the rest and gives equal files."""
    command.main()
    wanted = contents(tmp_path / "eval")
    out = tmp_path / "again"
    again = dataclasses.replace(command, out=str(out))
    oracle(most)
    with pytest.raises(KeyboardInterrupt):
        again.main()
    kept = (out / "answers.jsonl").read_text().splitlines() if most else []
    assert len(kept) == most
    if most:
        with (out / "answers.jsonl").open("a") as file:
            file.write('{"id": "half a li')  # a kill in the middle of a write
    model = oracle()
    again.main()
    assert model.asked == 10 - len(kept)
    assert contents(out) == wanted
    model = oracle()
    again.main()
    assert model.asked == 0
    assert contents(out) == wanted
    dataclasses.replace(again, resume=False).main()
    assert model.asked == 10


def test_answers_of_another_evaluation_are_not_used(command, oracle, run, tmp_path, monkeypatch):
    """Other weights, other options: all questions are asked, and old answers stay until the new ones are complete."""
    command.main()
    old = (tmp_path / "eval" / "answers.jsonl").read_text()
    oracle(1)
    with pytest.raises(KeyboardInterrupt):
        dataclasses.replace(command, max_new_tokens=8).main()
    assert (tmp_path / "eval" / "answers.jsonl").read_text().startswith(old)
    other = run._replace(params=jax.tree.map(lambda leaf: leaf + 1, run.params))
    monkeypatch.setattr(RunAnswerer, "load", lambda workdir, layout_of=None: RunAnswerer(other, workdir=workdir))
    model = oracle()
    command.main()
    assert model.asked == 10
    assert len((tmp_path / "eval" / "answers.jsonl").read_text().splitlines()) == 10


def test_a_damaged_line_is_asked_again(command, oracle, tmp_path):
    command.main()
    file = tmp_path / "eval" / "answers.jsonl"
    wanted = file.read_text()
    lines = wanted.splitlines(keepends=True)
    file.write_text("".join([lines[0], "nonsense\n", *lines[2:]]))
    model = oracle()
    command.main()
    assert model.asked > 0
    assert file.read_text() == wanted


def test_baseline(command, oracle, run, tmp_path, monkeypatch):
    """Both models answer the same questions, and are shown next to each other."""
    runs = {"lm2": run, "none": untrained_run("none_tiny")}
    monkeypatch.setattr(RunAnswerer, "load", lambda workdir, layout_of=None: RunAnswerer(runs[workdir]))
    dataclasses.replace(command, workdir="lm2", baseline="none", out=str(tmp_path / "both")).main()
    document = json.loads((tmp_path / "both" / "babilong.json").read_text())
    assert (document["preset"], document["baseline"]["preset"]) == ("lm2_tiny", "none_tiny")
    assert document["baseline"]["model"] == "baseline (no memory)"
    assert [r["accuracy"] for r in document["baseline"]["results"]] == [r["accuracy"] for r in document["results"]]
    table = (tmp_path / "both" / "babilong.md").read_text()
    assert table.count("| qa1 | 75.0 / 75.0 | 75.0 / 75.0 |") == 2
    assert len((tmp_path / "both" / "answers_baseline.jsonl").read_text().splitlines()) == 10


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
    """A mistake ends `eval.py` with a status and a message, and leaves no files."""
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
