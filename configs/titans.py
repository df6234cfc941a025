"""Titans at the published sizes, and baselines without memory (arXiv:2501.00663, NeurIPS version, table 5).

    python train.py titans_340m_mac --compile-only --topology v5e:8x8

The table gives blocks, width, heads, peak learning rate and tokens. Appendix E gives persistent tokens (128), chunk
(16), window (2,048) and MAC's segment (512). The feed-forward width is not published; one width for all designs would
make their sizes differ by more than a third. The width of the SwiGLU is therefore chosen so that all presets of a size,
baselines included, have equal parameters within 1%. MAC retrieves one row for each token, as in equations 21 and 22;
the 256 memory tokens of appendix E have no equation.
"""

import dataclasses

from lm2_jax.blocks.base import JoinConfig
from lm2_jax.blocks.context import ContextJoin
from lm2_jax.blocks.gate import GateJoin
from lm2_jax.blocks.layer import LayerJoin
from lm2_jax.blocks.mixer import MixerJoin
from lm2_jax.blocks.plain import PlainJoin
from lm2_jax.config import CheckpointConfig, DataConfig, LossConfig, ModelConfig, OptimConfig, RunConfig
from lm2_jax.data.shards import TokenShards
from lm2_jax.data.tokenizers import TokenizerConfig
from lm2_jax.decoder import DecoderConfig
from lm2_jax.memory.base import MemoryConfig
from lm2_jax.memory.none import NoMemory
from lm2_jax.memory.titans import TitansConfig
from lm2_jax.precision import Precision

VOCABULARY, PERSISTENT, WINDOW, SEGMENT = 32_000, 128, 2048, 512
TOKENS_PER_STEP, TOKENS_PER_ROW = 2**19, 4096


@dataclasses.dataclass(frozen=True)
class Size:
    """One row of table 5."""

    parameters: float
    blocks: int
    width: int
    heads: int
    learning_rate: float
    tokens: float


@dataclasses.dataclass(frozen=True)
class Design:
    """How memory and attention are combined in all blocks."""

    join: JoinConfig
    remembers: bool = True
    attends: bool = True
    windowed: bool = True


SIZES = {
    "170m": Size(170e6, 12, 768, 16, 3e-3, 15e9),
    "340m": Size(340e6, 24, 1024, 16, 1.5e-3, 15e9),
    "760m": Size(760e6, 24, 1536, 16, 1.25e-3, 30e9),
    "1p3b": Size(1.3e9, 18, 2048, 8, 7e-4, 100e9),
}
DESIGNS = {
    "mac": Design(ContextJoin(num_persistent=PERSISTENT), windowed=False),
    "mag": Design(GateJoin(num_persistent=PERSISTENT)),
    "mal": Design(LayerJoin(num_persistent=PERSISTENT)),
    "lmm": Design(MixerJoin(num_persistent=PERSISTENT), attends=False, windowed=False),
    "segment": Design(PlainJoin(num_persistent=PERSISTENT), remembers=False, windowed=False),  # mac without memory
    "window": Design(PlainJoin(num_persistent=PERSISTENT), remembers=False),  # mag and mal without memory
}


def mlp_width(size: Size, design: Design, memory: TitansConfig) -> int:
    """Hidden width of the SwiGLU, a multiple of 32, that gives a model its named size.

    Counted in each block: the four attention matrices; the memory's q, k, v, o, output gate and learned start.
    """
    D = size.width
    start = memory.num_heads * sum(i * o for i, o in memory.network.shapes(D // memory.num_heads))
    rest = 4 * D * D * design.attends + (5 * D * D + start) * design.remembers + PERSISTENT * D
    left = (size.parameters - VOCABULARY * D) / size.blocks - rest
    return 32 * round(left / (3 * D) / 32)


def titans(name: str, size: Size, design: Design) -> RunConfig:
    """The run of one size and design, trained as in appendix E: 4,096 tokens per row and half a million per step."""
    memory = TitansConfig(num_heads=size.heads, chunk_tokens=16)
    decoder = DecoderConfig(
        width=size.width,
        num_layers=size.blocks,
        num_heads=size.heads,
        num_kv_heads=size.heads,
        mlp_width=mlp_width(size, design, memory),
        window_tokens=WINDOW if design.windowed else None,
    )
    segment = WINDOW if design.windowed else SEGMENT
    remembered: MemoryConfig = memory if design.remembers else NoMemory()
    steps = round(size.tokens / TOKENS_PER_STEP)
    return RunConfig(
        name=name,
        model=ModelConfig(
            vocab_size=VOCABULARY,
            segment_tokens=segment,
            decoder=decoder,
            memory=remembered,
            join=design.join,
            precision=Precision(compute="bfloat16"),
            remat="full",
        ),
        data=DataConfig(
            source=TokenShards(path="data/fineweb-edu", packing="ordered"),
            tokenizer=TokenizerConfig(kind="sentencepiece", path="data/llama-2/tokenizer.model"),
            rows=TOKENS_PER_STEP // TOKENS_PER_ROW,
            segments=(TOKENS_PER_ROW // segment,),
        ),
        loss=LossConfig(answer_weight=1.0, text_weight=1.0, time_chunk=512),
        optim=OptimConfig(steps=steps, learning_rate=size.learning_rate, warmup_steps=steps // 100),
        checkpoint=CheckpointConfig(every_steps=1000),
    )


PRESETS = {
    name: titans(name, size, design)
    for size_name, size in SIZES.items()
    for design_name, design in DESIGNS.items()
    for name in [f"titans_{size_name}_{design_name}"]
}
HARDWARE = "TPU slice"
_PURPOSES = {
    "mac": "memory as context (MAC)",
    "mag": "memory as gate (MAG)",
    "mal": "memory as layer (MAL)",
    "lmm": "memory without attention (LMM)",
    "segment": "baseline of MAC: attention within a segment",
    "window": "baseline of MAG and MAL: sliding-window attention",
}
PURPOSES = {f"titans_{size}_{design}": purpose for size in SIZES for design, purpose in _PURPOSES.items()}
