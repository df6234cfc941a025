"""What fields declare: ranges, formats and what a resumed run may change; walked over every config class."""

import dataclasses
import json
import math
import pathlib
import re
from typing import Annotated, Any, ClassVar

import pytest

import lm2_jax
from lm2_jax.config import CheckpointConfig, RunConfig, changes, from_dict, to_dict
from lm2_jax.config_file import read_table
from lm2_jax.errors import UserError
from lm2_jax.fields import (
    DEFAULT_RANGES,
    FREE,
    GROWS,
    Checked,
    Range,
    Since,
    config_classes,
    flag_paths,
    hints,
    members,
    number_type,
    range_of,
)
from lm2_jax.registry import Family

FORMAT_1 = pathlib.Path(__file__).parent / "golden" / "config_format1"
NUMERIC = [
    (cls, name) for cls in config_classes() for name, hint in hints(cls).items() if number_type(hint) is not None
]


def instance(cls: type) -> Any:
    """A config of a class, with a text for each field that has no default."""
    values = {field.name: "x" for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
    if {"parts", "weights"} <= values.keys():  # a mixture
        values = {"parts": (instance(members(lm2_jax.config.SourceConfig)[0]),), "weights": (1.0,)}
    return cls(**values)


def refused(cls: type, name: str, value: Any) -> str:
    """The message about a value of a field, in the class or in what holds it; empty where it is accepted."""
    hint = hints(cls)[name]
    old = instance(cls)
    given = (value,) if isinstance(getattr(old, name), tuple) or "tuple" in str(hint) else value
    holder = dataclasses.make_dataclass("Holder", [("held", cls)], bases=(Checked,), frozen=True)
    try:
        holder(dataclasses.replace(old, **{name: given}))
    except ValueError as error:
        return str(error)
    return ""


def test_every_class_of_every_family_is_walked():
    names = {cls.__name__ for cls in config_classes()}
    assert {"TitansConfig", "StepConfig", "MlpNetwork", "SlotsWrite", "Part", "TextFiles", "YarnScaling"} <= names
    assert len(NUMERIC) > 70


@pytest.mark.parametrize(("cls", "name"), NUMERIC, ids=[f"{cls.__name__}.{name}" for cls, name in NUMERIC])
def test_numbers_that_make_no_sense_are_refused_with_the_field(cls, name):
    allowed = range_of(cls, name)
    assert math.isfinite(allowed.min)
    assert math.isfinite(allowed.max)
    found = number_type(hints(cls)[name])
    wrong = [10**12 + 1, -(10**12)] if found is int else [math.nan, -math.inf, 1e13, -1e13]
    wrong += [math.inf] if found is float and not allowed.infinite else []
    wrong += [-1] if allowed.min >= 0 else []
    wrong += [allowed.min] if allowed.above else [allowed.min - 1]
    for value in wrong:
        value = float(value) if found is float else int(value)
        message = refused(cls, name, value)
        assert message, f"{name}={value} was accepted; range: {allowed}"
        assert name in message or name.removesuffix("s") in message, message


def test_values_of_all_presets_are_inside_by_construction():
    assert all(isinstance(run, RunConfig) for run in lm2_jax.PRESETS.values())


@pytest.mark.parametrize(
    ("allowed", "value", "problem"),
    [
        (Range(1, 10), 0, "must be at least 1"),
        (Range(1, 10), 11, "must be at most 10"),
        (Range(0, 10), -1, "must not be negative"),
        (Range(0, 10, above=True), 0, "must be positive"),
        (Range(0, 1), 2, "must lie between 0 and 1"),
        (Range(0, 1, below=True), 1, "must be at least 0 and below 1"),
        (Range(1, 10), math.nan, "must lie between 1 and 10"),
        (Range(0, 10), 10**400, "must be at most 10"),
    ],
)
def test_a_range_says_what_is_wrong(allowed, value, problem):
    assert not allowed.holds(value)
    assert allowed.problem(value) == problem


def test_infinity_is_legal_where_it_means_no_limit():
    assert Range(0, 10, infinite=True).holds(math.inf)
    assert not Range(0, 10, infinite=True).holds(math.nan)


def test_default_ranges_cover_every_name():
    assert [pattern for pattern, kind, _ in DEFAULT_RANGES if pattern == "*" and kind in (int, float)] == ["*", "*"]


def test_a_field_is_named_as_its_flag():
    assert flag_paths(members(lm2_jax.config.MemoryConfig)[0]) == ["model.memory"]
    assert flag_paths(RunConfig) == [""]


def test_the_configs_of_format_1_have_every_class_of_their_time():
    """So that a field that is added without `Since` is noticed, whichever class it is in."""
    kinds = set(re.findall(r'"kind": "(\w+)"', "".join(path.read_text() for path in FORMAT_1.glob("*.json"))))
    assert kinds >= set(
        "babilong bpe block context gate gated_bank huber json layer linear mix mixed mixer mlp none paper plain power "
        "product residual shards slots squared swiglu text tfds titans tokens".split()
    )


PRESETS_NOW = {"lm2_1p7b": "lm2_1p7b_paper"}  # a preset that has another form of the memory since


@pytest.mark.parametrize("path", sorted(FORMAT_1.glob("*.json")), ids=lambda path: path.stem)
def test_a_config_of_format_1_is_the_same_run(path):
    plain = json.loads(path.read_text())
    assert "format" not in plain
    run = from_dict(RunConfig, plain)
    assert to_dict(run)["format"] == RunConfig.format
    assert from_dict(RunConfig, to_dict(run)) == run
    if path.stem in lm2_jax.PRESETS:
        preset = lm2_jax.preset(PRESETS_NOW.get(path.stem, path.stem))
        assert changes(run, dataclasses.replace(preset, name=run.name)) == []


@dataclasses.dataclass(frozen=True)
class Inner(Checked):
    """A group of a later format."""

    steps: int = 3
    shape: Annotated[str, Since(2, old="flat")] = "round"


class Kind(Family):
    """A family that came with format 2."""

    first_kind: ClassVar[str | None] = "plain"
    renamed_kinds: ClassVar[dict[str, str]] = {"simple": "plain"}


@dataclasses.dataclass(frozen=True)
class Plain(Kind):
    """Its first member."""

    kind: ClassVar[str] = "plain"
    value: int = 1


@dataclasses.dataclass(frozen=True)
class Later(Checked):
    """A root config with a history."""

    format: ClassVar[int] = 3
    renamed_fields: ClassVar[dict[str, str]] = {"old_name": "name", "warmup": "inner.steps"}

    name: Annotated[str, FREE] = "x"
    inner: Annotated[Inner, Since(2, old=Inner(shape="flat"))] = Inner()
    part: Kind = Plain()
    rate: Annotated[float, Since(3, old=0.0)] = 0.5
    length: Annotated[int, GROWS] = 4
    width: Annotated[int, Since(3)] = 9
    height: Annotated[int, Since(3, old=lambda table: table["length"] + 1)] = 2


def test_a_field_of_a_later_format_takes_its_old_value():
    old = {"old_name": "a", "warmup": 7, "part": {"value": 2}, "length": 4}
    assert from_dict(Later, old) == Later("a", Inner(7, "flat"), Plain(2), 0.0, width=9, height=5)


def test_without_its_old_value_a_missing_field_is_damage():
    plain = to_dict(Later())
    del plain["rate"]
    with pytest.raises(UserError, match=r"missing \['rate'\]"):
        from_dict(Later, plain)
    assert from_dict(Later, plain | {"format": 2}).rate == 0.0


def test_renamed_kinds_are_followed():
    plain = to_dict(Later())
    plain["part"]["kind"] = "simple"
    assert from_dict(Later, plain) == Later()


def test_a_newer_format_is_refused_with_both_versions():
    with pytest.raises(UserError, match=r"format 4 by lm2_jax 9\.9; this version reads formats 1 to 3"):
        from_dict(Later, to_dict(Later()) | {"format": 4, "version": "9.9"})
    for damaged in (0, "2", True, None, 1.5):
        with pytest.raises(UserError, match=r"config\.format: expected a positive whole number"):
            from_dict(Later, to_dict(Later()) | {"format": damaged})


def test_changes_say_what_a_resumed_run_may_do():
    new = Later(name="b", inner=Inner(steps=9), length=8)
    found = {change.name: change for change in changes(Later(), new)}
    assert {name: change.rule for name, change in found.items()} == {
        "name": "free",
        "inner.steps": "fixed",
        "length": "grows",
    }
    assert [name for name, change in found.items() if change.allowed] == ["length", "name"]
    assert not changes(new, Later())[1].allowed, "length shrinks"


def test_what_a_resumed_run_may_change_is_said_at_the_field():
    run = lm2_jax.preset("lm2_tiny")
    new = dataclasses.replace(run, name="b", checkpoint=CheckpointConfig(every_steps=7, keep=1, memory_every=2))
    assert all(change.allowed for change in changes(run, new))
    other = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, memory_dtype="bfloat16"))
    assert [(change.name, change.allowed) for change in changes(run, other)] == [("checkpoint.memory_dtype", False)]
    memory = dataclasses.replace(run, model=lm2_jax.preset("rmt_tiny").model)
    assert "model.memory.kind" in {change.name for change in changes(run, memory)}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", "{", "damaged"),
        ("a.json", "[" * 100_000, "nested too deep"),
        ("a.json", '{"a": ' + "1" * 5000 + "}", "damaged"),
        ("a.yaml", "a: [", "damaged"),
        ("a.yaml", "a: !!python/object/apply:os.system [ls]", "damaged"),
    ],
)
def test_a_damaged_file_is_one_message(name, text, words):
    with pytest.raises(UserError, match=words) as caught:
        read_table(name, text)
    assert caught.value.status == 1
    assert len(str(caught.value)) < 500


def test_yaml_numbers_without_a_dot_are_numbers():
    assert read_table("a.yml", "a: 1e-3\nb: [2, 3e2]") == {"a": 1e-3, "b": [2, 300.0]}


def test_a_missing_yaml_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    with pytest.raises(UserError, match="pip install pyyaml"):
        read_table("a.yaml", "a: 1")
