"""Tokenizers: what they encode, how they are kept, and what they refuse."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from lm2_jax.data.draws import draw
from lm2_jax.data.tokenizers import (
    SMALLEST_BPE,
    TokenizerConfig,
    build_tokenizer,
    load_tokenizer,
    save_tokenizer,
)
from lm2_jax.errors import UserError

ODD_TEXT = "Grüße, <eos> world\n\tx  é日本<answer>"
NAMES, PLACES = ("Mary", "John", "Sandra", "Daniel"), ("kitchen", "bathroom", "garden", "office", "hallway", "bedroom")


def corpus() -> list[str]:
    """Sentences like bAbI's."""
    return [
        f"{NAMES[draw('who', i) % 4]} journeyed to the {PLACES[draw('where', i) % 6]}. Where is {NAMES[i % 4]}? "
        for i in range(2000)
    ]


def no_corpus() -> list[str]:
    raise AssertionError("asked for a corpus though nothing is trained")


def word_level(path, *names: str) -> str:
    """Writes a `tokenizers` JSON with the words "a" and "b", and `names`."""
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1} | {name: 2 + i for i, name in enumerate(names)}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.save(str(path))
    return str(path)


def test_bpe_has_the_words_of_its_corpus_as_single_tokens():
    tokenizer = build_tokenizer(TokenizerConfig(), corpus, 512)
    for word in (*NAMES, *PLACES, "journeyed"):
        assert len(tokenizer.encode(f" {word}")) == 1, word
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.answer_id) == (0, 1, 2)


def test_bpe_is_the_same_for_the_same_corpus_and_another_for_another():
    first, second = (build_tokenizer(TokenizerConfig(), corpus, 512) for _ in range(2))
    assert first.serialized() == second.serialized()
    assert first.fingerprint == second.fingerprint
    other = build_tokenizer(TokenizerConfig(), lambda: ["entirely other words, other words"], 512)
    assert other.fingerprint != first.fingerprint


@pytest.mark.parametrize("config", [TokenizerConfig(), TokenizerConfig(kind="bytes")])
def test_any_text_comes_back_and_specials_are_neither_made_nor_shown(config):
    tokenizer = build_tokenizer(config, corpus, 512)
    ids = tokenizer.encode(ODD_TEXT)
    specials = {tokenizer.pad_id, tokenizer.eos_id, tokenizer.answer_id}
    assert not specials & set(ids)  # "<eos>" in a text ends nothing
    assert tokenizer.decode([0, 2, *ids, 1, 511, 9999]) == ODD_TEXT  # nor do ids that only the model has


def test_bytes_are_bytes():
    tokenizer = build_tokenizer(TokenizerConfig(kind="bytes"), no_corpus, 259)
    assert tokenizer.vocab_size == 259
    assert tokenizer.encode("é\n") == [3 + byte for byte in "é\n".encode()]


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_a_workdir_keeps_the_tokenizer(tmp_path, kind):
    built = build_tokenizer(TokenizerConfig(kind=kind), corpus, 512)
    assert save_tokenizer(built, tmp_path / "new").name == "tokenizer.json"
    loaded = load_tokenizer(tmp_path / "new")
    assert loaded.fingerprint == built.fingerprint
    assert loaded.encode(ODD_TEXT) == built.encode(ODD_TEXT)
    # A run that goes on reads it and trains none.
    resumed = build_tokenizer(TokenizerConfig(kind=kind), no_corpus, 512, tmp_path / "new")
    assert resumed.fingerprint == built.fingerprint


def test_an_empty_workdir_is_a_message(tmp_path):
    with pytest.raises(UserError, match="no tokenizer there"):
        load_tokenizer(tmp_path)


def test_json_finds_usual_names_and_takes_others(tmp_path):
    usual = word_level(tmp_path / "usual.json", "[PAD]", "</s>")
    tokenizer = build_tokenizer(TokenizerConfig(kind="json", path=usual), no_corpus, 4)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.answer_id) == (2, 3, None)
    assert tokenizer.encode("b a") == [1, 0]

    own = word_level(tmp_path / "own.json", "STOP")
    tokenizer = build_tokenizer(TokenizerConfig(kind="json", path=own, eos="STOP"), no_corpus, 4)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 2)
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path, TokenizerConfig(kind="json", path=own, eos="STOP")).eos_id == 2


def test_names_that_do_not_exist_are_named(tmp_path):
    path = word_level(tmp_path / "own.json", "STOP")
    with pytest.raises(UserError, match=r"no token that ends a document.*Set data\.tokenizer\.eos"):
        build_tokenizer(TokenizerConfig(kind="json", path=path), no_corpus, 4)
    with pytest.raises(UserError, match=r"data\.tokenizer\.pad='NIX'"):
        build_tokenizer(TokenizerConfig(kind="json", path=path, eos="STOP", pad="NIX"), no_corpus, 4)


def test_too_many_tokens_names_both_numbers_and_the_field():
    with pytest.raises(UserError, match=r"259 tokens but model\.vocab_size is 100"):
        build_tokenizer(TokenizerConfig(kind="bytes"), no_corpus, 100)
    with pytest.raises(UserError, match=rf"model\.vocab_size=100.*at least {SMALLEST_BPE}"):
        build_tokenizer(TokenizerConfig(), no_corpus, 100)


@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_missing_and_broken_files(tmp_path, kind):
    with pytest.raises(UserError, match=r"nowhere.*no such file"):
        build_tokenizer(TokenizerConfig(kind=kind, path=str(tmp_path / "nowhere")), no_corpus, 512)
    (tmp_path / "broken").write_bytes(b"\x00{not a tokenizer")
    with pytest.raises(UserError, match=r"broken.*not a"):
        build_tokenizer(TokenizerConfig(kind=kind, path=str(tmp_path / "broken")), no_corpus, 512)


def test_an_empty_vocabulary(tmp_path):
    Tokenizer(models.BPE()).save(str(tmp_path / "empty.json"))
    with pytest.raises(UserError, match=r"empty\.json.*vocabulary is empty") as caught:
        build_tokenizer(TokenizerConfig(kind="json", path=str(tmp_path / "empty.json")), no_corpus, 512)
    assert caught.value.status == 1


def test_a_path_goes_with_the_kinds_that_read_one():
    with pytest.raises(ValueError, match=r"set tokenizer\.path"):
        TokenizerConfig(kind="json")
    with pytest.raises(ValueError, match="reads no file"):
        TokenizerConfig(kind="bpe", path="x")


def test_real_json(data_dir):
    path = data_dir / "tokenizers" / "neox_20b" / "20B_tokenizer.json"
    tokenizer = build_tokenizer(TokenizerConfig(kind="json", path=str(path)), no_corpus, 50_304)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (50_277, 0, 1)
    assert tokenizer.encode("Hello world") == [12092, 1533]
    assert tokenizer.decode([0, 12092, 1533, 1, 50_300]) == "Hello world"
    with pytest.raises(UserError, match=r"50277 tokens but model\.vocab_size is 512"):
        build_tokenizer(TokenizerConfig(kind="json", path=str(path)), no_corpus, 512)


def test_real_sentencepiece(data_dir, tmp_path):
    (path,) = (data_dir / "tokenizers" / "sentencepiece_test1k").glob("*.model")
    tokenizer = build_tokenizer(TokenizerConfig(kind="sentencepiece", path=str(path)), no_corpus, 1000)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (1000, 2, 2)  # it has no padding token
    ids = tokenizer.encode("I saw a girl with a telescope.")
    assert tokenizer.decode([*ids, 2, 1200]) == "I saw a girl with a telescope."
    assert save_tokenizer(tokenizer, tmp_path).name == "tokenizer.model"
    loaded = load_tokenizer(tmp_path)
    assert (loaded.fingerprint, loaded.encode("a girl")) == (tokenizer.fingerprint, tokenizer.encode("a girl"))
