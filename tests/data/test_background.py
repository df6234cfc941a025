"""Background: sentences of books, and generated prose."""

import itertools
import re

import pytest

from lm2_jax.data import background, prose
from lm2_jax.data.babi import OBJECTS, PERSONS, PLACES, TASKS, read_stories
from lm2_jax.data.background import Books, Prose, open_background, split_sentences
from lm2_jax.data.philox import Draws
from lm2_jax.data.text_tokens import Encoder, noise
from lm2_jax.errors import UserError
from tests.data.reading import WordTokenizer


def take(source, count, key=0, held_out=False):
    return list(itertools.islice(source.sentences(Draws(key), held_out), count))


@pytest.fixture
def shelf(tmp_path):
    """Three books whose sentences carry the number of the book and their own."""
    for book in range(3):
        text = "".join(f"In book {book} this is\nsentence {i}, no more and no less. " for i in range(2000))
        (tmp_path / f"{book}.txt").write_text(text)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "notes.md").write_text("Not a book. Never read this. It is not one.")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "sentences", "rest"),
    [
        ("One is here. Two is there. Thr", ["One is here.", "Two is there."], " Thr"),
        (
            "Mr. Smith met Dr. Brown at St. Paul's. They left.",
            ["Mr. Smith met Dr. Brown at St. Paul's."],
            " They left.",
        ),
        ("It was J. R. Smith! Who? He said", ["It was J. R. Smith!", "Who?"], " He said"),
        ('"Stop!" he cried. "Why?" Nobody knew. X', ['"Stop!" he cried.', '"Why?"', "Nobody knew."], " X"),
        ("Chapter I\n\nA wind\nblew  hard. Then", ["Chapter I", "A wind blew hard."], " Then"),
        ("It cost 3.50 pounds, e.g. a coat. Yes", ["It cost 3.50 pounds, e.g. a coat."], " Yes"),
        ("“Go.” She went. And so did I. He", ["“Go.”", "She went.", "And so did I."], " He"),
        ("no end at all", [], "no end at all"),
    ],
)
def test_sentences_by_hand(text, sentences, rest):
    assert split_sentences(text) == (sentences, rest)


def test_books_give_whole_consecutive_sentences(shelf):
    found = take(Books(str(shelf)), 40)
    pairs = [re.fullmatch(r"In book (\d) this is sentence (\d+), no more and no less\.", s) for s in found]
    assert all(pairs), "first and last pieces are dropped, line breaks are blanks"
    numbers = [(int(p[1]), int(p[2])) for p in pairs if p]
    assert len({book for book, _ in numbers}) == 1
    assert [n for _, n in numbers] == list(range(numbers[0][1], numbers[0][1] + 40))


def test_books_are_all_read_and_the_same_key_reads_the_same(shelf):
    books = Books(str(shelf))
    firsts = [take(books, 1, key)[0] for key in range(40)]
    assert {first[8] for first in firsts} == {"0", "1", "2"}
    assert len(set(firsts)) > 35
    assert firsts == [take(Books(str(shelf)), 1, key)[0] for key in range(40)]


def test_the_end_of_a_book_leads_to_the_next(shelf):
    found = take(Books(str(shelf)), 4500)
    assert len({sentence[8] for sentence in found}) > 1
    assert all(sentence.endswith("no less.") for sentence in found)


def test_held_out_text_is_never_trained_on(shelf):
    books = Books(str(shelf))
    train = {s for key in range(5) for s in take(books, 3000, key)}
    held_out = {s for key in range(5) for s in take(books, 500, key, held_out=True)}
    assert train
    assert len(held_out) > 300
    assert not train & held_out
    generated = Prose()
    trained = {generated_paragraph for key in range(200) for generated_paragraph in take(generated, 30, key)}
    unseen = {s for key in range(20) for s in take(generated, 30, key, held_out=True)}
    assert len(trained & unseen) < 0.03 * len(unseen), "other paragraphs, though a short sentence may come twice"


def test_prose_runs_on_from_paragraph_to_paragraph(monkeypatch):
    """A run begins anywhere in a paragraph, and whole paragraphs follow in order, the last before the first."""
    monkeypatch.setattr(background, "_PARAGRAPHS", 10)
    whole = [sentence for number in range(10) for sentence in prose.paragraph(number)]
    begun = set()
    for key in range(30):
        run = take(Prose(), 70, key)
        begin = whole.index(run[0])
        begun.add(begin)
        assert run == (whole[begin:] + whole + whole)[:70]
    assert len(begun) > 15
    assert take(Prose(), 1, 0, held_out=True)[0] not in whole


def test_prose_is_english_and_repeats_itself_little():
    paragraphs = [prose.paragraph(n) for n in range(300)]
    sentences = [sentence for paragraph in paragraphs for sentence in paragraph]
    for sentence in sentences:
        assert re.fullmatch(r"[A-Z\"].*[.\"]", sentence)
        assert "{" not in sentence
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  ", sentence), sentence
        assert 8 <= len(sentence.split()) <= 30
    assert len(set(sentences)) > 0.97 * len(sentences)
    words = {word.lower() for sentence in sentences for word in re.findall(r"[\w-]+", sentence)}
    assert 250 < len(words) < 1000


def test_prose_never_speaks_of_what_babi_speaks_of(data_dir):
    """No person, place or thing of any task: of the words of the files only small ones."""
    folder = str(data_dir / "babi" / "en-10k")
    named = set()
    for task in TASKS:
        for line in itertools.chain.from_iterable(read_stories(folder, task, "test")):
            named |= {word.lower() for word in re.findall(r"\w+", line.text)}
    assert {w.lower() for w in (*PERSONS, *PLACES, *OBJECTS)} <= named
    said = {w for n in range(2000) for s in prose.paragraph(n) for w in re.findall(r"\w+", s.lower())}
    assert said & named <= set(
        "a after and before did down evening from in is morning not of that the there this to up was went what who why "
        "you".split()
    )


def test_noise_keeps_to_its_bounds(shelf):
    encode = Encoder(WordTokenizer())
    (shelf / "0.txt").write_text(
        "Short one here. " * 50 + "This sentence has quite a few more words than ten in it. " * 400
    )
    for sentence, ids in itertools.islice(noise(Books(str(shelf)), encode, Draws(1), False, (12, 14)), 50):
        assert ids == encode(sentence)
        assert 12 <= len(ids) <= 14
    with pytest.raises(UserError, match="max_sentence_tokens"):
        next(noise(Prose(), encode, Draws(1), False, (500, None)))


def test_real_books_read_well(data_dir):
    """Nearly every sentence begins like one and ends like one."""
    found = [s for key in range(20) for s in take(Books(str(data_dir / "books")), 25, key)]
    ends = sum(s[-1] in ".?!\"'”’)]_-" for s in found)
    starts = sum(bool(re.match(r"[\"'“‘(\[_]*[A-Z0-9]", s)) for s in found)
    assert ends > 0.85 * len(found)
    assert starts > 0.9 * len(found)
    assert not any("\n" in s or "  " in s for s in found)


def test_multibyte_letters_survive_window_borders(tmp_path):
    (tmp_path / "book.txt").write_text(
        "Ärger über Öl — „größer“ und schöner als fünf Fässer. " * 3000, encoding="utf-8"
    )
    assert set(take(Books(str(tmp_path)), 1000)) == {"Ärger über Öl — „größer“ und schöner als fünf Fässer."}


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"books_dir.*not a folder"):
        open_background(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"books_dir.*found none"):
        open_background(str(tmp_path))
    (tmp_path / "poem.txt").write_text("no sentence here and none there")
    with pytest.raises(UserError, match="no complete sentence"):
        take(open_background(str(tmp_path)), 1)
