import itertools
import json
import re

import numpy as np
import pytest

from lm2_jax import UserError
from lm2_jax.data.text_tokens import Encoder
from lm2_jax.demo import book, models, program


def test_a_part_tells_what_its_questions_ask():
    """What is known at the end of a part follows from its sentences."""
    run = models.load_model("lm2")
    encode, place, at, tokens = Encoder(run.tokenizer), {}, {}, 0
    for part in itertools.islice(book.write_parts(encode, 500, 60, seed=3), 4):
        assert part.tokens == len(run.tokenizer.encode(part.text)) >= 500
        for match in re.finditer(r"(Mary|John|Daniel|Sandra) [a-z ]+ to the (\w+)\.", part.text):
            place[match[1]] = match[2]
            at[match[1]] = tokens + len(run.tokenizer.encode(part.text[: match.end()]))
        tokens += part.tokens
        assert part.known == {p: book.Known(place[p], tokens - at[p]) for p in book.PERSONS}
        assert "?" not in part.text
    again = next(book.write_parts(encode, 500, 60, seed=3))
    assert again == next(book.write_parts(encode, 500, 60, seed=3)) != next(book.write_parts(encode, 500, 60, seed=4))


def test_the_models_are_small_and_of_equal_training():
    size = sum(file.stat().st_size for name in models.MODELS for file in (models.FOLDER / name).iterdir())
    assert size < 2e6
    lm2, none = (models.load_model(name) for name in models.MODELS)
    assert lm2.step == none.step
    assert lm2.config.data == none.config.data
    assert lm2.config.optim == none.config.optim
    assert lm2.config.model.has_memory
    assert not none.config.model.has_memory


def test_a_text_that_is_too_short_is_refused(tmp_path):
    with pytest.raises(UserError, match="--tokens 10: expected at least 1000"):
        program.main(["--out", str(tmp_path / "out"), "--tokens", "10"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_short_demonstration(tmp_path, capsys):
    program.main(["--out", str(tmp_path), "--tokens", "6000"])
    found = json.loads((tmp_path / "demo.json").read_text())
    assert len(found["asked"]) == program.QUESTIONS
    text = capsys.readouterr().out
    for one in found["asked"]:
        assert f"{book.question(one['person'])}" in text
    # What was measured on the same texts, wherever this runs: the memory answers, the baseline guesses.
    correct, asked = np.array([[group["correct"], group["asked"]] for group in found["by_distance"]["lm2"][1:6]]).sum(0)
    baseline = sum(group["correct"] for group in found["by_distance"]["none"][1:6])
    assert correct / asked > baseline / asked + 0.1
    first = {file.name: file.read_bytes() for file in tmp_path.glob("*.memory")}
    assert len(first) == 2 * program.PARTS
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report" / "report.html").exists()
