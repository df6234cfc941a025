"""Titans at the published sizes, and their twins without memory (arXiv:2501.00663, NeurIPS version, table 5).

    python train.py titans_340m_mac --compile-only --topology v5e:8x8

The table gives blocks, width, heads, peak learning rate and tokens; appendix E persistent tokens (128), chunk (16),
window (2,048) and MAC's segment (512). How parameters are shared out is not published, and with one feed-forward width
for all designs their sizes would differ by more than a third. So the SwiGLU is as wide as the named size leaves room
for: all presets of a size, the twins included, have equal parameters within 1%. MAC retrieves a row for each token, as
equations 21 and 22 say; the 256 memory tokens of appendix E have no equation.
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
    """How memory and attention meet in all blocks."""

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
    """Hidden width of the SwiGLU, a multiple of 32, that brings a model to its named size.

    Of a block are counted: four matrices of attention; the memory's q, k, v, o and output gate, and its learned start.
    """
    D = size.width
    start = memory.num_heads * sum(i * o for i, o in memory.network.shapes(D // memory.num_heads))
    rest = 4 * D * D * design.attends + (5 * D * D + start) * design.remembers + PERSISTENT * D
    left = (size.parameters - VOCABULARY * D) / size.blocks - rest
    return 32 * round(left / (3 * D) / 32)


def titans(name: str, size: Size, design: Design) -> RunConfig:
    """The run of one size and design, trained as appendix E says on 4,096 tokens a row and half a million a step."""
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
