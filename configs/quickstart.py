"""The quickstart: LM2 and its twin without memory learn where everybody went, on a CPU in minutes.

    make quickstart

Both read the same stories of qa1's world, a fifth of it background prose, with questions all along; segments hold 32
tokens, four or five sentences. The twin answers from the segment at hand only; LM2 also from its banks, one in each of
its two blocks. Questions are about one person first, and in the end about four: asked about all from the start, a
memory learns places, but not whose (docs/design.md). Rows have four segments in training; the comparison also asks on
rows of sixteen.
"""

import dataclasses

from lm2_jax.blocks.plain import PlainJoin
from lm2_jax.blocks.residual import ResidualJoin
from lm2_jax.config import CheckpointConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from lm2_jax.data.babilong_source import BabilongSource
from lm2_jax.decoder import DecoderConfig
from lm2_jax.memory.bank_writes import BlockWrite
from lm2_jax.memory.gated_bank import GatedBankConfig
from lm2_jax.memory.none import NoMemory
from lm2_jax.presets.tiny import replace_model

LM2 = RunConfig(
    name="quickstart",
    model=ModelConfig(
        vocab_size=512,
        segment_tokens=32,
        decoder=DecoderConfig(width=64, num_layers=2, num_heads=4, num_kv_heads=4, mlp_width=192),
        memory=GatedBankConfig(num_slots=8, write=BlockWrite()),
        join=ResidualJoin(),
        remat="full",
    ),
    data=DataConfig(
        source=BabilongSource(noise_fraction=0.2, question_rate=1.0, asked=(1, 2, 3, 4), asked_steps=(300, 800, 1100)),
        rows=32,
        segments=(4,),
    ),
    optim=OptimConfig(
        steps=1800, learning_rate=3e-3, final_fraction=0.3, warmup_steps=50, beta2=0.999, weight_decay=0.0
    ),
    train=TrainConfig(eval_every=200, eval_batches=4),
    checkpoint=CheckpointConfig(every_steps=600),
)
NONE = dataclasses.replace(replace_model(LM2, memory=NoMemory(), join=PlainJoin()), name="quickstart_none")

PRESETS = {run.name: run for run in (LM2, NONE)}
