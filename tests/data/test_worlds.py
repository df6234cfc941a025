"""The simulated worlds of qa1 to qa5, held against the real files and against two readers."""

import functools
import math
from collections import Counter

import pytest

from lm2_jax.data.babi import WORLD_TASKS, parse_question, parse_statement, read_samples, samples_of
from lm2_jax.data.philox import Draws
from lm2_jax.data.story_tracker import StoryTracker
from lm2_jax.data.worlds import simulate_sample, simulate_story
from tests.data.reading import read_answer

FEW, SAMPLES = 300, 5000


@functools.cache
def simulated(task, count):
    """Samples, each from a story of its own (the five of one story are alike); of the long qa3 all five."""
    if task == "qa3":
        return [s for i in range(count // 5) for s in samples_of(simulate_story(task, Draws(7, i)))]
    return [simulate_sample(task, Draws(7, i)) for i in range(count)]


@functools.cache
def real(folder, task, *splits):
    return [sample for split in splits for sample in read_samples(folder, task, split)]


def variation(first, second):
    """Total variation between two samples."""
    a, b = Counter(first), Counter(second)
    return sum(abs(a[key] / a.total() - b[key] / b.total()) for key in a | b) / 2


def binned(length):
    """Lengths up to 10 as they are, then two bins for each doubling: 4 to 320 statements in qa3."""
    return length if length <= 10 else 10 + int(2 * math.log2(length / 10))


# The file of qa3 is cut: 585 stories are left, whose answers are 0.056 from equal shares. Of 25 simulated sets of that
# size half were more than 0.024 away and one 0.049, so that is chance, and no simulator could be held to 0.03.
BOUNDS = {"qa3": {"answer": 0.07, "length": 0.05, "far": 0.05}}


@pytest.mark.slow
@pytest.mark.parametrize("task", WORLD_TASKS)
def test_distributed_like_the_real_files(data_dir, task):
    ours, theirs = simulated(task, SAMPLES), real(str(data_dir / "babi" / "en-10k"), task, "train", "test")
    assert len(ours) == SAMPLES

    features = {
        "answer": lambda s: s.answer,
        "length": lambda s: binned(len(s.facts)),
        "near": lambda s: len(s.facts) - max(s.support),
        "far": lambda s: binned(len(s.facts) - min(s.support)),
        "question": lambda s: parse_question(s.question).kind,
    }
    for name, feature in features.items():
        assert variation(map(feature, ours), map(feature, theirs)) <= BOUNDS.get(task, {}).get(name, 0.03), name
    assert {len(s.support) for s in ours} == {len(s.support) for s in theirs}


@pytest.mark.parametrize("task", WORLD_TASKS)
def test_a_few_samples_are_distributed_like_the_real_files(data_dir, task):
    """The same for the quick lane: far fewer samples on both sides, and so several times the noise."""
    ours, theirs = simulated(task, FEW), real(str(data_dir / "babi" / "en-10k"), task, "test")
    features = (lambda s: s.answer, lambda s: binned(len(s.facts)), lambda s: len(s.facts) - max(s.support))
    for feature in features:
        assert variation(map(feature, ours), map(feature, theirs)) <= 0.15


@pytest.mark.parametrize("task", WORLD_TASKS)
def test_statements_are_worded_like_the_real_files(data_dir, task):
    def wordings(samples):
        """Each statement without the names in it."""
        for sample in samples[:FEW]:
            for fact in sample.facts:
                event = parse_statement(fact)
                yield " ".join(word for word in fact.split() if word.strip(".") not in event.words)

    ours, theirs = simulated(task, FEW), real(str(data_dir / "babi" / "en-10k"), task, "test")
    assert variation(wordings(ours), wordings(theirs)) <= 0.1


@pytest.mark.parametrize("task", WORLD_TASKS)
def test_answers_follow_from_the_statements(task):
    for index in range(25):
        tracker, told = StoryTracker(), []
        for line in simulate_story(task, Draws(11, index)):
            if line.answer is None:
                tracker.add(parse_statement(line.text), len(told))
                told.append((line.number, line.text))
                continue
            known = tracker.answer(parse_question(line.text))
            assert known is not None
            assert known.answer == line.answer
            if task != "qa3":  # its files count a later drop among the support, from which nothing can be read
                assert told[known.latest][0] == max(line.support)
            read = read_answer([text for _, text in told], line.text)
            assert read == (known.answer, known.latest)


@pytest.mark.parametrize("task", WORLD_TASKS)
def test_the_same_index_is_the_same_story(task):
    stories = [simulate_story(task, Draws(3, i)) for i in range(20)]
    assert stories == [simulate_story(task, Draws(3, i)) for i in range(20)]
    assert stories[0] != stories[1]
    assert stories != [simulate_story(task, Draws(4, i)) for i in range(20)]
    for story in stories:
        assert [line.number for line in story] == list(range(1, len(story) + 1))
        assert sum(line.answer is not None for line in story) == (1 if task == "qa4" else 5)


def test_draws_are_those_of_any_machine():
    """Numbers that must never change: else every data set changes with them."""
    draws = Draws(1, 2, 3)
    assert [draws.below(1000) for _ in range(5)] == [49, 77, 881, 726, 392]
    assert Draws(0).weighted("abc", (0.0, 1.0, 0.0)) == "b"
    assert sorted(Draws(5).subset(range(9), 9)) == list(range(9))
