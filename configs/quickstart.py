"""The quickstart: LM2 and a baseline without memory learn where each person is, on a CPU in minutes.

    make quickstart

Both read the same simulated stories of task qa1, one fifth of them background prose, with questions throughout the
text. A segment has 32 tokens, four or five sentences. The baseline sees only the current segment; LM2 also reads its
memory, a bank of slots in each of its two blocks. Questions are about one person first, and about four in the last
stage: with all four from the start, a memory learns places, but not which person is where (docs/design.md). Training
rows have four segments; the comparison also uses rows of sixteen.
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
HARDWARE = "CPU, minutes"
PURPOSES = {
    "quickstart": "LM2 on simulated stories; what `make quickstart` trains",
    "quickstart_none": "its baseline without memory",
}
