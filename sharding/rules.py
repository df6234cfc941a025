"""The table from logical axis names to mesh axes; nothing else decides how arrays are split."""

from collections.abc import Iterable
from typing import TypeAlias

from lm2_jax.errors import UserError
from lm2_jax.registry import near_misses
from lm2_jax.sharding.mesh import AXES

MeshAxes: TypeAlias = str | tuple[str, ...] | None
Rule: TypeAlias = tuple[str, MeshAxes]

# In order of precedence: if two dimensions of an activation map to one mesh axis, the higher row gets it.
#
# The mesh axis `slots` splits what is long in a segment: the memory's slots and, so that no other work is replicated,
# the tokens. Like `fsdp`, it also splits the width of kernels.
RULES: tuple[Rule, ...] = (
    ("batch", ("data", "fsdp")),  # rows: each device has different rows
    ("copies", "data"),  # rows in the embedding, whose width is split over fsdp: only replicas add gradients
    ("heads", "model"),  # query heads, and the memory's heads: a head stays on one device
    ("kv_heads", "model"),  # key/value groups, on the devices of the query heads that use them
    ("mlp", "model"),  # hidden width of the feed-forward: one all-reduce per layer
    ("gate_width", "model"),  # width that a gate sums over: one all-reduce per gate
    ("vocab", ("model", "slots")),  # rows of embedding and head: logits stay split until the loss has reduced them
    ("slots", "slots"),  # memory rows, not on the axis of the heads: both index one array of scores
    ("time", "slots"),  # tokens of a segment: norms, projections and MLP of a token run on one device only
    ("embed", ("fsdp", "slots")),  # model width of a kernel, all-gathered layer by layer; replicated in activations
    ("row_width", "fsdp"),  # model width of arrays with a row per token or slot, which `slots` splits already
    ("segments", None),  # segments of a row: processed one after the other
    ("window", None),  # tokens of an attention window, and learned positions: few, and every device needs them
    ("layers", None),  # stacked layers: processed one after the other
    ("head", None),  # width of a head: too small to split, and contracted in every score
    ("rank", None),  # rank of a low-rank adapter: small
    ("chunk", None),  # chunks of an inner memory: processed one after the other
    ("hidden", "slots"),  # hidden width of an inner memory, whose tokens are processed one after the other
    ("inner", None),  # width of an inner memory's rows: its heads are split instead
    ("norm", None),  # scales of a norm: a few kilobytes
    ("state_embed", None),  # width of a memory row: its rows are split instead
)

# Config fields that set the size of a dimension, for messages; `model.memory` includes the memories of the parts of a
# mixed join.
FIELDS: dict[str, tuple[str, ...]] = {
    "batch": ("data.rows", "optim.accumulate"),
    "copies": ("data.rows", "optim.accumulate"),
    "heads": ("model.decoder.num_heads", "model.memory.num_heads"),
    "kv_heads": ("model.decoder.num_kv_heads", "model.memory.num_heads"),
    "mlp": ("model.decoder.mlp_width", "model.memory.write.mlp_width"),
    "gate_width": ("model.decoder.width",),
    "vocab": ("model.vocab_size",),
    "slots": ("model.memory.num_slots", "model.memory.num_tokens", "model.memory.num_memories"),
    "time": ("model.segment_tokens",),
    "hidden": ("model.memory.network.expansion", "model.memory.num_heads"),
    "embed": ("model.decoder.width",),
    "row_width": ("model.decoder.width",),
}


def check_rules(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Returns `rules` if every name has one row and every mesh axis exists.

    Raises:
      UserError: a name with two rows, an unknown mesh axis, one that is repeated in a row, or tokens and slots on
        different mesh axes.
    """
    rules = tuple(rules)
    names = [name for name, _ in rules]
    for name, axes in rules:
        if names.count(name) > 1:
            raise UserError(f"Sharding rules: {name!r} has {names.count(name)} rows; each name needs exactly one.")
        axes = mesh_axes(axes)
        for axis in axes:
            if axis not in AXES:
                raise UserError(
                    f"Sharding rules: {name!r} names the mesh axis {axis!r}; known: {list(AXES)}."
                    f"{near_misses(axis, list(AXES))}"
                )
        if len(set(axes)) != len(axes):
            raise UserError(f"Sharding rules: {name!r} repeats a mesh axis: {axes}.")
    table = dict(rules)
    if {"time", "slots"} <= table.keys() and mesh_axes(table["time"]) != mesh_axes(table["slots"]):
        raise UserError(
            f"Sharding rules: 'time' maps to {table['time']!r} and 'slots' to {table['slots']!r}. They need the "
            "same mesh axes, because each device reads and writes a memory bank with its shard of both."
        )
    return rules


def mesh_axes(axes: MeshAxes) -> tuple[str, ...]:
    """The mesh axes of a row as a tuple, empty for a dimension that is not split."""
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else axes
