"""LM2 at the size of a small folder of texts: trains on a CPU in a minute or two.

    python train.py text_tiny --text mytexts/ --workdir runs/mytexts

Two blocks of width 64, each with a memory of eight slots. Without `--text` it reads the folder `texts`.
"""

from lm2_jax.blocks.residual import ResidualJoin
from lm2_jax.config import CheckpointConfig, DataConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from lm2_jax.data.text_source import TextFiles
from lm2_jax.decoder import DecoderConfig
from lm2_jax.memory.bank_writes import BlockWrite
from lm2_jax.memory.gated_bank import GatedBankConfig

TINY = RunConfig(
    name="text_tiny",
    model=ModelConfig(
        vocab_size=512,
        segment_tokens=32,
        decoder=DecoderConfig(width=64, num_layers=2, num_heads=4, num_kv_heads=4, mlp_width=192),
        memory=GatedBankConfig(num_slots=8, write=BlockWrite()),
        join=ResidualJoin(),
    ),
    data=DataConfig(
        source=TextFiles(path="texts", packing="ordered", document_segments=64, held_out_fraction=0.05),
        rows=16,
        segments=(4,),
        carry_state=True,
    ),
    loss=LossConfig(text_weight=1.0),
    optim=OptimConfig(steps=500, learning_rate=3e-3, warmup_steps=30),
    train=TrainConfig(eval_every=200, eval_batches=8),
    checkpoint=CheckpointConfig(every_steps=200),
)

PRESETS = {TINY.name: TINY}
HARDWARE = "CPU, minutes"
PURPOSES = {"text_tiny": "LM2 on your own text, with --text PATH"}
