"""BABILong on real input: bAbI's files in the text of real books, for a few hours of CPU.

    python train.py babilong_small --workdir runs/babilong_small \
        --data.source.babi-dir BABI/en-10k --data.source.books-dir BOOKS
    python eval.py babilong --workdir runs/babilong_small --babi-dir BABI/en-10k --books-dir BOOKS

BABI is the bAbI v1.2 distribution, BOOKS any folder of .txt books. Without them the run reads simulated stories in
generated prose. Questions are spread over the text, first about one person and in the last stage about four
(docs/design.md). Text tokens have a hundredth of the weight of answer tokens; with a tenth, the model learns the
answers poorly. Rows grow from four segments of 128 tokens to eight. The other presets are the same run with other
memories, with full attention or without a memory; parameters are equal within 3%. A preset that ends in `_grown` has
rows of one, two, four and eight segments, as RMT was trained; `lm2 compare` chooses between both:

    lm2 compare babilong_small,babilong_small_grown babilong_small_rmt,babilong_small_rmt_grown --search-steps 4000 \
        --out runs/compare/babi --suite "babilong --babi-dir BABI/en-10k --books-dir TEST_BOOKS" \
        -- --data.source.babi-dir BABI/en-10k --data.source.books-dir BOOKS
"""

import dataclasses

from lm2_jax.blocks.combine import Mix
from lm2_jax.blocks.context import ContextJoin
from lm2_jax.blocks.gate import GateJoin
from lm2_jax.blocks.layer_tokens import LayerTokensJoin
from lm2_jax.blocks.plain import PlainJoin
from lm2_jax.blocks.residual import ResidualJoin
from lm2_jax.blocks.tokens import TokensJoin
from lm2_jax.config import CheckpointConfig, DataConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from lm2_jax.data.babilong_source import BabilongSource
from lm2_jax.decoder import DecoderConfig
from lm2_jax.memory.associative import AssociativeConfig
from lm2_jax.memory.bank_writes import BlockWrite
from lm2_jax.memory.gated_bank import GatedBankConfig
from lm2_jax.memory.gated_delta import GatedDeltaConfig
from lm2_jax.memory.none import NoMemory
from lm2_jax.memory.titans import TitansConfig
from lm2_jax.memory.tokens import TokensConfig
from lm2_jax.presets.tiny import replace_model

DECODER = DecoderConfig(width=64, num_layers=2, num_heads=4, num_kv_heads=4, mlp_width=200)
WIDER = dataclasses.replace(DECODER, mlp_width=264)  # the parameters of LM2's gates, given to the other two
LM2 = RunConfig(
    name="babilong_small",
    model=ModelConfig(
        vocab_size=1024,
        segment_tokens=128,
        decoder=DECODER,
        memory=GatedBankConfig(num_slots=16, write=BlockWrite()),
        join=ResidualJoin(topology="threaded"),
        remat="full",
    ),
    data=DataConfig(
        source=BabilongSource(
            tasks=("qa1",),
            noise_fraction=0.2,
            noise_up_to=0.95,
            question_rate=1.0,
            asked=(1, 2, 3, 4),
            asked_steps=(500, 1500, 2300),
        ),
        rows=8,
        segments=(4, 8),
        stage_steps=(3000,),
        fill_rows=True,
    ),
    loss=LossConfig(answer_weight=1.0, text_weight=0.01),
    optim=OptimConfig(
        steps=8000, learning_rate=3e-3, final_fraction=0.2, warmup_steps=50, beta2=0.999, weight_decay=0.0
    ),
    train=TrainConfig(eval_every=200, eval_batches=4),
    checkpoint=CheckpointConfig(every_steps=200, keep=1),
)
# A step of MAC takes more than twice as long, so there are fewer; it starts to use its memory later, so the first stage
# is longer.
MAC = dataclasses.replace(
    replace_model(
        LM2,
        decoder=dataclasses.replace(DECODER, mlp_width=64),
        memory=TitansConfig(num_heads=4, chunk_tokens=16),
        join=ContextJoin(num_persistent=4, combine=Mix()),
    ),
    name="babilong_small_mac",
    data=dataclasses.replace(LM2.data, source=dataclasses.replace(LM2.data.source, asked_steps=(1000, 1800, 2400))),
    optim=dataclasses.replace(LM2.optim, steps=4500),
)
RMT = dataclasses.replace(
    replace_model(LM2, decoder=WIDER, memory=TokensConfig(num_tokens=16), join=TokensJoin()), name="babilong_small_rmt"
)
NONE = dataclasses.replace(
    replace_model(LM2, decoder=WIDER, memory=NoMemory(), join=PlainJoin()), name="babilong_small_none"
)

ARMT = dataclasses.replace(
    replace_model(
        LM2,
        decoder=dataclasses.replace(DECODER, mlp_width=232),
        memory=AssociativeConfig(num_tokens=16, key_width=16, norm=True),
        join=LayerTokensJoin(),
    ),
    name="babilong_small_armt",
)
DELTA = dataclasses.replace(
    replace_model(
        LM2,
        decoder=dataclasses.replace(DECODER, mlp_width=152),
        memory=GatedDeltaConfig(num_heads=4, chunk_tokens=32),
        join=GateJoin(),
    ),
    name="babilong_small_gated_delta",
)
# As many tokens as the longest rows of training; longer texts are refused.
FULL = dataclasses.replace(
    replace_model(LM2, decoder=dataclasses.replace(WIDER, max_tokens=4096), memory=NoMemory(), join=PlainJoin()),
    name="babilong_small_full",
)


def grown(run: RunConfig) -> RunConfig:
    """The same with rows that begin with one segment."""
    data = dataclasses.replace(run.data, segments=(1, 2, 4, 8), stage_steps=(800, 1600, 3000))
    return dataclasses.replace(run, name=f"{run.name}_grown", data=data)


_RUNS = (LM2, MAC, RMT, ARMT, DELTA, FULL, NONE)
PRESETS = {run.name: run for run in (*_RUNS, *map(grown, _RUNS))}
HARDWARE = "CPU, hours"
PURPOSES = {
    "babilong_small": "LM2 on BABILong, with real bAbI and books if given",
    "babilong_small_mac": "the same with Titans as context",
    "babilong_small_rmt": "the same with RMT",
    "babilong_small_armt": "the same with ARMT",
    "babilong_small_gated_delta": "the same with a gated delta rule in parallel to attention",
    "babilong_small_full": "the baseline with full attention",
    "babilong_small_none": "the baseline without memory",
}
PURPOSES |= {f"{name}_grown": f"{name}, rows begin with one segment" for name in PURPOSES}
