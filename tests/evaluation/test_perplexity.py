"""`eval.py perplexity`: losses of documents, against one call over each of them."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import lm2_jax
from lm2_jax.config import DataConfig
from lm2_jax.data.babilong_source import BabilongSource
from lm2_jax.data.text_source import TextFiles
from lm2_jax.data.tokenizers import TokenizerConfig, build_tokenizer
from lm2_jax.errors import UserError
from lm2_jax.evaluation import perplexity
from lm2_jax.evaluation.answerer import RunAnswerer
from lm2_jax.evaluation.answers import AnswerLog
from lm2_jax.evaluation.perplexity import Perplexity
from lm2_jax.runs import Run

TEXTS = [
    "Caf\u00e9 au lait.",
    "a",
    "It was a dark and stormy night. " * 7,
    "One more, of two segments or so, is enough.",
]


@pytest.fixture(scope="module")
def answerer():
    config = lm2_jax.preset("lm2_tiny")
    model = lm2_jax.build_model(config.model)
    tokens = jnp.zeros((1, config.model.segment_tokens), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens, model.init_state(1))["params"]
    params = jax.tree.map(lambda leaf: leaf * 1.5, params)  # away from equal probabilities
    tokenizer = build_tokenizer(TokenizerConfig(kind="bytes"), list, config.model.vocab_size)
    return RunAnswerer(Run(config, model, params, tokenizer, 7))


def losses_of(run, text):
    """-log p of each byte but the first, and of the document's end, by one call over the text."""
    ids = [*run.tokenizer.encode(text), run.tokenizer.eos_id]
    size = run.config.model.segment_tokens * 8
    padded_BS = jnp.zeros((1, size), jnp.int32).at[0, : len(ids)].set(jnp.array(ids, jnp.int32))
    valid_BS = jnp.arange(size)[None] < len(ids)
    logits_BSV, _ = jax.jit(run.model.apply)({"params": run.params}, padded_BS, run.model.init_state(1), None, valid_BS)
    logs_SV = np.asarray(jax.nn.log_softmax(logits_BSV[0].astype(jnp.float32)))
    return np.array([-logs_SV[at - 1, ids[at]] for at in range(1, len(ids))])


def test_perplexity(answerer, tmp_path):
    """Per token, byte and word, and by position in the document; an empty document counts for nothing."""
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in [*TEXTS, ""]))
    documents = perplexity.text_documents(str(tmp_path), "text", answerer.run.tokenizer)
    log = AnswerLog(epath.Path(tmp_path) / "log", {})
    found = perplexity.measure(answerer, documents, 3, log)[0].document()
    losses = [losses_of(answerer.run, text) for text in TEXTS]
    every = np.concatenate(losses)
    assert (found["documents"], found["tokens"]) == (4, len(every))
    assert found["bytes"] == sum(len(text.encode()) for text in TEXTS) - 4, "without the first tokens"
    assert found["words"] == sum(len(text.split()) for text in TEXTS)
    assert found["loss"] == pytest.approx(every.mean(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(every.mean()), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(every.sum() / math.log(2) / found["bytes"], rel=1e-5)
    assert found["word_perplexity"] == pytest.approx(math.exp(every.sum() / found["words"]), rel=1e-4)
    size = answerer.run.config.model.segment_tokens
    spans = [(0, 1), (1, 2), (2, 4), (4, 8)]
    assert [(row["first"], row["last"]) for row in found["by_segment"]] == [(a, b - 1) for a, b in spans]
    for row, (first, end) in zip(found["by_segment"], spans, strict=True):
        here = np.concatenate([loss[first * size : end * size] for loss in losses])
        assert row["tokens"] == len(here)
        assert row["perplexity"] == pytest.approx(math.exp(here.mean()), rel=1e-5)


def test_files(answerer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(RunAnswerer, "load", lambda workdir, layout_of=None: answerer)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    suite = Perplexity(workdir=str(tmp_path), text=str(tmp_path / "texts"), batch_rows=4)
    suite.main()
    out = tmp_path / "eval"
    document = json.loads((out / "perplexity.json").read_text())
    assert (document["suite"], document["preset"], document["step"]) == ("perplexity", "lm2_tiny", 7)
    assert document["documents"] == 4
    shown = f"| loss per token (nats) | {document['loss']:.4f} |"
    assert shown in (out / "perplexity.md").read_text()
    assert shown in capsys.readouterr().out
    dataclasses.replace(suite, documents=1, out=str(tmp_path / "one")).main()
    assert json.loads((tmp_path / "one" / "perplexity.json").read_text())["documents"] == 1


def test_an_interrupted_evaluation_resumes(answerer, tmp_path, monkeypatch):
    """The scores of a document are on the disk when it is read; the second call reads only the rest."""
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    read, limit = [], [2]

    def losses(self, texts, rows=None):
        if len(read) == limit[0]:
            raise KeyboardInterrupt
        read.extend(map(len, texts))
        return [np.full(len(text) - 1, 0.1 * len(text)) for text in texts]

    monkeypatch.setattr(RunAnswerer, "load", lambda workdir, layout_of=None: answerer)
    monkeypatch.setattr(RunAnswerer, "losses", losses)
    suite = Perplexity(workdir="w", text=str(tmp_path / "a.jsonl"), batch_rows=1, out=str(tmp_path / "out"))
    with pytest.raises(KeyboardInterrupt):
        suite.main()
    assert len((tmp_path / "out" / "perplexity.jsonl").read_text().splitlines()) == 2
    limit[0] = 99
    suite.main()
    assert sorted(read) == sorted(len(text.encode()) + 1 for text in TEXTS), "each document once"
    dataclasses.replace(suite, out=str(tmp_path / "other")).main()
    for name in ("perplexity.json", "perplexity.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def of_source(answerer, source):
    run = answerer.run
    config = dataclasses.replace(run.config, data=DataConfig(source=source, rows=2, segments=(2,)))
    return RunAnswerer(run._replace(config=config))


def test_held_out_documents_of_a_run(answerer, tmp_path):
    """Without --text, what the run's training never read."""
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(f"Chapter {number}. It was a dark night. " * (number + 1))
    source = TextFiles(path=str(tmp_path), held_out_fraction=0.2)
    held_out = Perplexity(workdir="w").read(of_source(answerer, source))
    texts = {answerer.run.tokenizer.decode(document.tokens[:-1].tolist()) for document in held_out}
    assert len(texts) == 2
    assert texts <= {path.read_text() for path in tmp_path.iterdir()}
    run = of_source(answerer, source).run
    source = run.config.data.source.build(run.tokenizer, 32, 0)
    trained = {answerer.run.tokenizer.decode(source.example(0, row, 99, 50).tokens.tolist()) for row in range(99)}
    assert not any(text in row for row in trained for text in texts)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "has no text documents; name a text with --text"), ("nowhere", "nowhere"), ("empty", "empty")],
)
def test_mistakes_write_nothing(answerer, tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    monkeypatch.setattr(RunAnswerer, "load", lambda workdir, layout_of=None: of_source(answerer, BabilongSource()))
    with pytest.raises(UserError, match=message):
        Perplexity(workdir=str(tmp_path / "run"), text=text).main()
    assert not epath.Path(tmp_path / "run").exists()
