"""Everything that defines a run, as frozen dataclasses; field docstrings are the command line's help."""

import dataclasses
import types
import typing
from typing import Any, Literal, NamedTuple

from lm2_jax.blocks.base import Block, BlockSpec, JoinConfig
from lm2_jax.blocks.residual import ResidualJoin
from lm2_jax.data.babilong_source import BabilongSource
from lm2_jax.data.base import SourceConfig
from lm2_jax.data.tokenizers import TokenizerConfig
from lm2_jax.decoder import DecoderConfig
from lm2_jax.errors import UserError
from lm2_jax.memory.base import MemoryConfig
from lm2_jax.memory.gated_bank import GatedBankConfig
from lm2_jax.precision import FloatName, Precision
from lm2_jax.registry import Family, near_misses
from lm2_jax.training.optim_config import LossConfig as LossConfig
from lm2_jax.training.optim_config import OptimConfig as OptimConfig


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder, a memory, and the way they join."""

    vocab_size: int = 512
    """Rows of the embedding; at least the tokenizer's size."""
    segment_tokens: int = 32
    """Tokens T of one segment."""
    decoder: DecoderConfig = DecoderConfig()
    """The decoder."""
    memory: MemoryConfig = GatedBankConfig()
    """What is remembered, and how."""
    join: JoinConfig = ResidualJoin()
    """Where memory meets attention."""
    precision: Precision = Precision()
    """Number types."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products, everything but block inputs."""
    schedule: Literal["auto", "layer_major", "segment_major"] = "auto"
    """Which loop is outside; auto: layers where the state is per layer, else segments."""

    def __post_init__(self) -> None:
        _require(self.vocab_size >= 2, f"model.vocab_size must be at least 2, got {self.vocab_size}")
        _require(self.segment_tokens >= 1, f"model.segment_tokens must be at least 1, got {self.segment_tokens}")
        window = self.decoder.window_tokens
        _require(
            window is None or 1 <= window <= self.segment_tokens,
            f"decoder.window_tokens={window} must lie between 1 and model.segment_tokens={self.segment_tokens}",
        )
        self.memory.check_segment(self.segment_tokens)
        self.join.check(self)
        if self.schedule == "layer_major":
            _require(
                self.join.stack(self.block_spec, parent=None) is None,
                f"model.schedule='layer_major' needs state per layer, but join {self.join.kind!r} feeds the top of one "
                "segment to the bottom of the next; use 'auto' or 'segment_major'",
            )

    @property
    def has_memory(self) -> bool:
        """Whether anything but an attention window crosses a segment border."""
        layers = self.join.memory_layers(self.decoder.num_layers)
        return bool(layers) or self.join.stack(self.block_spec, parent=None) is not None

    @property
    def learns_within_segment(self) -> bool:
        """Whether all that is learned has a gradient within one segment already."""
        return not self.has_memory or self.join.learns_within_segment(self.memory)

    @property
    def takes_packed(self) -> bool:
        """Whether a document may begin inside a segment."""
        return self.join.takes_packed(self.memory) and self.join.stack(self.block_spec, parent=None) is None

    def block_of(self, layer: int) -> tuple[type[Block], BlockSpec]:
        """The block of one layer, and what it is built from."""
        return self.join.block_of(layer, self.block_spec)

    @property
    def block_spec(self) -> BlockSpec:
        """What blocks are built from."""
        return BlockSpec(self.decoder, self.precision, self.segment_tokens, self.memory, self.join)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where batches come from."""

    source: SourceConfig = BabilongSource()
    """What is read."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """How text becomes tokens."""
    rows: int = 32
    """Global batch: documents read side by side."""
    segments: tuple[int, ...] = (4,)
    """Curriculum: segments per row in each stage."""
    stage_steps: tuple[int, ...] = ()
    """Step at which each stage after the first begins; one fewer than `segments`."""
    vary_segments: bool = False
    """Whether each step draws its number of segments from 1 to the stage's."""
    fill_rows: bool = False
    """Whether rows always have the longest stage's segments, filled with several documents of the stage's length: as
    many tokens at every step, and one program. Not with a text, whose rows are full or go on."""
    alone_steps: int = 0
    """First steps in which every segment begins with a fresh memory: the decoder learns what it can do alone. A memory
    that is there from the start offers a first guess at everything, and what a segment itself tells is learned late."""
    carry_state: bool = False
    """Whether a row goes on at the next step where it stopped, its memory carried along."""
    seed: int = 0
    """Chooses all examples."""
    prefetch: int = 8
    """Batches prepared ahead."""

    def __post_init__(self) -> None:
        _require(self.rows >= 1, f"data.rows must be at least 1, got {self.rows}")
        _require(
            len(self.segments) >= 1 and min(self.segments) >= 1,
            f"data.segments needs one positive number per stage, got {self.segments}",
        )
        _require(
            len(self.stage_steps) == len(self.segments) - 1 and list(self.stage_steps) == sorted(set(self.stage_steps)),
            f"data.stage_steps must hold {len(self.segments) - 1} increasing steps for data.segments={self.segments}, "
            f"got {self.stage_steps}",
        )
        _require(self.alone_steps >= 0, f"data.alone_steps must not be negative, got {self.alone_steps}")
        _require(
            not self.fill_rows or (not self.vary_segments and all(max(self.segments) % s == 0 for s in self.segments)),
            "data.fill_rows needs stages that divide the longest, and no vary_segments; "
            f"got data.segments={self.segments}",
        )
        _require(
            not (self.fill_rows and (self.source.continues or self.source.packs)),
            f"data.fill_rows goes with a source that writes rows of any length; of what {self.source.kind!r} reads on "
            "from row to row or step to step a part would be left out: leave data.fill_rows off",
        )
        _require(self.prefetch >= 0, f"data.prefetch must not be negative, got {self.prefetch}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop around the step."""

    bptt_segments: int | None = None
    """Gradient flows through blocks of this many segments; None: through the whole row."""
    seed: int = 0
    """Initial parameters."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 200
    """Steps between evaluations on held-out examples; 0: only at the end."""
    eval_batches: int = 4
    """Batches of one held-out evaluation; 0: none is made."""
    max_loss_ratio: float = 10.0
    """The run stops as diverged when the loss exceeds this times the first logged loss."""

    def __post_init__(self) -> None:
        _require(
            self.bptt_segments is None or self.bptt_segments >= 1,
            f"train.bptt_segments must be at least 1 or None, got {self.bptt_segments}",
        )
        _require(self.log_every >= 1, f"train.log_every must be at least 1, got {self.log_every}")
        _require(self.eval_batches >= 0, f"train.eval_batches must not be negative, got {self.eval_batches}")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, and when."""

    every_steps: int = 200
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 3
    """Newest checkpoints kept."""
    memory_every: int = 1
    """Every how many checkpoints the carried memory state is saved too (it can outweigh the parameters)."""
    memory_dtype: FloatName | None = None
    """Type the carried memory is saved in, the same for the whole run; None: as it is."""

    def __post_init__(self) -> None:
        _require(self.every_steps >= 1, f"checkpoint.every_steps must be at least 1, got {self.every_steps}")
        _require(self.keep >= 1, f"checkpoint.keep must be at least 1, got {self.keep}")
        _require(self.memory_every >= 1, f"checkpoint.memory_every must be at least 1, got {self.memory_every}")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run; what `config.json` in a workdir holds."""

    name: str = "unnamed"
    """The preset it started from."""
    model: ModelConfig = ModelConfig()
    """The model."""
    data: DataConfig = DataConfig()
    """The input."""
    loss: LossConfig = LossConfig()
    """The objective."""
    optim: OptimConfig = OptimConfig()
    """The optimizer."""
    train: TrainConfig = TrainConfig()
    """The loop."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""

    def __post_init__(self) -> None:
        _require(
            self.data.rows % self.optim.accumulate == 0,
            f"data.rows={self.data.rows} is not a multiple of optim.accumulate={self.optim.accumulate}",
        )
        _require(
            self.data.source.continues or not self.data.carry_state,
            f"data.carry_state needs a source whose rows go on from step to step; {self.data.source.kind!r} as "
            "configured begins every row anew (token shards and text do go on with packing='ordered')",
        )
        _require(
            self.model.takes_packed or not self.data.source.packs,
            f"memory {self.model.memory.kind!r} joined by {self.model.join.kind!r} takes no packed documents, as its "
            "state cannot begin anew inside a segment; set packing of data.source to 'ordered'",
        )
        # Where tokens see a memory as it stood before their segment, no loss within that depends on a write.
        reach = min(max(self.data.segments), self.train.bptt_segments or max(self.data.segments))
        _require(
            reach > 1 or self.model.learns_within_segment,
            "the memory's writes would get no gradient: it has to cross a segment border, so data.segments and "
            "train.bptt_segments must both reach 2 at least",
        )


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON types; members of a family carry their `kind`."""
    plain: dict[str, Any] = {"kind": config.kind} if issubclass(type(config), Family) else {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        if isinstance(value, tuple):
            value = [to_dict(item) if dataclasses.is_dataclass(item) else item for item in value]
        plain[field.name] = value
    return plain


def from_dict(cls: type[Any], plain: Any, path: str = "config") -> Any:
    """The config that `to_dict` wrote; an unknown or missing key or a wrong type is a `UserError` that names it."""
    if not isinstance(plain, dict):
        raise UserError(f"{path}: expected a table of fields of {cls.__name__}, got {plain!r}", status=1)
    plain = dict(plain)
    if issubclass(cls, Family):
        cls = _member(cls, plain.pop("kind", "<missing>"), path)
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    for key in plain:
        if key not in known:
            raise UserError(f"{path}: unknown {key!r}; known: {known}.{near_misses(key, known)}", status=1)
    missing = [name for name in known if name not in plain]
    if missing:
        raise UserError(f"{path}: missing {missing}", status=1)
    values = {name: _value(hints[name], plain[name], f"{path}.{name}") for name in known}
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{path}: {error}", status=1) from error


def _member(family: type[Family], kind: Any, path: str) -> type[Any]:
    """The class that a table's `kind` names."""
    if not isinstance(kind, str):
        raise UserError(f"{path}.kind: expected a name, got {kind!r}", status=1)
    try:
        return family.find(kind)
    except UserError as error:
        raise UserError(f"{path}.kind: {error}", status=1) from error


def _value(hint: Any, plain: Any, path: str) -> Any:
    """`plain` as the annotated type `hint`, of the few kinds that configs use."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if plain is None and type(None) in args:
            return None
        (hint,) = (a for a in args if a is not type(None))
        return _value(hint, plain, path)
    if origin is Literal:
        if plain not in args:
            raise UserError(f"{path}: expected one of {list(args)}, got {plain!r}", status=1)
        return plain
    if origin is tuple:
        if not isinstance(plain, list):
            raise UserError(f"{path}: expected a list, got {plain!r}", status=1)
        return tuple(_value(args[0], item, f"{path}[{i}]") for i, item in enumerate(plain))
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), plain, path)
    accepted = (int, float) if hint is float else hint
    if not isinstance(plain, accepted) or (isinstance(plain, bool) and hint is not bool):
        raise UserError(f"{path}: expected {hint.__name__}, got {plain!r}", status=1)
    try:
        return float(plain) if hint is float else plain
    except OverflowError:
        raise UserError(f"{path}: expected a number, got one of more than 300 digits", status=1) from None


# Fields that change nothing of what a run computes or reads back; a resumed run may have other values.
_FREE = (
    "name",
    "data.prefetch",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.max_loss_ratio",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "checkpoint.memory_every",
)


class Change(NamedTuple):
    """A field that differs between two configs."""

    name: str  # with dots
    old: Any  # "<absent>" where the config has no such field
    new: Any
    rule: Literal["fixed", "free", "grows"]  # what a resumed run may do with it

    @property
    def allowed(self) -> bool:
        """Whether a run may be resumed with the new value."""
        return self.rule == "free" or (self.rule == "grows" and self.new > self.old)


def changes(old: Any, new: Any) -> list[Change]:
    """The fields that differ between two configs of one class, in order of their names."""
    before, after = _leaves(to_dict(old)), _leaves(to_dict(new))
    return [
        Change(
            name,
            before.get(name, "<absent>"),
            after.get(name, "<absent>"),
            "free" if name in _FREE else "grows" if name == "optim.steps" else "fixed",
        )
        for name in sorted(before.keys() | after.keys())
        if before.get(name, "<absent>") != after.get(name, "<absent>")
    ]


def _leaves(plain: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(plain, dict):
        return {path: plain}
    found: dict[str, Any] = {}
    for name, value in plain.items():
        found |= _leaves(value, f"{path}.{name}".lstrip("."))
    return found
