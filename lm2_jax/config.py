"""Everything that defines a run, as frozen dataclasses; field docstrings are the help of the command line.

Ranges of numbers, and what a resumed run may change, are declared at the fields (`lm2_jax.fields`); `__post_init__`
checks what several fields must agree on.
"""

import dataclasses
from typing import Annotated, ClassVar, Literal

from lm2_jax.blocks.base import Block, BlockSpec, JoinConfig
from lm2_jax.blocks.residual import ResidualJoin
from lm2_jax.config_file import Change as Change
from lm2_jax.config_file import changes as changes
from lm2_jax.config_file import from_dict as from_dict
from lm2_jax.config_file import to_dict as to_dict
from lm2_jax.data.babilong_source import BabilongSource
from lm2_jax.data.base import SourceConfig
from lm2_jax.data.tokenizers import TokenizerConfig
from lm2_jax.decoder import DecoderConfig
from lm2_jax.fields import FREE, Checked, Range, Since
from lm2_jax.formats import FORMAT
from lm2_jax.memory.base import MemoryConfig
from lm2_jax.memory.gated_bank import GatedBankConfig
from lm2_jax.precision import FloatName, Precision
from lm2_jax.training.optim_config import LossConfig as LossConfig
from lm2_jax.training.optim_config import OptimConfig as OptimConfig
from lm2_jax.training.trackers import NoTracker, TrackerConfig

FORBIDDEN_IN_NAMES = {"/", "\\", *map(chr, range(32)), chr(127)}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class ModelConfig(Checked):
    """A decoder, a memory, and how the two are joined."""

    vocab_size: Annotated[int, Range(2, 2**27)] = 512
    """Rows of the embedding; at least the size of the tokenizer."""
    segment_tokens: Annotated[int, Range(1, 2**24)] = 32
    """Tokens T of one segment."""
    decoder: DecoderConfig = DecoderConfig()
    """The decoder."""
    memory: MemoryConfig = GatedBankConfig()
    """What is remembered, and how."""
    join: JoinConfig = ResidualJoin()
    """How blocks read and write the memory."""
    precision: Precision = Precision()
    """Number types."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products, everything but block inputs."""
    schedule: Literal["auto", "layer_major", "segment_major"] = "auto"
    """The outer loop: over layers or over segments. auto: layers where each layer has its own state, else segments."""

    def __post_init__(self) -> None:
        window = self.decoder.window_tokens
        _require(
            window is None or 1 <= window <= self.segment_tokens,
            f"decoder.window_tokens={window} must lie between 1 and model.segment_tokens={self.segment_tokens}",
        )
        self._check_rope()
        self.memory.check_segment(self.segment_tokens)
        self.join.check(self)
        self._check_positions()
        if self.schedule == "layer_major":
            _require(
                self.join.stack(self.block_spec, parent=None) is None,
                f"model.schedule='layer_major' needs state per layer, but join {self.join.kind!r} feeds the top of one "
                "segment to the bottom of the next; use 'auto' or 'segment_major'",
            )

    def _check_rope(self) -> None:
        """Attention must not reach further than the frequencies hold."""
        scaling = self.decoder.rope_scaling
        if scaling is None or scaling.max_tokens is None:
            return
        segment = self.segment_tokens + 2 * self.memory.stack_tokens
        field, tokens = max(
            [
                ("model.segment_tokens (with memory tokens)", segment),
                ("decoder.max_tokens", self.decoder.max_tokens or 0),
            ],
            key=lambda pair: pair[1],
        )
        _require(
            tokens <= scaling.max_tokens,
            f"{field} is {tokens}, but decoder.rope_scaling of kind {scaling.kind!r} is supported up to "
            f"original_tokens={scaling.max_tokens}. Beyond it the rotation of every key, also of those that are kept "
            f"from earlier segments, depends on the length of the text. Set it to at most {scaling.max_tokens}, or "
            "choose a scaling without this dependence, such as decoder.rope_scaling 'yarn'",
        )

    def _check_positions(self) -> None:
        """Every row of a segment needs a position, those that a memory adds too."""
        most, rows = self.decoder.max_positions, self.placed_tokens or self.segment_tokens
        added = f" and the {rows - self.segment_tokens} rows that the memory adds" if rows > self.segment_tokens else ""
        _require(
            most is None or rows <= most,
            f"model.segment_tokens={self.segment_tokens}{added} are more than decoder.max_positions={most}; make the "
            "segments shorter",
        )

    @property
    def placed_tokens(self) -> int | None:
        """Rows of a segment that get learned positions, where a stack adds rows to it; None: it adds none."""
        stack = self.join.stack(self.block_spec, parent=None)
        if stack is None:
            return None
        return stack.prefix_tokens + self.segment_tokens + (stack.suffix_tokens if stack.places_suffix else 0)

    @property
    def has_memory(self) -> bool:
        """Whether any state besides an attention window crosses a segment border."""
        layers = self.join.memory_layers(self.decoder.num_layers)
        return bool(layers) or self.join.stack(self.block_spec, parent=None) is not None

    @property
    def learns_within_segment(self) -> bool:
        """Whether every parameter has a gradient within one segment."""
        return not self.has_memory or self.join.learns_within_segment(self.memory)

    @property
    def takes_packed(self) -> bool:
        """Whether a document may begin inside a segment."""
        return self.join.takes_packed(self.memory) and self.join.stack(self.block_spec, parent=None) is None

    def block_of(self, layer: int) -> tuple[type[Block], BlockSpec]:
        """The block class of one layer, and its arguments."""
        return self.join.block_of(layer, self.block_spec)

    @property
    def block_spec(self) -> BlockSpec:
        """The arguments of a block."""
        return BlockSpec(self.decoder, self.precision, self.segment_tokens, self.memory, self.join)


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked):
    """Where batches come from."""

    source: SourceConfig = BabilongSource()
    """What is read."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """How text becomes tokens."""
    rows: Annotated[int, Range(1, 2**24)] = 32
    """Global batch size: documents read in parallel."""
    segments: Annotated[tuple[int, ...], Range(1, 2**24)] = (4,)
    """Curriculum: segments per row in each stage."""
    stage_steps: tuple[int, ...] = ()
    """Step at which each stage after the first begins; one fewer than `segments`."""
    vary_segments: bool = False
    """Whether each step draws its number of segments, from 1 to that of the stage."""
    fill_rows: bool = False
    """Whether rows always have the number of segments of the longest stage, filled with several documents of the
    current stage's length. Every step then has equally many tokens, and one program is compiled. Not for text sources,
    whose rows are full or continue."""
    alone_steps: int = 0
    """Memory warm-up: number of first steps in which every segment starts with an empty memory. Without it, a model
    with a memory from the start relies on it as a prior, and learns late what a segment itself says."""
    carry_state: bool = False
    """Whether a row continues at the next step where it stopped, with its memory."""
    seed: int = 0
    """Chooses all examples."""
    prefetch: Annotated[int, Range(0, 10_000), FREE] = 8
    """Batches prepared ahead."""

    def __post_init__(self) -> None:
        _require(len(self.segments) >= 1, "data.segments is empty; it needs one positive number per stage")
        _require(
            len(self.stage_steps) == len(self.segments) - 1 and list(self.stage_steps) == sorted(set(self.stage_steps)),
            f"data.stage_steps must hold {len(self.segments) - 1} increasing steps for data.segments={self.segments}, "
            f"got {self.stage_steps}",
        )
        _require(
            not self.fill_rows or (not self.vary_segments and all(max(self.segments) % s == 0 for s in self.segments)),
            "data.fill_rows needs stages that divide the longest, and data.vary_segments off; "
            f"got data.segments={self.segments}",
        )
        _require(
            not (self.fill_rows and (self.source.continues or self.source.packs)),
            "data.fill_rows needs a source that writes rows of any length. Source "
            f"{self.source.kind!r} continues from row to row or step to step, so part of it would be left out: switch "
            "data.fill_rows off",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig(Checked):
    """The training loop."""

    bptt_segments: Annotated[int | None, Range(1, 2**24)] = None
    """The gradient flows through blocks of this many segments; None: through the full row."""
    seed: int = 0
    """Initial parameters."""
    log_every: Annotated[int, Range(1, 10**9), FREE] = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: Annotated[int, Range(0, 10**9), FREE] = 200
    """Steps between evaluations on held-out examples; 0: only at the end."""
    eval_batches: Annotated[int, Range(0, 10**9), FREE] = 4
    """Batches of one held-out evaluation; 0: no evaluation."""
    max_loss_ratio: Annotated[float, Range(1, 1e9, above=True, infinite=True), FREE] = 10.0
    """The run stops as diverged when the loss exceeds this times the first logged loss; inf: never."""
    tracker: Annotated[TrackerConfig, Since(3), FREE] = NoTracker()
    """Where metrics are sent in addition to the workdir."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Checked):
    """What is saved, and when."""

    every_steps: Annotated[int, Range(1, 10**9), FREE] = 200
    """Steps between checkpoints; the last step is always saved."""
    keep: Annotated[int, Range(1, 10**6), FREE] = 3
    """Newest checkpoints kept."""
    memory_every: Annotated[int, Range(1, 10**6), FREE] = 1
    """Every how many checkpoints the carried memory state is saved too; it can be larger than the parameters."""
    memory_dtype: FloatName | None = None
    """Type in which the carried memory is saved, the same for the full run; None: unchanged."""


@dataclasses.dataclass(frozen=True)
class RunConfig(Checked, root=True):
    """One run; what `config.json` in a workdir holds."""

    format: ClassVar[int] = FORMAT
    """Format of config.json; a field that is new in a format declares `Since` (lm2_jax/fields.py)."""

    name: Annotated[str, FREE] = "unnamed"
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
            self.name not in ("", ".", "..") and len(self.name) <= 100 and not set(self.name) & FORBIDDEN_IN_NAMES,
            f"name={self.name[:100]!r} must name a folder: 1 to 100 characters without slash, backslash or control "
            "characters",
        )
        _require(
            self.data.rows % self.optim.accumulate == 0,
            f"data.rows={self.data.rows} is not a multiple of optim.accumulate={self.optim.accumulate}; change one of "
            "them",
        )
        _require(
            self.data.source.continues or not self.data.carry_state,
            "data.carry_state needs a source whose rows continue from step to step; those of source "
            f"{self.data.source.kind!r} do not as configured (token shards and text continue with "
            "data.source.packing='ordered')",
        )
        _require(
            self.model.takes_packed or not self.data.source.packs,
            f"memory {self.model.memory.kind!r} with join {self.model.join.kind!r} takes no packed documents, because "
            "its state cannot be reset inside a segment; set data.source.packing='ordered'",
        )
        _require(
            not self.model.join.looks_ahead,
            f"join {self.model.join.kind!r} as configured sees tokens before they are predicted, for comparison with "
            "released code only; set model.join.summary='before'",
        )
        longest, max_tokens = max(self.data.segments) * self.model.segment_tokens, self.model.decoder.max_tokens
        _require(
            max_tokens is None or longest <= max_tokens or self.data.fill_rows or self.data.source.packs,
            f"rows of data.segments={self.data.segments} segments have up to {longest} tokens, but attention reaches "
            f"over model.decoder.max_tokens={max_tokens}; increase max_tokens or shorten data.segments",
        )
        # Tokens see the memory of the segment start, so no loss inside a segment depends on that segment's write.
        reach = min(max(self.data.segments), self.train.bptt_segments or max(self.data.segments))
        _require(
            reach > 1 or self.model.learns_within_segment,
            "the memory's writes would get no gradient, which has to cross a segment border: data.segments and "
            "train.bptt_segments must both be at least 2",
        )
        least = self.model.memory.least_segments
        _require(
            self.data.carry_state or max(self.data.segments) >= least,
            f"memory {self.model.memory.kind!r} chooses what it recalls from segment {least} of a document on, so a "
            f"part of it would get no gradient: data.segments must reach {least}, or data.carry_state be set",
        )
