"""The interface that every memory implements; docs/adding_a_memory.md is its guide.

A memory declares what it can do (`Capability`); a join declares what it requires and does not know kinds of memory.
There are two shapes:

- a *store* answers `read` from its state at the segment's start and takes the segment with `write` at its end;
- a *running* memory has `advance(inputs, state) -> (outputs, state)` over any number of tokens.

Full segments, streams of pieces, resets, padding and packed documents are derived from these methods by
`lm2_jax.blocks.ports`.
"""

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from lm2_jax.decoder import DecoderConfig
from lm2_jax.parameters import MEMORY
from lm2_jax.precision import Precision, at_least_float32
from lm2_jax.registry import Family
from lm2_jax.state import check_state
from lm2_jax.types import Array, Bool, Float, Int, State

Metrics = dict[str, Array]  # scalars by name, to which a call adds
INSIGHT = "insight"  # the collection of what `reveal` keeps: arrays per token, for `lm2_jax.inspect`
READ_WEIGHTS = "read_weights"  # [B T H N]: the share of each slot in what a token reads; only where there are slots


class Capability(enum.Flag):
    """What a memory can do, and what a join requires."""

    NONE = 0
    READ = enum.auto()  # `reader`, `read`: answers queries from a state that does not change meanwhile
    ROWS = enum.auto()  # `rows`: is a set of rows, which a join may attend to with its own projections
    WRITE = enum.auto()  # `write`: takes the tokens of a segment
    WRITE_THROUGH_BLOCK = enum.auto()  # `query_rows`, `write`: takes its own rows after they went through the block
    RUNNING = enum.auto()  # `advance`: a token sees what the tokens of its segment up to it have written
    SHAREABLE = enum.auto()  # one state may serve all layers: what a document begins with is no parameter of a layer
    PACKED = enum.auto()  # `read` depends on its own token alone, and `advance` honours a reset at any token
    HEADS = enum.auto()  # `reader`, `read_heads`, `write_heads`: takes attention's own queries, keys and values
    LAYER_TOKENS = enum.auto()  # `reader`, `look_up`: answers tokens; `write`: takes a layer's output at memory tokens
    STACK_TOKENS = enum.auto()  # `rows` travel through the decoder with each segment, `write` takes their outputs
    RECALL = enum.auto()  # `recall`: a row for a segment, found with a summary of tokens; `write` takes its output
    MERGE = enum.auto()  # `merged`: the states after different texts can be added up


class TokenInputs(NamedTuple):
    """Tokens as a running memory takes them."""

    x: Float[Array, "B T D"]
    valid: Bool[Array, "B T"]  # false: padding, which leaves the state as it is
    reset: Bool[Array, "B T"] | None = None  # the token begins a document; given only to memories with PACKED
    position: Int[Array, "B T"] | None = None  # in the segment; None: the T tokens are a full segment


@dataclasses.dataclass(frozen=True)
class MemoryConfig(Family):
    """Base of all memory configs; `model.memory` of a run."""

    optional_capabilities: ClassVar[Capability] = Capability.NONE  # that some settings have, for messages

    @property
    def capabilities(self) -> Capability:
        """What the memory can do as configured."""
        raise NotImplementedError

    @property
    def top_k(self) -> int | None:
        """How many rows a query of the join's own may see; None: all."""
        return None

    @property
    def stack_tokens(self) -> int:
        """With STACK_TOKENS and LAYER_TOKENS, how many rows travel with a segment."""
        return 0

    @property
    def least_segments(self) -> int:
        """Segments of a row that begins without memory, below which some parameters have no gradient."""
        return 1

    @property
    def merge_obstacle(self) -> str:
        """Without MERGE, why states cannot be added up, for messages."""
        return "this kind of memory does not define a sum of two states"

    def build(self, width: int, precision: Precision, **linen: Any) -> "Memory":
        """The module for a decoder of this width; `linen` passes on `name` or `parent`."""
        raise NotImplementedError

    def build_for(self, decoder: DecoderConfig, precision: Precision, **linen: Any) -> "Memory":
        """The module for a decoder; overridden where more of it counts than its width."""
        return self.build(decoder.width, precision, **linen)

    def check_segment(self, segment_tokens: int) -> None:
        """Raises ValueError, naming the field to change, where the memory cannot work in such segments."""

    def check_module(self, width: int, precision: Precision) -> None:
        """Raises TypeError where the module lacks a method that `capabilities` promise, or cannot be reset."""
        module = self.build(width, precision, parent=None)
        for capability, names in _METHODS.items():
            missing = [name for name in names if getattr(type(module), name) is getattr(Memory, name)]
            if capability in self.capabilities and missing:
                raise TypeError(f"memory {self.kind!r} declares {capability.name} but does not define {missing}")
        overridden = [name for name in ("open", "close") if getattr(type(module), name) is not getattr(Memory, name)]
        if len(overridden) == 1:
            raise TypeError(
                f"memory {self.kind!r} defines {overridden[0]} alone; `open` and `close` convert between the state at "
                "a border and inside a segment: define both or neither"
            )
        check_state(module.state_axes(), f"memory {self.kind!r}")


class Memory(nn.Module):
    """What is stored, and how; where it meets attention is the join's business.

    A state is a NamedTuple with the flag `is_start` [B], true where the row begins a document. The caller maintains
    the flag and puts `start_state` into such rows before it passes a state to any method below.
    """

    parameter_group: ClassVar[str] = MEMORY  # of every parameter made below this module

    def init_state(self, batch: int) -> State:
        """A state of `batch` rows that begin a document, everything but `is_start` zero; needs no parameters."""
        raise NotImplementedError

    def state_axes(self) -> State:
        """The same tree with the logical axis names of each array."""
        raise NotImplementedError

    def start_state(self) -> State:
        """What a document begins with, one row for all; by default zeros."""
        return self.init_state(1)

    def reader(self, state: State) -> Any:
        """What `read` needs of a state, computed once per segment, such as projected keys."""
        raise NotImplementedError

    def read(
        self, q_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"], reader: Any, metrics: Metrics | None = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Answers each token from the state that `reader` was made of.

        Args:
          q_BTD: queries in the compute dtype, zero at padding; consecutive tokens, any number.
          valid_BT: false at padding.
          reader: from `reader`, or from the call for the tokens before.
          metrics: diagnostics are added here.
        Returns:
          [B T D] in the compute dtype, and the reader for the tokens that follow in the segment.
        """
        raise NotImplementedError

    def read_heads(self, q_BTHK: Float[Array, "B T H K"], reader: Any) -> Float[Array, "B T H V"]:
        """Answers each unrotated query of attention, with HEADS."""
        raise NotImplementedError

    def write_heads(
        self,
        k_BTGK: Float[Array, "B T G K"],
        v_BTGK: Float[Array, "B T G V"],
        valid_BT: Bool[Array, "B T"],
        state: State,
        metrics: Metrics | None = None,
    ) -> State:
        """The state after the unrotated keys and the values of a full segment, with HEADS."""
        raise NotImplementedError

    def look_up(self, x_BTD: Float[Array, "B T D"], reader: Any) -> Float[Array, "B T D"]:
        """Answers each row, of the text or of the memory tokens, independently of the others, with LAYER_TOKENS."""
        raise NotImplementedError

    def recall(self, state: State) -> Float[Array, "B 1 D"]:
        """The row that a segment reads, found with the summary in the state; with RECALL, as what follows."""
        raise NotImplementedError

    def sense(self, x_BTD: Float[Array, "B T D"], state: State, valid_BT: Bool[Array, "B T"]) -> State:
        """The state after a segment that entered the decoder as `x_BTD`."""
        raise NotImplementedError

    def prompt(self, state: State) -> Float[Array, "B 1 D"]:
        """The learned row around tokens that the decoder is to summarise."""
        raise NotImplementedError

    def summarise(self, summary_BD: Float[Array, "B D"], state: State) -> State:
        """The state with a new summary."""
        raise NotImplementedError

    def rows(self, state: State) -> Float[Array, "B N D"]:
        """The memory as rows in the compute dtype."""
        raise NotImplementedError

    def query_rows(self, state: State) -> Float[Array, "B N D"]:
        """The rows as they enter the block, with WRITE_THROUGH_BLOCK."""
        raise NotImplementedError

    def write(
        self, x_BTD: Float[Array, "B T D"], state: State, valid_BT: Bool[Array, "B T"], metrics: Metrics | None = None
    ) -> State:
        """The state after a full segment, of which only valid tokens count.

        The caller keeps the old state for rows without a valid token.
        """
        raise NotImplementedError

    def advance(
        self, inputs: TokenInputs, state: Any, metrics: Metrics | None = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Takes T tokens, any number, and answers each; token i sees the writes of tokens up to and including i.

        Args:
          inputs: consecutive tokens of each row; padding may be anywhere.
          state: inside a segment, from `open` or from the call for the tokens before.
          metrics: diagnostics are added here.
        Returns:
          [B T D] in the compute dtype, and the state after the tokens.
        """
        raise NotImplementedError

    def absorb(self, inputs: TokenInputs, state: Any, metrics: Metrics | None = None) -> Any:
        """`advance` where nobody needs the answers."""
        return self.advance(inputs, state, metrics)[1]

    def open(self, state: State) -> Any:
        """The state at a border as `advance` takes it; the same by default."""
        return state

    def close(self, opened: Any, state: State) -> State:
        """The state at a border, from the one inside a full segment that began with `state`; the same by default."""
        return opened

    def merged(self, states: Sequence[State], start: State) -> State:
        """One state for several texts that were read independently, with MERGE; an experiment, see docs/generate.md.

        Args:
          states: after each text, at a segment border; every row has read at least a segment.
          start: what each of them began with, one row for all.
        Returns:
          A state from which reading can resume after the last of the texts.
        """
        raise NotImplementedError


_METHODS = {
    Capability.READ: ("reader", "read"),
    Capability.ROWS: ("rows",),
    Capability.WRITE: ("write",),
    Capability.WRITE_THROUGH_BLOCK: ("query_rows", "write"),
    Capability.RUNNING: ("advance",),
    Capability.HEADS: ("reader", "read_heads", "write_heads"),
    Capability.LAYER_TOKENS: ("reader", "look_up", "write"),
    Capability.STACK_TOKENS: ("rows", "write"),
    Capability.RECALL: ("recall", "write", "sense", "prompt", "summarise"),
    Capability.MERGE: ("merged",),
}


def sum_of_changes(states: Sequence[Float[Array, "*state"]], start: Float[Array, "*start"]) -> Float[Array, "*state"]:
    """start + sum_i (states_i - start), in float32 at least; the result has the type of the states."""
    wide = at_least_float32(states[0].dtype)
    begin = start.astype(wide)
    changes = [state.astype(wide) - begin for state in states]
    return (begin + sum(changes[1:], changes[0])).astype(states[0].dtype)


def record(metrics: Metrics | None, **values: Array) -> None:
    """Adds means to the diagnostics, where somebody collects them."""
    if metrics is not None:
        metrics.update({name: jnp.mean(value.astype(jnp.float32)) for name, value in values.items()})


def reveal(module: nn.Module, name: str, compute: Callable[[], Array]) -> None:
    """Keeps an array in the collection `INSIGHT`, if the caller of the model asks for that collection.

    Without `mutable=[INSIGHT]` nothing is computed, so programs for training and answering stay the same.

    Args:
      module: the bound module whose data flow makes the array.
      name: of the array.
      compute: makes it.
    """
    if module.is_mutable_collection(INSIGHT) and not module.is_initializing():
        module.sow(INSIGHT, name, compute())
