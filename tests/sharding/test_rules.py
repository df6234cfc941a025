import pytest

from lm2_jax.errors import UserError
from lm2_jax.sharding.rules import RULES, check_rules


def test_the_table_holds_the_names_of_the_project():
    assert {name for name, _ in check_rules(RULES)} == {
        *("batch", "copies", "time", "embed", "heads", "kv_heads", "head", "mlp", "vocab", "layers"),
        *("slots", "chunk", "inner", "hidden", "segments", "norm", "state_embed", "window", "gate_width", "row_width"),
        "rank",
    }


def test_slots_and_heads_are_on_different_mesh_axes():
    table = dict(RULES)
    assert table["slots"] == "slots"
    assert table["heads"] == table["kv_heads"] == "model"


def test_tokens_are_split_where_slots_are_so_that_no_work_is_done_twice():
    table = dict(RULES)
    assert table["time"] == table["slots"]


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([("embed", "fsdp"), ("embed", None)], ["'embed'", "2 rows"]),
        ([("embed", "fdsp")], ["'embed'", "'fdsp'", "Did you mean 'fsdp'"]),
        ([("batch", ("data", "data"))], ["'batch'", "repeats"]),
        ([("time", None), ("slots", "slots")], ["'time'", "'slots'", "same mesh axes"]),
    ],
)
def test_a_wrong_table_is_refused(rules, words):
    with pytest.raises(UserError) as caught:
        check_rules(rules)
    assert all(word in str(caught.value) for word in words), caught.value
