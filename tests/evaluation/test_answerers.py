"""Retrieval and recurrent prompts around a run: what it reads, in which order, and what a suite makes of it."""

import dataclasses
import json

import numpy as np
import pytest

from lm2_jax import UserError
from lm2_jax.commands import eval as program
from lm2_jax.config import from_dict, to_dict
from lm2_jax.evaluation.answerer import Answer, Answerer, Prompt, RunAnswerer
from lm2_jax.evaluation.answerers import AnswererConfig, Direct
from lm2_jax.evaluation.babilong import Babilong
from lm2_jax.evaluation.recurrent_prompt import RecurrentPrompt
from lm2_jax.evaluation.retrieval import Bm25, Embeddings, Rag
from tests.data.reading import WordTokenizer
from tests.inference.subjects import text_of, tiny_run

FACTS = ("Mary went to the office.", "Daniel took the apple.", "Mary travelled to the garden.")
NOISE = ("The fox slept.", "Rain fell on the mill for days.", "Nobody answered.", "A heron stood in the river.")
CONTEXT = " ".join([NOISE[0], FACTS[0], NOISE[1], FACTS[1], NOISE[2], FACTS[2], NOISE[3]])


@pytest.fixture(scope="module")
def run():
    return tiny_run("none_tiny")


class Echo:
    """Answers each prompt with the text that it read, and keeps what it was asked.

    Args:
      most: prompts that it takes before it is interrupted.
    """

    def __init__(self, most=10**9):
        self.asked, self.most = [], most

    def answers(self, prompts, max_new_tokens, rows):
        assert rows >= 1
        found = []
        for number, prompt in enumerate(prompts):
            if len(self.asked) == self.most:
                raise KeyboardInterrupt
            self.asked.append(prompt)
            text = prompt.tokenizer.decode(prompt.tokens.tolist())
            found.append(Answer(number, prompt, " ".join(text.split()[-max_new_tokens:])))
        yield from reversed(found)  # answers come in any order

    def loglikelihood(self, pairs):
        return [float(len(prompt.tokens)) for prompt, _ in pairs]


def read_by(config, prompts, rows=2, max_new_tokens=10**6):
    """The answers in the order of the prompts, and what was asked."""
    echo = Echo()
    given = {a.number: a for a in config.build(echo).answers(iter(prompts), max_new_tokens, rows)}
    assert [given[number].prompt for number in range(len(prompts))] == prompts
    return [given[number].text for number in range(len(prompts))], echo.asked


# Retrieval


def test_chunks():
    assert Rag().chunks(CONTEXT.replace(" Mary", "\nMary")) == [
        *(NOISE[0], FACTS[0], NOISE[1], FACTS[1], NOISE[2], FACTS[2], NOISE[3]),
    ]
    assert Rag(chunk_size=3).chunks(CONTEXT)[-1] == NOISE[3]
    assert Rag(chunk="words", chunk_size=2).chunks("a b\n c  d e") == ["a b", "c d", "e"]
    assert Rag().chunks(" \n") == []


def test_bm25_finds_the_chunks_of_the_question_and_keeps_their_order():
    pytest.importorskip("bm25s")
    rag = Rag(top_k=2)
    scores = rag.scorer.open()
    assert rag.select("Where is Mary?", CONTEXT, scores) == [FACTS[0], FACTS[2]]
    assert rag.select("Where is the apple?", CONTEXT, scores)[-1] == FACTS[1]
    assert dataclasses.replace(rag, top_k=1).select("Who took the apple?", CONTEXT, scores) == [FACTS[1]]
    assert rag.select("Which xylophone?", CONTEXT, scores) == [NOISE[0], FACTS[0]], "no word fits: the first ones"
    assert rag.select("Is it?", CONTEXT, scores) == [NOISE[0], FACTS[0]], "stop words only"
    assert rag.select("Where?", "", scores) == []


def test_bm25_is_okapi():
    """Scores are the formula's, worked out here: idf times the saturated count, for the words that occur."""
    pytest.importorskip("bm25s")
    chunks = ["apple apple pear", "pear plum", "plum fig grape melon"]
    k1, b, average = 1.5, 0.75, 3.0
    words = [chunk.split() for chunk in chunks]

    def expected(word, chunk):
        holds = sum(word in other for other in words)
        idf = np.log(1 + (len(words) - holds + 0.5) / (holds + 0.5))
        count = chunk.count(word)
        return idf * count / (count + k1 * (1 - b + b * len(chunk) / average))

    found = Bm25().open()("apple plum", chunks)
    wanted = [expected("apple", chunk) + expected("plum", chunk) for chunk in words]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_run_reads_exactly_the_chunks_and_the_template_keeps_its_order(run):
    pytest.importorskip("bm25s")
    rag, tokenizer = Rag(top_k=2), WordTokenizer()
    prompt = Prompt(tokenizer, CONTEXT, "Where is Mary?", "Answer in one word.\n\nExample: where? here.")
    (text,), _ = read_by(rag, [prompt])
    assert text == f"Answer in one word. Example: where? here. {FACTS[0]} {FACTS[2]} Where is Mary?"
    prompt = Prompt(run.tokenizer, CONTEXT, "Where is Mary?")
    by_hand = Prompt(run.tokenizer, f"{FACTS[0]} {FACTS[2]}", "Where is Mary?")
    (answer,) = rag.build(RunAnswerer(run)).answers([prompt], 6, rows=2)
    (wanted,) = RunAnswerer(run).answers([by_hand], 6, rows=2)
    assert (answer.text, answer.prompt) == (wanted.text, prompt)
    pairs = [(prompt, " here"), (dataclasses.replace(prompt, question="Where is the apple?"), " there")]
    chunks = " ".join(rag.select("Where is the apple?", CONTEXT, rag.scorer.open()))
    short = [by_hand, dataclasses.replace(pairs[1][0], context=chunks)]
    assert rag.build(Echo()).loglikelihood(pairs) == [float(len(prompt.tokens)) for prompt in short]


def test_retrieval_takes_prompts_as_there_is_room():
    """Prompts of any number are not held at the same time."""
    pytest.importorskip("bm25s")
    taken = []

    def prompts():
        for number in range(5):
            taken.append(number)
            yield Prompt(WordTokenizer(), CONTEXT, "Where is Mary?")

    class Lazy(Echo):
        def answers(self, prompts, max_new_tokens, rows):
            for number, prompt in enumerate(prompts):
                assert len(taken) == number + 1
                yield Answer(number, prompt, "")

    assert len(list(Rag().build(Lazy()).answers(prompts(), 1, rows=1))) == 5


def test_retrieval_needs_a_question():
    pytest.importorskip("bm25s")
    with pytest.raises(ValueError, match="needs prompts with a question"):
        list(Rag().build(Echo()).answers([Prompt(WordTokenizer(), CONTEXT)], 1, rows=1))


def test_embeddings_of_a_small_model(tmp_path):
    """Words that share a vector find each other; the identity is that of the files."""
    model2vec = pytest.importorskip("model2vec")
    import tokenizers

    words = ["[UNK]", "cat", "kitten", "stone", "river", "where", "the", "is"]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.normalizer = tokenizers.normalizers.Lowercase()
    vectors = np.zeros((8, 3), np.float32)
    vectors[1], vectors[2], vectors[3], vectors[4] = (1, 0, 0), (0.9, 0.1, 0), (0, 1, 0), (0, 0, 1)
    model2vec.StaticModel(vectors, inner).save_pretrained(str(tmp_path / "a"))
    model2vec.StaticModel(vectors * 2, inner).save_pretrained(str(tmp_path / "b"))
    rag = Rag(top_k=1, scorer=Embeddings(model=str(tmp_path / "a")))
    scores = rag.scorer.open()
    assert rag.select("where is the cat", "The stone. The kitten. The river.", scores) == ["The kitten."]
    found = scores("cat", ["kitten", "stone", "unknown words"])
    np.testing.assert_allclose(found, [0.9 / np.hypot(0.9, 0.1), 0, 0], atol=1e-6)
    (tmp_path / "a").rename(tmp_path / "c")
    moved = Rag(top_k=1, scorer=Embeddings(model=str(tmp_path / "c")))
    other = Rag(top_k=1, scorer=Embeddings(model=str(tmp_path / "b")))
    assert moved.identity()["answerer"]["scorer"] != other.identity()["answerer"]["scorer"]
    assert str(tmp_path) not in json.dumps(moved.identity())
    (tmp_path / "c" / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="no model that model2vec reads"):
        moved.build(Echo())


@pytest.mark.parametrize(
    ("scorer", "package", "extra"),
    [(Bm25(), "bm25s", "rag"), (Embeddings(model="."), "model2vec", "embeddings")],
)
def test_a_package_that_is_not_installed(scorer, package, extra, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UserError, match=rf"needs the package {package}.*pip install {package} \(extra \[{extra}\]\)"):
        Rag(scorer=scorer).build(Echo())


# Recurrent prompts


def test_segments():
    tokenizer = WordTokenizer()
    config = RecurrentPrompt(segment_tokens=3)
    assert config.segments(tokenizer, "a b\nc d  e") == ["a b c", "d e"]
    assert config.segments(tokenizer, "one. two. three.") == ["one.", "two.", "three."], "a word and its stop"
    assert RecurrentPrompt(segment_tokens=1).segments(tokenizer, "one. two") == ["one.", "two"]
    assert config.segments(tokenizer, "  ") == [""]


def test_the_summary_is_read_before_the_next_segment():
    """The stand-in's summary is the end of what it read, so the requests show what was put where."""
    tokenizer = WordTokenizer()
    config = RecurrentPrompt(segment_tokens=2, summary_tokens=3, ask="Sum:")
    prompts = [
        Prompt(tokenizer, "a b c d e", "Where?", "Be brief."),
        Prompt(tokenizer, "f g", "Who?"),
        Prompt(tokenizer, "h i j", "What?"),
    ]
    texts, asked = read_by(config, prompts)
    shown = [tokenizer.decode(prompt.tokens.tolist()).strip() for prompt in asked]
    assert shown == [
        "a b Sum:",
        "a b Sum: c d Sum:",
        "Be brief. c d Sum: e Where?",
        "f g Who?",
        "h i Sum:",
        "h i Sum: j What?",
    ]
    assert texts == ["Be brief. c d Sum: e Where?", "f g Who?", "h i Sum: j What?"]
    _, asked = read_by(dataclasses.replace(config, shows_question=True), prompts[2:])
    assert tokenizer.decode(asked[0].tokens.tolist()).strip() == "h i What? Sum:"
    assert config.build(Echo()).loglikelihood([(prompts[1], "x")]) == [float(len(prompts[1].tokens))]


def test_a_run_summarises_and_answers_the_same_for_any_batch(run):
    """Each step by hand with the run alone; and prompts do not depend on those read at the same time."""
    config = RecurrentPrompt(segment_tokens=40, summary_tokens=5, ask="Sum:")
    prompts = [Prompt(run.tokenizer, text_of(n), "Where is the key?") for n in (110, 20, 70)]
    given = {a.number: a.text for a in config.build(RunAnswerer(run)).answers(prompts, 4, rows=2)}
    alone = RunAnswerer(run)
    for number, prompt in enumerate(prompts):
        summary, segments = "", config.segments(run.tokenizer, prompt.context)
        for segment in segments[:-1]:
            request = Prompt(run.tokenizer, f" {summary} {segment} Sum:".replace("  ", " "))
            (answer,) = alone.answers([request], 5, rows=1)
            summary = " ".join(answer.text.split())
        (answer,) = alone.answers([dataclasses.replace(prompt, context=f"{summary} {segments[-1]}")], 4, rows=1)
        assert given[number] == answer.text
    assert [len(config.segments(run.tokenizer, prompt.context)) for prompt in prompts] == [3, 1, 2]
    (direct,) = Direct().build(alone).answers([prompts[1]], 4, rows=1)
    assert given[1] == direct.text, "one segment is read as it is"


# In a suite


@pytest.fixture
def suite(run, monkeypatch, tmp_path):
    """BABILong on a small published set, for a run in tmp_path."""
    monkeypatch.setattr(RunAnswerer, "load", lambda workdir, layout_of=None: RunAnswerer(run, workdir=workdir))
    folder = tmp_path / "published" / "0k"
    folder.mkdir(parents=True)
    rows = [{"input": CONTEXT, "question": f"Where is {who}?", "target": "garden"} for who in ("Mary", "John", "Bill")]
    (folder / "qa1.json").write_text(json.dumps(rows))
    return Babilong(workdir=str(tmp_path / "run"), data_dir=str(tmp_path / "published"), batch_rows=2, max_new_tokens=3)


RECURRENT = RecurrentPrompt(segment_tokens=60, summary_tokens=4)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("config", [Rag(top_k=2), RECURRENT], ids=lambda config: config.kind)
def test_a_suite_names_the_row_and_resumes(config, suite, monkeypatch, tmp_path):
    if isinstance(config, Rag):
        pytest.importorskip("bm25s")
    suite = dataclasses.replace(suite, answerer=config, out=str(tmp_path / "a"))
    suite.main()
    wanted = files(tmp_path / "a")
    document = json.loads(wanted["babilong.json"])
    assert document["model"] == config.label("baseline (no memory)")
    assert from_dict(AnswererConfig, document["answerer"]) == config
    lines = wanted["answers.jsonl"].splitlines(keepends=True)
    assert len(lines) == 3
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "answers.jsonl").write_bytes(lines[0])
    asked, answers = [], RunAnswerer.answers

    def watched(self, prompts, max_new_tokens, rows):
        for answer in answers(self, prompts, max_new_tokens, rows):
            asked.append(max_new_tokens)
            yield answer

    monkeypatch.setattr(RunAnswerer, "answers", watched)
    dataclasses.replace(suite, out=str(tmp_path / "b")).main()
    assert files(tmp_path / "b") == wanted
    assert asked.count(3) == 2, "the first answer was there"
    asked.clear()
    changes = {"top_k": 3} if isinstance(config, Rag) else {"summary_tokens": 5}
    other = dataclasses.replace(config, **changes)
    dataclasses.replace(suite, answerer=other, out=str(tmp_path / "b")).main()
    assert asked.count(3) == 3, "answers of other options are not used"


def test_the_same_run_asked_in_two_ways(suite, tmp_path):
    dataclasses.replace(suite, answerer=RECURRENT, baseline=suite.workdir, out=str(tmp_path / "a")).main()
    document = json.loads((tmp_path / "a" / "babilong.json").read_text())
    assert document["model"] == "recurrent prompt (60 + 4 tokens), baseline (no memory)"
    assert document["baseline"]["model"] == "baseline (no memory)"
    assert (document["answerer"]["kind"], document["baseline"]["answerer"]["kind"]) == ("recurrent_prompt", "direct")


def test_direct_answers_keep_the_ids_they_had():
    assert Direct().identity() == {}
    assert Rag().identity() == {"answerer": to_dict(Rag())}
    assert from_dict(AnswererConfig, to_dict(Rag(scorer=Bm25(k1=2.0)))) == Rag(scorer=Bm25(k1=2.0))
    assert isinstance(RECURRENT.build(Echo()), Answerer)


def test_instructions(suite, tmp_path):
    """They are put before the context, are part of an answer's id, and a missing file is found before any question."""
    dataclasses.replace(suite, out=str(tmp_path / "a")).main()
    (tmp_path / "texts").mkdir()
    changed = dataclasses.replace(suite, instructions=str(tmp_path / "texts"), out=str(tmp_path / "b"))
    with pytest.raises(UserError, match=r"expected a folder with qa1\.txt"):
        changed.main()
    assert not (tmp_path / "b").exists()
    (tmp_path / "texts" / "qa1.txt").write_text("Use one word.\n")
    changed.main()
    plain, with_them = (
        [json.loads(line) for line in (tmp_path / name / "answers.jsonl").read_text().splitlines()] for name in "ab"
    )
    for before, after in zip(plain, with_them, strict=True):
        assert after["prompt_tokens"] - before["prompt_tokens"] == len(" Use one word.")
        assert before["id"] != after["id"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--answerer", "rap"], "--answerer: unknown kind 'rap'. Did you mean 'rag'"),
        (["--answerer", "rag", "--answerer.top-k", "0"], "--answerer.top-k must be at least 1, got 0"),
        (["--answerer", "rag", "--answerer.scorer", "bm25", "--answerer.scorer.b", "2"], "--answerer.scorer.b must"),
        (["--answerer.top-k", "3"], "That is a field of 'rag'"),
        (["--answerer", "recurrent_prompt", "--answerer.summary-tokens", "0"], "--answerer.summary-tokens must be at"),
        (["--answerer", "rag", "--answerer.scorer", "embeddings"], "set --answerer.scorer.model FOLDER"),
        (["--answerer", "rag", "--answerer.scorer", "embeddings", "--answerer.scorer.model", "no/where"], "no such"),
        (["--baseline-answerer", "rag"], "set baseline"),
    ],
)
def test_bad_values_end_with_one_message(flags, message, suite, tmp_path, monkeypatch):
    """As typed; the run is a stand-in, so what is read of its folder before is left out."""
    monkeypatch.setattr(program, "check_inference_memory", lambda *args: None)
    monkeypatch.setattr(program, "read_config", lambda *args: None)
    monkeypatch.setattr(program, "open_path", lambda path, name: path)
    words = ["babilong", "--workdir", suite.workdir, "--data-dir", str(tmp_path / "published"), *flags]
    with pytest.raises(UserError) as caught:
        program.main(words)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()
