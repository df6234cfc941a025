"""BABILong as RMT and ARMT were trained on it (arXiv:2402.10790, 2407.04841), around GPT-2 (137M), for accelerators.

GPT-2 is a Hugging Face folder, here data/gpt2 with config.json, model.safetensors and tokenizer.json; BABI and BOOKS
as in `babilong_small`. A stage begins with the parameters of the stage before, and with a new schedule:

    python train.py rmt_babilong --init.from data/gpt2 --workdir runs/rmt/2 \
        --data.source.babi-dir BABI/en-10k --data.source.books-dir BOOKS
    python train.py rmt_babilong --init.from runs/rmt/2 --workdir runs/rmt/4 --data.segments 4 --data.stage-steps \
        --optim.steps 10000 --data.source.babi-dir BABI/en-10k --data.source.books-dir BOOKS

and so on with 6, 8, 16 and 32. The first run has the stages of 1 and 2 segments. ARMT begins with 2 segments,
followed by 3, 5, 8, 16 and 32, the last one for 30,000 steps. Each step draws its number of segments, from 1 to that
of the stage. One model is trained for one task: `--data.source.tasks qa2`.

As published: segments of 512 tokens, m = 16 (RMT) and 10 (ARMT, keys of width 64), 64 rows, AdamW with weight decay
0.01, clipping at 1, warm-up over 1,000 steps and then a linear decay that would reach 0 after twice the steps, loss
on the answer alone. Stages up to 16 segments fit four TPU v5e chips (compiled with `--compile-only --topology v5e:2x2
--quick`); 32 segments need 15.1 of 16 GiB there by the first attempt, so give `--optim.accumulate 2`. Learning rates:
RMT 5e-5 (3e-5 for later tasks, 1e-5 in the scripts), ARMT 1e-4. Here each stage takes the last checkpoint of the one
before; there, the best one. Neither recipe has been run to its end here.
"""

import dataclasses

from lm2_jax.blocks.layer_tokens import LayerTokensJoin
from lm2_jax.blocks.tokens import TokensJoin
from lm2_jax.config import CheckpointConfig, DataConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from lm2_jax.data.babilong_source import BabilongSource
from lm2_jax.data.tokenizers import TokenizerConfig
from lm2_jax.decoder import DecoderConfig
from lm2_jax.memory.associative import AssociativeConfig
from lm2_jax.memory.tokens import TokensConfig
from lm2_jax.precision import Precision
from lm2_jax.presets.tiny import replace_model
from lm2_jax.training.optim_config import Linear

GPT2 = DecoderConfig(
    width=768,
    num_layers=12,
    num_heads=12,
    num_kv_heads=12,
    mlp_width=3072,
    mlp="gelu",
    norm="layer",
    max_positions=1024,
    attention_bias="qkvo",
)
RMT = RunConfig(
    name="rmt_babilong",
    model=ModelConfig(
        vocab_size=50_257,
        segment_tokens=512,
        decoder=GPT2,
        memory=TokensConfig(num_tokens=16),
        join=TokensJoin(),
        precision=Precision(compute="bfloat16"),
        remat="full",
    ),
    data=DataConfig(
        source=BabilongSource(layout="question_last", margin=20),
        tokenizer=TokenizerConfig(kind="json", path="data/gpt2/tokenizer.json"),
        rows=64,
        segments=(1, 2),
        stage_steps=(5000,),
        vary_segments=True,
    ),
    loss=LossConfig(answer_weight=1.0, text_weight=0.0),
    optim=OptimConfig(
        steps=15_000,
        learning_rate=5e-5,
        schedule=Linear(),
        warmup_steps=1000,
        final_fraction=0.5,
        beta2=0.999,
        weight_decay=0.01,
    ),
    train=TrainConfig(eval_every=500, eval_batches=8),
    checkpoint=CheckpointConfig(every_steps=500),
)
ARMT = dataclasses.replace(
    replace_model(RMT, memory=AssociativeConfig(num_tokens=10, key_width=64), join=LayerTokensJoin()),
    name="armt_babilong",
    data=dataclasses.replace(RMT.data, segments=(2,), stage_steps=()),
    optim=dataclasses.replace(RMT.optim, steps=10_000, learning_rate=1e-4),
)

PRESETS = {run.name: run for run in (RMT, ARMT)}
HARDWARE = "one to four accelerators, hours for each stage"
PURPOSES = {
    "rmt_babilong": "RMT around GPT-2 as published, the stages of 1 and 2 segments",
    "armt_babilong": "ARMT around GPT-2 as published, the stage of 2 segments",
}
