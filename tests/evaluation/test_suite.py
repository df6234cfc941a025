"""The base of suites, by the suite that docs/evaluation.md adds."""

import dataclasses
import json
import pathlib
import re
import types
from collections.abc import Mapping, Sequence
from typing import ClassVar

import pytest

from lm2_jax.errors import UserError
from lm2_jax.evaluation import SUITES, report
from lm2_jax.evaluation.answerer import Answerer, Prompt, RunAnswerer
from lm2_jax.evaluation.suite import Evaluation, Output, Suite
from tests.data.reading import WordTokenizer

NAMES = (dataclasses, Mapping, Sequence, ClassVar, report, Prompt, RunAnswerer, Evaluation, Output, Suite)


@pytest.fixture
def suite():
    """The class of the documentation's example, registered for one test."""
    text = (pathlib.Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = dict(globals())
    exec(compile(code, "docs/evaluation.md", "exec"), names)
    yield names["Continuation"]
    del SUITES["continuation"]


class Fixed:
    """An answerer whose log-likelihoods are known."""

    run = types.SimpleNamespace(tokenizer=WordTokenizer())

    def loglikelihood(self, pairs):
        return [-1.5 * len(text) for _, text in pairs]

    def answers(self, prompts, max_new_tokens, rows):
        raise NotImplementedError


def test_a_suite_is_one_class(suite, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(RunAnswerer, "load", lambda workdir, layout_of=None: Fixed())
    assert isinstance(Fixed(), Answerer)
    assert SUITES["continuation"] is suite
    suite(workdir=str(tmp_path / "run"), continuation="four").main()
    out = tmp_path / "run" / "eval" / "continuation.json"
    assert json.loads(out.read_text()) == {"suite": "continuation", "loglikelihood": -6.0}
    assert capsys.readouterr().out.splitlines() == ["log-likelihood: -6.000", f"wrote {out}"]


def test_bad_input_makes_no_folder(suite, monkeypatch, tmp_path):
    monkeypatch.setattr(RunAnswerer, "load", lambda workdir, layout_of=None: Fixed())

    def refuse(self, answerers):
        raise UserError("bad input")

    monkeypatch.setattr(suite, "plan", refuse)
    with pytest.raises(UserError, match="bad input"):
        suite(workdir=str(tmp_path / "run")).main()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to(suite, monkeypatch, tmp_path):
    monkeypatch.setattr(RunAnswerer, "load", lambda workdir, layout_of=None: Fixed())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out=.*cannot write there"):
        suite(workdir="w", out=str(tmp_path / "file")).main()
