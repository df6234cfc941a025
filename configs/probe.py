"""The probe that decided LM2's default form: many questions about who is where, four segments of 32 tokens.

    python -m benchmarks.memory_forms                 # all arms with one seed
    python train.py probe_rmt --workdir runs/probe/rmt_0

Two blocks of width 64, and 8 slots or memory tokens; HMT keeps 64 memory embeddings, one per segment. The width of the
SwiGLU makes parameters equal within 3% (tested). RMT is the reference; the baseline without memory shows what the
current segment alone answers.

Questions are first about one person, then about two, three and four. With all four from the start, every form stops at
an accuracy of 0.70: it remembers places, but not which person is where (docs/design.md).
"""

import dataclasses

from lm2_jax.blocks.base import JoinConfig
from lm2_jax.blocks.plain import PlainJoin
from lm2_jax.blocks.recall import RecallJoin
from lm2_jax.blocks.residual import ResidualJoin
from lm2_jax.blocks.tokens import TokensJoin
from lm2_jax.config import CheckpointConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from lm2_jax.data.babilong_source import BabilongSource
from lm2_jax.decoder import DecoderConfig
from lm2_jax.memory.bank_writes import BlockWrite, ContentWrite, PaperWrite, SlotsWrite, WriteConfig
from lm2_jax.memory.base import MemoryConfig
from lm2_jax.memory.gated_bank import GatedBankConfig
from lm2_jax.memory.hierarchical import HierarchicalConfig
from lm2_jax.memory.none import NoMemory
from lm2_jax.memory.tokens import TokensConfig
from lm2_jax.presets.tiny import replace_model

SLOTS = 8
DECODER = DecoderConfig(width=64, num_layers=2, num_heads=4, num_kv_heads=4, mlp_width=264)
BASE = RunConfig(
    name="probe_none",
    model=ModelConfig(decoder=DECODER, memory=NoMemory(), join=PlainJoin(), remat="full"),
    data=DataConfig(
        source=BabilongSource(
            noise_fraction=0.2, question_rate=1.0, closing=False, asked=(1, 2, 3, 4), asked_steps=(300, 800, 1100)
        ),
        rows=32,
        segments=(4,),
    ),
    optim=OptimConfig(
        steps=2000, learning_rate=3e-3, final_fraction=0.3, warmup_steps=50, beta2=0.999, weight_decay=0.0
    ),
    train=TrainConfig(eval_every=200, eval_batches=8),
    checkpoint=CheckpointConfig(every_steps=500, keep=1),
)


def arm(name: str, mlp_width: int, memory: MemoryConfig, join: JoinConfig) -> RunConfig:
    """The probe with another memory."""
    decoder = dataclasses.replace(DECODER, mlp_width=mlp_width)
    return dataclasses.replace(replace_model(BASE, decoder=decoder, memory=memory, join=join), name=f"probe_{name}")


def bank(write: WriteConfig, **changes: object) -> GatedBankConfig:
    """A bank of 8 slots."""
    return dataclasses.replace(GatedBankConfig(num_slots=SLOTS, write=write), **changes)


RMT = arm("rmt", 264, TokensConfig(num_tokens=SLOTS), TokensJoin())
LONGER = dataclasses.replace(RMT.optim, steps=4000)  # RMT reaches the same accuracy later
THREADED = ResidualJoin(topology="threaded")
PAPER_JOIN = ResidualJoin(read="own", source="attention")
SLOTS_WRITE = SlotsWrite(candidate="linear")

ARMS = (
    BASE,
    RMT,
    dataclasses.replace(RMT, name="probe_rmt_long", optim=LONGER),
    arm("hmt", 256, HierarchicalConfig(num_memories=64, sensory_tokens=8, key_width=32), RecallJoin()),
    arm("block_threaded", 200, bank(BlockWrite()), THREADED),
    arm("block_threaded_ungated", 240, bank(BlockWrite(gated=False)), THREADED),
    arm("block", 200, bank(BlockWrite()), ResidualJoin()),
    arm("slots_threaded", 112, bank(SLOTS_WRITE), THREADED),
    arm("slots_threaded_no_positions", 112, bank(dataclasses.replace(SLOTS_WRITE, positions=False)), THREADED),
    arm(
        "slots_threaded_own_read",
        48,
        bank(SLOTS_WRITE),
        dataclasses.replace(THREADED, read="own", source="attention"),
    ),
    arm(
        "paper",
        136,
        bank(PaperWrite(), norm_slots=False),
        PAPER_JOIN,
    ),
    arm("content", 136, bank(ContentWrite(), norm_slots=False), PAPER_JOIN),
    arm("content_norm", 136, bank(ContentWrite()), PAPER_JOIN),
    arm("content_slow", 136, bank(ContentWrite(forget_bias=3.0), norm_slots=False), PAPER_JOIN),
)
PRESETS = {run.name: run for run in ARMS}
HARDWARE = "CPU, minutes"
PURPOSES = {
    "probe_none": "baseline: no memory",
    "probe_rmt": "RMT, the reference",
    "probe_rmt_long": "RMT with twice the steps",
    "probe_hmt": "HMT, 64 memory embeddings, summary of the segment before",
    "probe_block": "LM2, block write, a bank in each block (the default)",
    "probe_block_threaded": "LM2, block write, one bank for all blocks",
    "probe_block_threaded_ungated": "the same without input and forget gates",
    "probe_slots_threaded": "LM2, slot write, one bank for all blocks",
    "probe_slots_threaded_no_positions": "the same without positions of tokens",
    "probe_slots_threaded_own_read": "the same with read projections of its own",
    "probe_paper": "LM2 with the paper's read and write",
    "probe_content": "LM2, content write: the paper's with token content",
    "probe_content_norm": "the same with slots normalised before they are projected",
    "probe_content_slow": "probe_content with a forget gate that begins at 0.95, not 0.73",
}
