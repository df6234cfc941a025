"""Tokenizers: what they encode, how they are kept, and what they refuse."""

import io
import json
import time

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from lm2_jax.data import tokenizer_base
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


def unigram(path, *specials) -> str:
    """Writes a Unigram model of letters and these pieces, as SentencePiece models are converted."""
    letters = [(letter, -2.0) for letter in "abcdefimnorstwx<>/|_ \u2581"]
    inner = Tokenizer(models.Unigram([("<unk>", 0.0), *((name, 0.0) for name in specials), *letters], unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.save(str(path))
    return str(path)


def sentencepiece_model(path, **options) -> str:
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=content,
        vocab_size=120,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(content.getvalue())
    return str(path)


SPELLED = "a</s>b <pad> </s></s><answer> x<|im_end|>"


def shapes(tmp_path) -> dict[str, TokenizerConfig]:
    """Tokenizers in whose vocabulary a text could meet a special token."""
    file = {name: tmp_path / name for name in ("pieces", "added", "words", "user", "ignore")}
    unigram(file["pieces"], "</s>", "<pad>", "<answer>", "<|im_end|>")
    inner = Tokenizer.from_file(unigram(file["added"], "</s>"))
    inner.add_tokens(["<pad>", "<answer>", AddedToken("<|im_end|>", special=False)])
    inner.save(str(file["added"]))
    word_level(file["words"], "</s>", "<pad>", "<answer>", "<|im_end|>")
    sentencepiece_model(file["user"], user_defined_symbols=["<answer>", "<|im_end|>", "<pad>"])
    return {
        "unigram pieces": TokenizerConfig(kind="json", path=str(file["pieces"])),
        "added tokens": TokenizerConfig(kind="json", path=str(file["added"])),
        "words": TokenizerConfig(kind="json", path=str(file["words"])),
        "user-defined": TokenizerConfig(kind="sentencepiece", path=str(file["user"]), eos="<|im_end|>"),
        "bpe": TokenizerConfig(),
        "bytes": TokenizerConfig(kind="bytes"),
    }


def test_no_text_turns_into_a_special_token(tmp_path):
    for name, config in shapes(tmp_path).items():
        tokenizer = build_tokenizer(config, corpus, 512)
        vocabulary = tokenizer.vocabulary()
        special = {vocabulary[n] for n in ("</s>", "<pad>", "<answer>", "<|im_end|>", "<eos>") if n in vocabulary}
        special |= {tokenizer.eos_id, tokenizer.pad_id, tokenizer.answer_id}
        ids = tokenizer.encode(SPELLED)
        assert not special & set(ids), name
        assert len(ids) >= 4, name
        # It is read back from a workdir in the same way.
        path = save_tokenizer(tokenizer, tmp_path / f"saved {name}").parent
        loaded = load_tokenizer(path, config)
        assert (loaded.encode(SPELLED), loaded.fingerprint) == (ids, tokenizer.fingerprint), name


def test_half_surrogates_are_the_replacement_character(tmp_path):
    for config in shapes(tmp_path).values():
        tokenizer = build_tokenizer(config, corpus, 512)
        assert tokenizer.encode("a \ud83d b") == tokenizer.encode("a \ufffd b")
    assert build_tokenizer(TokenizerConfig(), lambda: ["a\ud83d"], 300).encode("a")


def test_what_a_vocabulary_cannot_represent_is_one_message(tmp_path):
    vocabularies = {
        "words": models.WordLevel({"a": 0, "</s>": 1}),
        "unigram": models.Unigram([("a", -1.0), ("</s>", 0.0)]),
        "bpe": models.BPE({"a": 0, "</s>": 1}, []),
        "wordpiece": models.WordPiece({"a": 0, "</s>": 1}),
    }
    for name, model in vocabularies.items():
        Tokenizer(model).save(str(tmp_path / name))
        tokenizer = build_tokenizer(TokenizerConfig(kind="json", path=str(tmp_path / name)), no_corpus, 512)
        assert tokenizer.encode("a") == [0]
        with pytest.raises(UserError, match=rf"data\.tokenizer path=.*{name}'") as caught:
            tokenizer.encode("b")
        assert caught.value.status == 1


def test_a_panic_of_the_library_is_one_message(monkeypatch):
    tokenizer = build_tokenizer(TokenizerConfig(kind="bytes"), no_corpus, 512)

    class PanicException(BaseException):
        """As pyo3 has it: no Exception."""

    def panic(text):
        raise PanicException("index out of bounds")

    monkeypatch.setattr(tokenizer, "_encode", panic)
    with pytest.raises(UserError, match=r"cannot encode 'abc': index out of bounds"):
        tokenizer.encode("abc")


def test_dropout_is_switched_off(tmp_path):
    inner = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3}, [("a", "b")], dropout=0.5))
    inner.save(str(tmp_path / "dropout"))
    tokenizer = build_tokenizer(TokenizerConfig(kind="json", path=str(tmp_path / "dropout")), no_corpus, 512)
    assert {tuple(tokenizer.encode("abab")) for _ in range(50)} == {(2, 2)}


LONG = [
    "Words of several kinds, some in a row; with numbers 123 456, and  two blanks.\n\n\tA new line. " * 40,
    "日本語の文章です。これは長い。" * 200 + "\nEnd of it. ok",
    "unbroken" * 500 + " and then a word " * 100,
]


def test_long_texts_have_the_same_tokens_in_pieces(tmp_path, monkeypatch, data_dir):
    real = data_dir / "tokenizers"
    (model,) = (real / "nanodo_sp32k").glob("*.model")
    configs = [
        *shapes(tmp_path).values(),
        TokenizerConfig(kind="json", path=str(real / "neox_20b" / "20B_tokenizer.json")),
        TokenizerConfig(kind="sentencepiece", path=str(model)),
    ]
    book = (data_dir / "books" / "howards_end.txt").read_text()[5000:25_000]
    for config in configs:
        tokenizer = build_tokenizer(config, corpus, 100_000)
        for text in (*LONG, book):
            monkeypatch.setattr(tokenizer_base, "_PIECE", 1 << 20)
            expected = tokenizer.encode(text)
            monkeypatch.setattr(tokenizer_base, "_PIECE", 300)
            assert tokenizer.encode(text) == expected
            assert tokenizer.encode_array(text).tolist() == expected
            assert "".join(tokenizer._pieces(text)) == text
        assert len(list(tokenizer._pieces(book))) > 20, config


def test_bytes_may_be_cut_anywhere(monkeypatch):
    monkeypatch.setattr(tokenizer_base, "_PIECE", 100)
    pieces = list(build_tokenizer(TokenizerConfig(kind="bytes"), no_corpus, 512)._pieces("x" * 1000))
    assert max(map(len, pieces)) <= 100


def test_training_on_an_unbroken_word_takes_seconds():
    word = "".join("ACGT"[draw("base", i) % 4] for i in range(300_000))
    started = time.process_time()
    tokenizer = build_tokenizer(TokenizerConfig(), lambda: [word, " " * 100_000 + word], 512)
    assert time.process_time() - started < 20
    assert tokenizer.vocab_size == 512
    assert len(tokenizer.encode("ACGT" * 100)) < 300


def test_the_fingerprint_covers_what_a_tokenizer_does(tmp_path):
    built = build_tokenizer(TokenizerConfig(), corpus, 300)
    plain = json.loads(built.serialized())

    def changed(change) -> str:
        other = json.loads(built.serialized())
        change(other)
        (tmp_path / "other.json").write_text(json.dumps(other))
        config = TokenizerConfig(kind="json", path=str(tmp_path / "other.json"))
        tokenizer = build_tokenizer(config, no_corpus, 512)
        assert tokenizer.vocabulary_fingerprint == built.vocabulary_fingerprint
        return tokenizer.fingerprint

    assert changed(lambda other: None) == built.fingerprint
    assert changed(lambda other: other["model"].update(dropout=0.1)) == built.fingerprint  # switched off
    assert changed(lambda other: other.update(truncation=None, padding=None)) == built.fingerprint
    other = [
        changed(lambda other: other["model"]["merges"].reverse() or other["model"]["merges"].sort()),
        changed(lambda other: other["model"]["merges"].pop()),
        changed(lambda other: other.update(normalizer={"type": "Lowercase"})),
        changed(lambda other: other["pre_tokenizer"].update(add_prefix_space=True)),
        changed(lambda other: other["pre_tokenizer"].update(use_regex=False)),
        changed(lambda other: other["model"].update(ignore_merges=True)),
    ]
    assert len({built.fingerprint, *other}) == 1 + len(other)
    assert plain["model"]["merges"]


def test_a_file_that_was_changed_is_refused(tmp_path):
    built = build_tokenizer(TokenizerConfig(), corpus, 300)
    path = save_tokenizer(built, tmp_path)
    assert load_tokenizer(tmp_path, fingerprint=built.fingerprint).fingerprint == built.fingerprint
    assert load_tokenizer(tmp_path, fingerprint=built.vocabulary_fingerprint).fingerprint == built.fingerprint
    plain = json.loads(path.read_text())
    plain["model"]["merges"].pop()
    path.write_text(json.dumps(plain))
    with pytest.raises(
        UserError, match=rf"expected the tokenizer with fingerprint {built.fingerprint}, this one has v2:"
    ):
        load_tokenizer(tmp_path, fingerprint=built.fingerprint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plain: plain["model"]["vocab"].update(a=-1), "token ids from 0"),
        (lambda plain: plain["model"]["vocab"].update(a=10**12), "token ids from 0"),
        (lambda plain: plain["model"]["vocab"].update(a="1"), "token ids from 0"),
        (lambda plain: plain["model"]["vocab"].update(a=plain["model"]["vocab"]["b"]), "1 ids belong to several"),
        (lambda plain: plain["added_tokens"][0].update(id=5), "id 5 is .* in the vocabulary and '<pad>'"),
        (lambda plain: plain.update(model=[]), "expected a table `model`"),
        (lambda plain: plain.update(added_tokens=5), "expected a table `model`"),
        (lambda plain: plain["model"]["merges"].append(["zzz", "y"]), "not a `tokenizers` JSON"),
    ],
)
def test_damaged_vocabularies_are_refused(tmp_path, change, message):
    plain = json.loads(build_tokenizer(TokenizerConfig(), corpus, 300).serialized())
    change(plain)
    (tmp_path / "bad.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match=rf"bad\.json'.*{message}"):
        build_tokenizer(TokenizerConfig(kind="json", path=str(tmp_path / "bad.json")), no_corpus, 512)


def test_an_unknown_kind_says_what_was_meant():
    with pytest.raises(ValueError, match=r"tokenizer\.kind='byte': expected one of \['bpe', .*Did you mean 'bytes'"):
        TokenizerConfig(kind="byte")
