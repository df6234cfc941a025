"""One tiny preset per memory and join: each initialises, trains and streams on a CPU in seconds.

python train.py lm2_tiny --workdir runs/lm2_tiny
"""

import dataclasses
from typing import Any

from lm2_jax.blocks.base import JoinConfig
from lm2_jax.blocks.combine import Mix
from lm2_jax.blocks.context import ContextJoin
from lm2_jax.blocks.gate import GateJoin
from lm2_jax.blocks.heads import HeadsJoin
from lm2_jax.blocks.layer import LayerJoin
from lm2_jax.blocks.layer_tokens import LayerTokensJoin
from lm2_jax.blocks.mixed import MixedJoin, Part
from lm2_jax.blocks.mixer import MixerJoin
from lm2_jax.blocks.plain import PlainJoin
from lm2_jax.blocks.recall import RecallJoin
from lm2_jax.blocks.residual import ResidualJoin
from lm2_jax.blocks.tokens import TokensJoin
from lm2_jax.config import CheckpointConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from lm2_jax.decoder import DecoderConfig
from lm2_jax.memory.associative import AssociativeConfig
from lm2_jax.memory.bank_writes import PaperWrite, SlotsWrite
from lm2_jax.memory.base import MemoryConfig
from lm2_jax.memory.compressive import CompressiveConfig
from lm2_jax.memory.gated_bank import GatedBankConfig
from lm2_jax.memory.gated_delta import GatedDeltaConfig
from lm2_jax.memory.hierarchical import HierarchicalConfig
from lm2_jax.memory.none import NoMemory
from lm2_jax.memory.titans import TitansConfig
from lm2_jax.memory.tokens import TokensConfig
from lm2_jax.ops.ttt_chunk.networks import MlpNetwork

TITANS = TitansConfig(num_heads=2, chunk_tokens=4, network=MlpNetwork(expansion=2))

MEMORIES: dict[str, tuple[MemoryConfig, JoinConfig]] = {
    "lm2": (GatedBankConfig(num_slots=6), ResidualJoin()),
    "lm2_threaded": (GatedBankConfig(num_slots=6), ResidualJoin(topology="threaded")),
    "lm2_paper": (
        GatedBankConfig(num_slots=6, norm_slots=False, write=PaperWrite()),
        ResidualJoin(read="own", source="attention"),
    ),
    "lm2_context": (
        GatedBankConfig(num_slots=6, write=SlotsWrite()),
        ContextJoin(retrieve="rows", num_persistent=3, combine=Mix()),
    ),
    "none": (NoMemory(), PlainJoin()),
    "none_window": (NoMemory(), PlainJoin(num_persistent=3)),
    "window": (NoMemory(), PlainJoin()),
    "llama": (NoMemory(), PlainJoin()),
    "gpt2": (NoMemory(), PlainJoin()),
    "rmt": (TokensConfig(num_tokens=3), TokensJoin()),
    "rmt_gpt2": (TokensConfig(num_tokens=3), TokensJoin()),
    "armt": (AssociativeConfig(num_tokens=3, key_width=8, norm=True), LayerTokensJoin()),
    "hmt": (HierarchicalConfig(num_memories=2, sensory_tokens=3, key_width=8), RecallJoin()),
    "infini": (CompressiveConfig(), HeadsJoin()),
    "gated_delta": (GatedDeltaConfig(num_heads=2, chunk_tokens=8), MixerJoin()),
    "titans_mac": (TITANS, ContextJoin(num_persistent=3)),
    "titans_mag": (TITANS, GateJoin(num_persistent=3)),
    "titans_mal": (TITANS, LayerJoin(num_persistent=3)),
    "titans_lmm": (TITANS, MixerJoin(num_persistent=3)),
    "titans_residual": (TITANS, ResidualJoin(read="own", source="attention")),
    "hybrid": (
        NoMemory(),
        MixedJoin(
            parts=(
                Part(layers=(0,), memory=GatedBankConfig(num_slots=6), join=ResidualJoin()),
                Part(layers=(1,), memory=TITANS, join=ContextJoin(num_persistent=3)),
            )
        ),
    ),
}
GPT2 = {"norm": "layer", "mlp": "gelu", "mlp_width": 96, "attention_bias": "qkvo", "num_kv_heads": 4}
# Fields of the decoder that differ: how far attention reaches, where it is not the segment, and GPT-2's layers.
DECODERS: dict[str, dict[str, Any]] = {
    "none_window": {"window_tokens": 20},
    "window": {"window_tokens": 32},
    "llama": {"max_tokens": 4096},
    "gpt2": {"max_tokens": 4096, "max_positions": 4096, **GPT2},
    "rmt_gpt2": {"max_positions": 64, **GPT2},
    "titans_mag": {"window_tokens": 20},
    "titans_mal": {"window_tokens": 20},
}


# Segments of a row, where two do not train every parameter: of one embedding HMT recalls all, whatever the query.
SEGMENTS = {"hmt": 3}


def tiny(name: str, memory: MemoryConfig, join: JoinConfig, segments: int = 2, **fields: Any) -> RunConfig:
    """The tiny run of one memory and join; `fields` are of the decoder."""
    decoder = DecoderConfig(width=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=64)
    decoder = dataclasses.replace(decoder, **fields)
    return RunConfig(
        name=name,
        model=ModelConfig(vocab_size=512, segment_tokens=32, decoder=decoder, memory=memory, join=join),
        data=DataConfig(rows=8, segments=(segments,)),
        optim=OptimConfig(steps=20, warmup_steps=2),
        train=TrainConfig(log_every=5, eval_every=10, eval_batches=1),
        checkpoint=CheckpointConfig(every_steps=10),
    )


PRESETS = {
    f"{name}_tiny": tiny(f"{name}_tiny", *parts, SEGMENTS.get(name, 2), **DECODERS.get(name, {}))
    for name, parts in MEMORIES.items()
}
HARDWARE = "CPU, seconds"
PURPOSES = {
    "lm2_tiny": "LM2: a bank of slots in each block",
    "lm2_threaded_tiny": "LM2 with one bank that all blocks share",
    "lm2_paper_tiny": "LM2 with the paper's read and write",
    "lm2_context_tiny": "LM2's slots as extra keys and values of attention",
    "none_tiny": "baseline: attention within a segment, no memory",
    "window_tiny": "baseline: Llama with a sliding attention window of one segment",
    "llama_tiny": "baseline: Llama with full attention and a cache of all keys",
    "gpt2_tiny": "baseline: GPT-2 with full attention and a cache of all keys",
    "none_window_tiny": "baseline: sliding-window attention, no memory",
    "rmt_tiny": "RMT: memory tokens that pass through the decoder",
    "rmt_gpt2_tiny": "RMT around a GPT-2, as it was published",
    "armt_tiny": "ARMT: an associative memory per layer, written by memory tokens",
    "hmt_tiny": "HMT: one embedding per segment, of which a summary recalls one",
    "infini_tiny": "Infini-attention: linear attention over the past, inside the heads",
    "titans_mac_tiny": "Titans, memory as context (MAC)",
    "titans_mag_tiny": "Titans, memory as gate (MAG)",
    "titans_mal_tiny": "Titans, memory as layer (MAL)",
    "titans_lmm_tiny": "Titans' memory alone, without attention (LMM)",
    "titans_residual_tiny": "Titans' memory added to the residual stream",
    "hybrid_tiny": "LM2 and Titans in different blocks of one decoder",
}


def replace_model(run: RunConfig, **changes: object) -> RunConfig:
    """`run` with fields of its model changed."""
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **changes))
