import html.parser
import io
import os
import pathlib
import shutil
import subprocess
import sys
from base64 import b64decode

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm2_jax
from lm2_jax import UserError, runs
from lm2_jax.blocks import residual
from lm2_jax.evaluation.answerer import RunAnswerer
from lm2_jax.inspect import program
from lm2_jax.inspect.collect import ask, read_text
from lm2_jax.inspect.sentences import rank_sentences, token_texts
from lm2_jax.inspect.states import state_arrays
from lm2_jax.memory import base, gated_bank
from tests.contract.subjects import generic_params
from tests.inference.subjects import text_of, tiny_run

ROOT = pathlib.Path(__file__).parents[2]
SHOWN = ("lm2_tiny", "titans_mac_tiny", "rmt_tiny", "armt_tiny", "none_tiny")
TINY = sorted(name for name in lm2_jax.PRESETS if name.endswith("_tiny"))
WITH_READS = {"lm2_tiny", "lm2_threaded_tiny", "lm2_paper_tiny", "hybrid_tiny", "lm2_context_tiny", "text_tiny"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Parsed(html.parser.HTMLParser):
    """A page: its tags, pictures, references and text."""

    VOID = ("meta", "img", "link")

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.images: list[bytes] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open, f"tags that were not closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self._open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), "a handler is a script"
            if name in ("src", "href", "action", "data", "srcset"):
                self.references.append(value)
            if tag == "img" and name == "src":
                self.images.append(b64decode(value.removeprefix("data:image/png;base64,"), validate=True))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def inspect(monkeypatch, tmp_path):
    """Makes a report about a text with a tiny run."""

    def make(name: str, text: str, *words: str) -> Parsed:
        monkeypatch.setattr(runs, "load_run", lambda workdir: tiny_run(name))
        (tmp_path / "text.txt").write_text(text)
        arguments = ["--workdir", "tiny", "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
        program.main([*arguments, *(words or ("--recall-rows", "0"))])
        return Parsed((tmp_path / "out" / "report.html").read_text())

    return make


def check_page(page: Parsed, folder: pathlib.Path) -> None:
    """Everything is in the page, and every picture can be decoded and shows something."""
    from matplotlib.image import imread

    assert all(reference.startswith("data:") for reference in page.references)
    assert "script" not in page.tags
    files = sorted(file.read_bytes() for file in folder.glob("*.png"))
    assert sorted(page.images) == files
    for png in page.images:
        pixels = imread(io.BytesIO(png), format="png")
        assert pixels.shape[0] > 100
        assert pixels.std() > 0.01


def names(folder: pathlib.Path) -> set[str]:
    return {file.stem for file in folder.glob("*.png")}


def test_a_memory_with_slots_shows_everything(inspect, tmp_path):
    page = inspect("lm2_tiny", text_of(150), "--question", "where is the key?", "--recall-rows", "2")
    check_page(page, tmp_path / "out")
    assert names(tmp_path / "out") == {"reads", "question", "usage", "writes", "gates", "surprise", "forgetting"}
    assert "needs answers of one token each" in page.text  # the tokenizer of these runs gives a token per byte
    assert "Not shown for this model" not in page.text
    assert "under the stairs" in page.text


def test_a_memory_without_slots_says_what_it_has_not(inspect, tmp_path):
    page = inspect("gated_delta_tiny", text_of(100), "--question", "where is the key?", "--recall-rows", "0")
    check_page(page, tmp_path / "out")
    assert names(tmp_path / "out") == {"gates", "surprise", "forgetting"}
    assert page.text.count("Not shown for this model (gated_delta, mixer)") == 4
    assert "--recall-rows 0" in page.text


@pytest.mark.parametrize(
    "name",
    # A report compiles for half a minute; some kinds of memory are enough for each day.
    [pytest.param(name, marks=pytest.mark.slow if name in SHOWN else pytest.mark.long) for name in TINY],
)
def test_every_preset_has_a_report(inspect, tmp_path, name):
    page = inspect(name, text_of(150), "--question", "where is the key?", "--recall-rows", "2")
    check_page(page, tmp_path / "out")
    found = names(tmp_path / "out")
    assert "surprise" in found
    assert ({"reads", "question", "usage"} <= found) == (name in WITH_READS)
    assert ("forgetting" in found) == tiny_run(name).config.model.has_memory


def reading_of(name: str, tokens: int, shown: int | None = None):
    run = tiny_run(name)
    ids = np.array(run.tokenizer.encode(text_of(tokens)), np.int32)
    reading = read_text(run, [ids[:10], ids[10:]], shown)
    assert reading is not None
    return run, ids, reading


@pytest.mark.parametrize("name", ["lm2_tiny", "rmt_tiny"])
def test_what_is_measured_is_what_the_model_does(name):
    """Losses are those of an evaluation, and the memory is that of a reading."""
    run, ids, reading = reading_of(name, 70)
    assert np.isnan(reading.losses[0])
    np.testing.assert_allclose(reading.losses[1:], RunAnswerer(run).losses([ids])[0], rtol=1e-4, atol=1e-4)
    memory = run.read(text_of(70))
    assert memory.position == reading.memory.position == 6
    for a, b in zip(state_arrays(run, memory.state), state_arrays(run, reading.memory.state), strict=True):
        assert a.label == b.label
        np.testing.assert_allclose(a.values, b.values, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(reading.norms[a.label][-1], np.linalg.norm(a.values), rtol=1e-4)
        np.testing.assert_allclose(reading.similarity[a.label][-1], 1, rtol=1e-4)


def test_read_weights_before_and_after_the_update():
    run, ids, reading = reading_of("lm2_tiny", 100, shown=1)
    reads, slots = reading.segment_reads, run.config.model.memory.num_slots
    assert list(reads.before) == list(reads.after) == [0, 1]
    assert list(reads.tokens) == list(ids[32:64])
    for block in (0, 1):
        assert reads.before[block].shape == (32, slots)
        np.testing.assert_allclose(reads.before[block].sum(axis=1), 1, rtol=1e-5)
        assert np.abs(reads.before[block] - reads.after[block]).max() > 1e-3
        # The first block sees the same queries in both, so that only the memory differs.
        np.testing.assert_allclose(reading.usage[block][1], reads.before[block].mean(axis=0), rtol=1e-5)
    asked = ask(reading.memory, ids[:40])
    assert asked.weights[0].shape == (40, slots)
    np.testing.assert_allclose(asked.probabilities.sum(), 1, rtol=1e-5)


def test_what_can_be_inspected_costs_training_nothing(monkeypatch):
    """The program of a training step is the same with a `reveal` that does nothing."""
    model = lm2_jax.build_model(lm2_jax.preset("lm2_paper_tiny").model)
    params, state = generic_params(model, 0), model.init_state(2)

    def program_text() -> str:
        def loss(params):
            return model.apply({"params": params}, jnp.zeros((2, 64), jnp.int32), state)[0].sum()

        return jax.jit(jax.grad(loss)).lower(params).as_text()

    before = program_text()
    for module in (base, gated_bank, residual):
        monkeypatch.setattr(module, "reveal", lambda *_: None)
    assert program_text() == before
    assert set(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 32), jnp.int32), state)) == {"params"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--text", "missing.txt"), r"--text missing.txt: no such file"),
        (("--text", "."), r"--text .: expected a text file, this is a folder"),
        (("--text", "empty.txt"), r"--text empty.txt: the file is empty"),
        (("--text", "binary"), r"--text binary: expected (UTF-8 )?text"),
        (("--text", "short.txt"), r"the text has 5 tokens, 0 full segments of 32; one is needed: choose"),
        (("--segment", "9"), r"segment 9, counted from 0, is needed: choose a longer text or another --segment"),
        (("--segment", "-1"), r"--segment -1: expected the number of a segment"),
        (("--recall-rows", "-1"), r"--recall-rows -1: expected 0 or more"),
        (("--question", " "), r"--question is empty"),
        (("--out", "text.txt"), r"--out text.txt: expected a folder, this is a file"),
        (("--out", "/proc/nothing"), r"--out='/proc/nothing': cannot write there"),
        (("--workdir", "nowhere"), r"nowhere: no run there; expected a folder with config.json"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_message(monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    if "--workdir" not in words:
        monkeypatch.setattr(runs, "load_run", lambda workdir: tiny_run("lm2_tiny"))
    for name, content in (("text.txt", text_of(70)), ("empty.txt", ""), ("short.txt", "short")):
        pathlib.Path(name).write_text(content)
    pathlib.Path("binary").write_bytes(b"a\0b\xff")
    given = {"--workdir": "tiny", "--text": "text.txt", "--out": "out", "--recall-rows": "0"}
    given[words[0]] = words[1]
    with pytest.raises(UserError, match=message):
        program.main([word for pair in given.items() for word in pair])
    assert pathlib.Path("text.txt").read_text() == text_of(70)
    assert not pathlib.Path("out", "report.html").exists()


def test_a_text_is_shown_as_text(inspect):
    """What a text contains cannot become markup."""
    page = inspect("none_tiny", "<script>alert('x')</script> & $a$ <b>bold</b>. " * 3)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert "<script>alert('x')</script> & $a$ <b>bold</b>." in page.text


def test_sentences_are_ranked_by_mean_loss():
    texts = [*"Aaaa. ", *"Bbbb bbb! ", *"Cc. ", *"Dddd"]
    losses = np.array([np.nan, *[1.0] * 5, *[3.0] * 10, *[9.0] * 4, *[2.0] * 4])
    ranked = rank_sentences(texts, losses)
    assert [(s.text, s.first, s.tokens, s.loss) for s in ranked] == [
        ("Cc.", 16, 4, 9.0), ("Bbbb bbb!", 6, 10, 3.0), ("Dddd", 20, 4, 2.0), ("Aaaa.", 0, 6, 1.0)
    ]  # fmt: skip
    assert rank_sentences([], np.zeros(0)) == []


def test_tokens_have_the_text_of_complete_letters():
    tokenizer = tiny_run("lm2_tiny").tokenizer
    ids = tokenizer.encode("aé…b")
    texts = token_texts(tokenizer, ids)
    assert texts == ["a", "", "é", "", "", "…", "b"]


@pytest.mark.slow
def test_the_program_on_a_real_workdir(tmp_path):
    workdir = ROOT / "tests" / "golden" / "workdirs" / "lm2_tiny"
    (tmp_path / "book.txt").write_text("Mary went to the office. John moved to the garden. " * 20)
    out = tmp_path / "out"
    line = [sys.executable, "-m", "lm2_jax", "inspect", "--workdir", str(workdir), "--text", str(tmp_path / "book.txt")]
    line += ["--question", "Where is Mary?", "--out", str(out), "--recall-rows", "2"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = Parsed((out / "report.html").read_text())
    check_page(page, out)
    assert "recall" in names(out)
    wrong = subprocess.run([*line[:3], "inspect", "--text", "x"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: the page was checked with html.parser alone")
    browser = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    browser += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,6000"]
    shot = [*browser, f"--screenshot={tmp_path / 'page.png'}", (out / "report.html").as_uri()]
    shown = subprocess.run(shot, capture_output=True, text=True, timeout=120, env=dict(os.environ), check=False)
    assert "CONSOLE" not in shown.stderr  # what a page complains of is logged under this name
    from matplotlib.image import imread

    assert imread(tmp_path / "page.png").std() > 0.05
