"""A person's own text: any preset trains on it, with a fitting tokenizer, batch and held-out part."""

import json

import pytest

import lm2_jax
from lm2_jax.data import convert
from lm2_jax.data.own_text import own_text
from lm2_jax.data.text_source import TextFiles
from lm2_jax.data.tokenizers import TokenizerConfig, build_tokenizer
from lm2_jax.errors import UserError

WORDS = "The river was calm and the boats came home before the rain. "


def built(run):
    """The tokenizer and the source of a run."""
    source = run.data.source
    tokenizer = build_tokenizer(run.data.tokenizer, lambda: source.corpus(0), run.model.vocab_size)
    return tokenizer, source.build(tokenizer, run.model.segment_tokens, 0)


@pytest.mark.parametrize("name", sorted(lm2_jax.PRESETS))
def test_every_preset_takes_a_text(tmp_path, name):
    (tmp_path / "a.txt").write_text("\n\n".join(f"{i}. {WORDS}" * 20 for i in range(40)))
    said: list[str] = []
    run = own_text(lm2_jax.preset(name), tmp_path, report=said.append)
    assert len(said) == 1
    assert "\n" not in said[0]
    assert run.loss.text_weight > 0
    assert run.data.carry_state == run.model.has_memory
    tokenizer, source = built(run)
    for held_out in (False, True):
        row = source.example(0, run.data.rows - 1, run.data.rows, run.data.segments[0], held_out)
        assert row.text.any()
        assert "river" in tokenizer.decode(row.tokens.tolist())


def test_the_tokenizer_and_the_batch_fit_the_text(tmp_path):
    path = tmp_path / "a.txt"
    preset = lm2_jax.preset("lm2_1p7b")
    kinds = {}
    for characters in (1000, 40_000, 100_000, 1_000_000, 4_000_000):
        path.write_text((WORDS * (1 + characters // len(WORDS)))[:characters])
        run = own_text(preset, path, report=lambda line: None)
        kinds[characters] = run.data.tokenizer.kind, run.model.vocab_size, run.data.rows
    assert kinds == {
        1000: ("bytes", 512, 1),
        40_000: ("bytes", 512, 4),
        100_000: ("bpe", 512, 4),
        1_000_000: ("bpe", 1024, 32),
        4_000_000: ("bpe", 4096, 64),
    }
    path.write_text("short")
    with pytest.raises(UserError, match=r"5 characters of text; expected at least 1000"):
        own_text(preset, path)


def test_a_tokenizer_file_of_the_preset_is_kept(tmp_path):
    import dataclasses

    from lm2_jax.data.tokenizers import save_tokenizer

    own = save_tokenizer(build_tokenizer(TokenizerConfig(kind="bytes"), list, 259), tmp_path / "tokenizer")
    preset = lm2_jax.preset("lm2_tiny")
    config = TokenizerConfig(kind="json", path=str(own))
    preset = dataclasses.replace(preset, data=dataclasses.replace(preset.data, tokenizer=config))
    (tmp_path / "a.txt").write_text(WORDS * 2000)
    assert own_text(preset, tmp_path / "a.txt", report=lambda line: None).data.tokenizer == config


def test_many_documents_are_not_cut(tmp_path):
    lines = (json.dumps({"body": f"{i} {WORDS * 30}"}) for i in range(300))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    said: list[str] = []
    run = own_text(lm2_jax.preset("text_tiny"), f"{tmp_path}/*.jsonl", field="body", report=said.append)
    assert isinstance(run.data.source, TextFiles)
    assert run.data.source.document_characters is None
    assert "300 documents" in said[0]
    assert "2% of 300 documents held out" in said[0]


def test_a_shard_set_brings_its_tokenizer(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(f"{i} {WORDS * 9}") for i in range(60)))
    out = str(tmp_path / "out")
    convert.convert(convert.Conversion(out=out, text=str(tmp_path / "a.jsonl"), vocab_size=300))
    said: list[str] = []
    run = own_text(lm2_jax.preset("lm2_tiny"), out, report=said.append)
    assert run.data.tokenizer == TokenizerConfig(kind="json", path=f"{out}/tokenizer.json")
    assert run.model.vocab_size == 300
    tokenizer, source = built(run)
    assert "river" in tokenizer.decode(source.example(0, 0, run.data.rows, 2).tokens.tolist())
    assert "60 documents, token shards" in said[0]


def test_text_tiny_is_as_small_as_its_name_says():
    model = lm2_jax.preset("text_tiny").model
    assert (model.vocab_size, model.segment_tokens, model.decoder.width) == (512, 32, 64)
    with pytest.raises(UserError, match=r"texts: no such file or folder.*Change --text"):
        built(lm2_jax.preset("text_tiny"))


@pytest.mark.parametrize("pattern", ["a.jsonl", "*.jsonl", "."])
def test_the_converter_takes_files_and_patterns(tmp_path, pattern):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    conversion = convert.Conversion(
        out=str(tmp_path / "out"), text=str(tmp_path / "in" / pattern), tokenizer=TokenizerConfig(kind="bytes")
    )
    assert convert.convert(conversion)["documents"] == 2


def test_what_cannot_be_encoded_is_named_with_file_and_row(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "</s>": 1})).save(str(tmp_path / "words.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    conversion = convert.Conversion(
        out=str(tmp_path / "out"),
        text=str(tmp_path / "a.jsonl"),
        tokenizer=TokenizerConfig(kind="json", path=str(tmp_path / "words.json")),
    )
    with pytest.raises(UserError, match=r"a\.jsonl:2: data\.tokenizer path=.*words\.json'.*UNK"):
        convert.convert(conversion)
