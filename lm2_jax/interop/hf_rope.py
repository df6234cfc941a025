"""RoPE in Hugging Face's `config.json`: `rope_theta` with `rope_scaling`, or the newer `rope_parameters` for both."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lm2_jax.errors import UserError
from lm2_jax.interop.plain_values import a_number, a_switch, an_integer
from lm2_jax.rope import DynamicScaling, LinearScaling, Llama3Scaling, RopeScaling, YarnScaling, yarn_factor

_ORIGINAL, _LONGEST = "original_max_position_embeddings", "max_position_embeddings"


class _Names(NamedTuple):
    """How a table names the fields of a scaling."""

    needed: Mapping[str, str]  # our field -> theirs
    optional: Mapping[str, str] = {}  # those that may be absent or null, with the same default
    has_original: bool = False  # whether the table has the original length, apart from the present one


_NAMES: dict[type[RopeScaling], _Names] = {
    LinearScaling: _Names({"factor": "factor"}),
    DynamicScaling: _Names({"factor": "factor"}),
    Llama3Scaling: _Names(
        {
            "factor": "factor",
            "low_frequency_factor": "low_freq_factor",
            "high_frequency_factor": "high_freq_factor",
        },
        has_original=True,
    ),
    YarnScaling: _Names(
        {"factor": "factor"},
        {
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "attention_factor": "attention_factor",
            "truncate": "truncate",
        },
        has_original=True,
    ),
}
ROPE_TYPES = ("default", *sorted(cls.kind for cls in _NAMES))


def read_rope(plain: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base frequency and scaling.

    Args:
      plain: content of a config.json.
      where: path of the file, for messages.
    Raises:
      UserError: a type that is not supported, or a field of it that is missing or wrong.
      ValueError: a value outside its range.
    """
    # Where a config has both, transformers takes the older name.
    name = next((key for key in ("rope_scaling", "rope_parameters") if plain.get(key)), "rope_scaling")
    table = plain.get(name) or {}
    if not isinstance(table, dict):
        raise UserError(f"{where}: {name}: expected a table, got {table!r}", status=1)
    if any(isinstance(value, dict) for value in table.values()):
        raise UserError(f"{where}: {name}: a RoPE for each kind of layer is not supported", status=1)
    theta = a_number(table, "rope_theta", where, a_number(plain, "rope_theta", where, 10_000.0))
    kind = table.get("rope_type", table.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UserError(
            f"{where}: RoPE type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}",
            status=1,
        )
    if table.get("partial_rotary_factor", 1) not in (1, 1.0, None):
        raise UserError(f"{where}: partial_rotary_factor={table['partial_rotary_factor']} is not supported", status=1)
    if kind == "default":
        return theta, None
    return theta, _scaling(RopeScaling.find(kind), table, plain, f"{where}: {name} of type {kind!r}")


def _scaling(cls: type[RopeScaling], table: Mapping[str, Any], plain: Mapping[str, Any], where: str) -> RopeScaling:
    names = _NAMES[cls]
    values: dict[str, Any] = {ours: a_number(table, theirs, where) for ours, theirs in names.needed.items()}
    for ours, theirs in names.optional.items():
        if table.get(theirs) is not None:
            read = a_switch if isinstance(getattr(cls, ours), bool) else a_number
            values[ours] = read(table, theirs, where)
    if names.has_original:
        owner = next((t for t in (plain, table) if t.get(_ORIGINAL) is not None), None)
        values["original_tokens"] = an_integer(owner or plain, _ORIGINAL if owner else _LONGEST, where)
    elif cls is DynamicScaling:  # its config has the original length as the present one
        values["original_tokens"] = an_integer(plain, _LONGEST, where)
    if "attention_factor" in names.optional and "attention_factor" not in values:
        values["attention_factor"] = _attention_factor(table, where)
    return cls(**values)


def _attention_factor(table: Mapping[str, Any], where: str) -> float | None:
    """YaRN's factor as a quotient, as DeepSeek's configs have it; None: the default."""
    weights = [table.get(name) for name in ("mscale", "mscale_all_dim")]
    if not all(weights):
        return None
    factor = max(1.0, a_number(table, "factor", where))
    top, bottom = (yarn_factor(factor, a_number(table, name, where)) for name in ("mscale", "mscale_all_dim"))
    return top / bottom


def write_rope(scaling: RopeScaling) -> dict[str, Any]:
    """The table `rope_scaling`, which all versions of transformers read."""
    names = _NAMES[type(scaling)]
    table: dict[str, Any] = {"rope_type": scaling.kind}
    for ours, theirs in {**names.needed, **names.optional}.items():
        if getattr(scaling, ours) is not None:
            table[theirs] = getattr(scaling, ours)
    if names.has_original:
        table[_ORIGINAL] = getattr(scaling, "original_tokens")  # noqa: B009 (a type checker knows no such field here)
    return table
