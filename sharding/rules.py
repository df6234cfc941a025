"""The table from logical axis names to mesh axes; the only place that decides what is split over what."""

from collections.abc import Iterable
from typing import TypeAlias

from lm2_jax.errors import UserError
from lm2_jax.registry import near_misses
from lm2_jax.sharding.mesh import AXES

MeshAxes: TypeAlias = str | tuple[str, ...] | None
Rule: TypeAlias = tuple[str, MeshAxes]

# In order of precedence: where two dimensions of an activation want one mesh axis, the upper row has it.
#
# The mesh axis `slots` splits whatever is long in a segment: the memory's slots and, so that no other work is done
# more than once, the tokens; and, like `fsdp`, the width of the kernels that all of them meet.
RULES: tuple[Rule, ...] = (
    ("batch", ("data", "fsdp")),  # rows: every device that holds its own piece of the work
    ("copies", "data"),  # rows in the embedding, whose width is split over fsdp: only copies of the model add gradients
    ("heads", "model"),  # query heads, and the memory's heads: one head never leaves its device
    ("kv_heads", "model"),  # key/value groups, beside the query heads that read them
    ("mlp", "model"),  # hidden width of the feed-forward: one sum over devices per layer
    ("gate_width", "model"),  # width that a gate sums over: one sum over devices per gate
    ("vocab", ("model", "slots")),  # rows of embedding and head: logits stay split until the loss has reduced them
    ("slots", "slots"),  # memory rows, on an axis of their own: they meet heads in one score array
    ("time", "slots"),  # tokens of a segment: norms, projections and MLP of each on one device only
    ("embed", ("fsdp", "slots")),  # model width of a kernel: gathered for a layer at a time; whole in activations
    ("row_width", "fsdp"),  # model width of what has a row per token or slot: those lie on `slots` already
    ("segments", None),  # segments of a row: read one after the other
    ("window", None),  # tokens of an attention window: a few that every token of the next segment needs
    ("layers", None),  # stacked layers: the loop takes them one by one
    ("head", None),  # width of one head: too small to split, and contracted in every score
    ("chunk", None),  # chunks of an inner memory: a loop
    ("hidden", "slots"),  # hidden width of an inner memory, whose tokens are read one after the other
    ("inner", None),  # width of an inner memory's rows: its heads are split instead
    ("norm", None),  # scales of a norm: a few kilobytes
    ("state_embed", None),  # width of a memory row: its rows are split instead
)

# Fields of a run that set the size of a dimension, for messages; `model.memory` stands for the memories of a mixed
# join's parts too.
FIELDS: dict[str, tuple[str, ...]] = {
    "batch": ("data.rows", "optim.accumulate"),
    "copies": ("data.rows", "optim.accumulate"),
    "heads": ("model.decoder.num_heads", "model.memory.num_heads"),
    "kv_heads": ("model.decoder.num_kv_heads", "model.memory.num_heads"),
    "mlp": ("model.decoder.mlp_width", "model.memory.write.mlp_width"),
    "gate_width": ("model.decoder.width",),
    "vocab": ("model.vocab_size",),
    "slots": ("model.memory.num_slots", "model.memory.num_tokens"),
    "time": ("model.segment_tokens",),
    "hidden": ("model.memory.network.expansion", "model.memory.num_heads"),
    "embed": ("model.decoder.width",),
    "row_width": ("model.decoder.width",),
}


def check_rules(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """`rules` as they are, if every name stands once and every mesh axis exists.

    Raises:
      UserError: a name that stands twice, a mesh axis that is unknown or named twice in a row, or tokens and slots
        on different ones.
    """
    rules = tuple(rules)
    names = [name for name, _ in rules]
    for name, axes in rules:
        if names.count(name) > 1:
            raise UserError(f"Sharding rules: {name!r} stands {names.count(name)} times; each name needs one row.")
        axes = mesh_axes(axes)
        for axis in axes:
            if axis not in AXES:
                raise UserError(
                    f"Sharding rules: {name!r} names the mesh axis {axis!r}; known: {list(AXES)}."
                    f"{near_misses(axis, list(AXES))}"
                )
        if len(set(axes)) != len(axes):
            raise UserError(f"Sharding rules: {name!r} names a mesh axis twice: {axes}.")
    table = dict(rules)
    if {"time", "slots"} <= table.keys() and mesh_axes(table["time"]) != mesh_axes(table["slots"]):
        raise UserError(
            f"Sharding rules: 'time' lies on {table['time']!r} and 'slots' on {table['slots']!r}; a bank is read and "
            "written by devices that each hold a part of both, so they need the same mesh axes."
        )
    return rules


def mesh_axes(axes: MeshAxes) -> tuple[str, ...]:
    """A row's right side as a tuple, empty for a dimension that stays whole."""
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else axes
