"""What suites ask of a trained run. tests/inference has the tests of how answers are generated."""

import pytest

from lm2_jax import UserError
from lm2_jax.evaluation.answerer import Prompt, RunAnswerer, even_batches
from tests.inference.subjects import text_of, tiny_run


@pytest.fixture(scope="module")
def run():
    return tiny_run("lm2_tiny")


def test_each_answer_comes_with_its_prompt_and_prompts_are_taken_when_there_is_room(run):
    taken = []

    def prompts():
        for number, length in enumerate((70, 3, 100, 3, 3)):
            taken.append(number)
            yield Prompt(run.tokenizer, f"{number}" + text_of(length))

    most, found = 0, []
    for answer in RunAnswerer(run).answers(prompts(), 4, rows=2):
        most = max(most, len(taken) - len(found))
        found.append(answer)
        assert answer.prompt.context.startswith(str(answer.number))
    assert sorted(answer.number for answer in found) == taken == [0, 1, 2, 3, 4]
    assert found[0].number == 1  # the short one ends first, and its row takes the next
    assert most <= 2
    alone = {a.number: a.text for a in RunAnswerer(run).answers(prompts(), 4, rows=1)}
    assert alone == {answer.number: answer.text for answer in found}


def test_bad_arguments(run):
    answerer = RunAnswerer(run)
    assert list(answerer.answers([], 1, rows=3)) == []
    with pytest.raises(UserError, match="prompt 1 is empty"):
        list(answerer.answers([Prompt(run.tokenizer, "a"), Prompt(run.tokenizer, "")], 1, rows=2))
    with pytest.raises(UserError, match="max_new_tokens=0"):
        list(answerer.answers([Prompt(run.tokenizer, "a")], 0, rows=1))


def test_even_batches():
    assert even_batches([5, 1, 4, 2, 3], 2) == [[1, 3], [4, 2], [0]]
    assert [len(batch) for batch in even_batches(range(100), 32)] == [25] * 4
    assert even_batches([], 3) == []
