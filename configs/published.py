"""Models at the published sizes, for TPU slices; docs/tpu.md has their estimated costs.

    python train.py lm2_1p7b --compile-only --quick --topology v5e:16x16

- `lm2_1p7b`: LM2 (arXiv:2502.06049, section 3), 16 blocks of width 2048 with 2,048 slots each, with read projections of
  its own, in the write form `content`; 1.7 billion parameters. docs/experiments.md says why not in the paper's.
- `lm2_1p7b_paper`, `lm2_8b_paper`: the same with the paper's equations as they are printed.
- `llama_1p7b`: its baseline without memory, with a wider MLP for the same number of parameters.
- `lm2_8b`: the width of Llama-3-8B, in 24 blocks.
- `hmt_135m`: HMT (arXiv:2405.06067) around SmolLM-135M, a backbone of the released scripts, with their sizes: rows of
  1,024 for 990 tokens, 32 sensory tokens and the recalled row twice, keys of width 1,536. 300 memory embeddings are the
  paper's. It is trained from a pretrained decoder: `python train.py hmt_135m --init.from HuggingFaceTB/SmolLM-135M`.
- `titans_mac_1p3b`: the largest memory-as-context model of Titans (arXiv:2501.00663), on rows of the same length.

HMT's rows have 2, 4 and 8 segments, 500 steps each, at a rate of 1e-4, as in the scripts. There it falls to 0.6 of
itself every 100 steps, here on a cosine; the paper trains adapters of large backbones and this preset all parameters.
What recalls a row is the segment before, as everywhere here (docs/design.md).

All compute in bfloat16, keep parameters, both moments and the memory in float32, recompute each block in the backward
pass, and compute logits for 512 tokens at a time.

Data is the output of `python -m lm2_jax.data.convert`; the paper's corpus is that of SmolLM without its Python part.
The paper does not state its optimizer. Steps, warm-up and learning rates are those of the released configuration. What
decays is not: here weight decay applies to all matrices, the embedding included, and not to gates; in the released
code to gates and not to the embedding.

`MESHES` has a mesh per number of devices for a step of 64 rows (256 rows on 4,096 chips: `--data.rows 256`); train.py
uses it if no --mesh option is given. A test checks that all arrays divide; docs/tpu.md lists what was compiled.
"""

import dataclasses

from lm2_jax.blocks.plain import PlainJoin
from lm2_jax.blocks.recall import RecallJoin
from lm2_jax.blocks.residual import ResidualJoin
from lm2_jax.config import CheckpointConfig, DataConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from lm2_jax.data.shards import TokenShards
from lm2_jax.data.tokenizers import TokenizerConfig
from lm2_jax.decoder import DecoderConfig
from lm2_jax.memory.bank_writes import ContentWrite, PaperWrite
from lm2_jax.memory.gated_bank import GatedBankConfig
from lm2_jax.memory.hierarchical import HierarchicalConfig
from lm2_jax.memory.none import NoMemory
from lm2_jax.precision import Precision
from lm2_jax.presets import titans
from lm2_jax.presets.tiny import replace_model
from lm2_jax.rope import Llama3Scaling
from lm2_jax.sharding.mesh import MeshConfig

LLAMA_1B = DecoderConfig(
    width=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    mlp_width=8192,
    rope_theta=500_000.0,
    rope_scaling=Llama3Scaling(factor=32.0),
)
LM2_1P7B = RunConfig(
    name="lm2_1p7b",
    model=ModelConfig(
        vocab_size=128_256,
        segment_tokens=2048,
        decoder=LLAMA_1B,
        # The released code has 8 heads in the memory; learned initial slots are part of the paper's parameter count.
        memory=GatedBankConfig(num_slots=2048, num_heads=8, start="learned", norm_slots=False, write=ContentWrite()),
        join=ResidualJoin(read="own", source="attention"),
        precision=Precision(compute="bfloat16"),
        remat="full",
    ),
    data=DataConfig(
        source=TokenShards(path="data/smollm-corpus", packing="ordered"),
        tokenizer=TokenizerConfig(kind="json", path="data/llama-3/tokenizer.json"),
        rows=64,
        segments=(4,),
        carry_state=True,
    ),
    loss=LossConfig(answer_weight=1.0, text_weight=1.0, time_chunk=512),
    optim=OptimConfig(steps=100_000, learning_rate=6e-4, final_fraction=0.0, warmup_steps=700),
    train=TrainConfig(log_every=10, eval_every=1000, eval_batches=8),
    checkpoint=CheckpointConfig(every_steps=1000),
)
LLAMA_1P7B = dataclasses.replace(
    replace_model(
        LM2_1P7B, decoder=dataclasses.replace(LLAMA_1B, mlp_width=12_800), memory=NoMemory(), join=PlainJoin()
    ),
    name="llama_1p7b",
)
LM2_8B = dataclasses.replace(
    replace_model(
        LM2_1P7B,
        decoder=dataclasses.replace(
            LLAMA_1B, width=4096, num_layers=24, mlp_width=12_288, rope_scaling=Llama3Scaling(factor=8.0)
        ),
    ),
    name="lm2_8b",
    optim=dataclasses.replace(LM2_1P7B.optim, learning_rate=3e-4),
)

HMT_135M = dataclasses.replace(
    LM2_1P7B,
    name="hmt_135m",
    model=dataclasses.replace(
        LM2_1P7B.model,
        vocab_size=49_152,
        segment_tokens=990,
        decoder=DecoderConfig(width=576, num_layers=30, num_heads=9, num_kv_heads=3, mlp_width=1536),
        memory=HierarchicalConfig(num_memories=300, sensory_tokens=32, key_width=1536),
        join=RecallJoin(),
    ),
    data=DataConfig(
        source=TokenShards(path="data/redpajama-v2", packing="ordered"),
        tokenizer=TokenizerConfig(kind="json", path="data/smollm/tokenizer.json"),
        rows=64,
        segments=(2, 4, 8),
        stage_steps=(500, 1000),
    ),
    optim=OptimConfig(steps=1500, learning_rate=1e-4, final_fraction=0.1, warmup_steps=0),
)


def printed(run: RunConfig) -> RunConfig:
    """The same with the equations as the paper prints them."""
    memory = dataclasses.replace(LM2_1P7B.model.memory, write=PaperWrite())
    return dataclasses.replace(replace_model(run, memory=memory), name=f"{run.name}_paper")


# 16 segments of 512 tokens: as many tokens per row as the others.
TITANS_MAC_1P3B = dataclasses.replace(
    titans.PRESETS["titans_1p3b_mac"],
    name="titans_mac_1p3b",
    data=dataclasses.replace(titans.PRESETS["titans_1p3b_mac"].data, rows=64, segments=(16,)),
)

ALL = (LM2_1P7B, LLAMA_1P7B, LM2_8B, HMT_135M, TITANS_MAC_1P3B, printed(LM2_1P7B), printed(LM2_8B))
PRESETS = {run.name: run for run in ALL}
HARDWARE = "TPU slice"
PURPOSES = {
    "lm2_1p7b": "LM2 at the paper's size, 2,048 slots in each block",
    "llama_1p7b": "its baseline without memory, equal parameters",
    "lm2_8b": "LM2 at the width of Llama-3-8B",
    "hmt_135m": "HMT around SmolLM-135M, 300 memory embeddings",
    "titans_mac_1p3b": "Titans MAC at 1.3 billion parameters, on rows as long as LM2's",
    "lm2_1p7b_paper": "LM2 at the paper's size, with its equations as they are printed",
    "lm2_8b_paper": "lm2_8b with the paper's equations as they are printed",
}

# Rows are split over data and fsdp. With more chips than rows, slots and tokens are split over `slots` (the queries of
# a device attend to all keys, which are few); in Titans, whose memory processes its tokens one after the other, heads
# are split over `model`. Two replicas even where one would do: libtpu sums a gradient over all devices by all-reduce,
# but over some of the devices by reduce-scatter, which sends half. 4,096 chips of v5e are 16 slices with a replica in
# each.
_LM2 = {
    16: MeshConfig(data=2, fsdp=8),
    64: MeshConfig(data=2, fsdp=32),
    256: MeshConfig(data=2, fsdp=32, slots=4),
    512: MeshConfig(data=2, fsdp=32, slots=8),
    4096: MeshConfig(data=16, fsdp=16, slots=16),
}
_LM2_8B = _LM2 | {64: MeshConfig(data=2, fsdp=16, slots=2)}  # on v5e with --optim.accumulate 2, to fit into memory
MESHES: dict[str, dict[int, MeshConfig]] = {
    "lm2_1p7b": _LM2,
    "lm2_1p7b_paper": _LM2,
    "llama_1p7b": _LM2,
    "lm2_8b": _LM2_8B,
    "lm2_8b_paper": _LM2_8B,
    "hmt_135m": {16: MeshConfig(data=2, fsdp=8), 64: MeshConfig(data=2, fsdp=32)},
    "titans_mac_1p3b": {
        16: MeshConfig(data=1, fsdp=8, model=2),
        64: MeshConfig(data=1, fsdp=32, model=2),
        256: MeshConfig(data=1, fsdp=64, model=4),
        512: MeshConfig(data=1, fsdp=64, model=8),
        4096: MeshConfig(data=16, fsdp=16, model=8, slots=2),
    },
}
