"""The probe of configs/probe.py with Titans' memory, and with both memories in one decoder.

    python -m benchmarks.memory_forms --arms probe_block probe_rmt probe_none probe_mac --seeds 0 1 2
    python -m benchmarks.memory_forms --arms probe_mag probe_mal probe_lmm probe_hybrid probe_none_window

Parameters equal those of the other arms within 3%. The state, a network per head and layer, is far larger than LM2's
eight slots (the table prints both). MAG and MAL use sliding-window attention as published, here of half a segment.
"""

import dataclasses

from lm2_jax.blocks.combine import Mix
from lm2_jax.blocks.context import ContextJoin
from lm2_jax.blocks.gate import GateJoin
from lm2_jax.blocks.layer import LayerJoin
from lm2_jax.blocks.mixed import MixedJoin, Part
from lm2_jax.blocks.mixer import MixerJoin
from lm2_jax.blocks.plain import PlainJoin
from lm2_jax.blocks.residual import ResidualJoin
from lm2_jax.config import RunConfig
from lm2_jax.memory.bank_writes import BlockWrite
from lm2_jax.memory.none import NoMemory
from lm2_jax.memory.titans import TitansConfig
from lm2_jax.presets.probe import arm, bank
from lm2_jax.presets.tiny import replace_model

TITANS = TitansConfig(num_heads=4, chunk_tokens=16)
PERSISTENT = 4


def windowed(run: RunConfig) -> RunConfig:
    """With attention over the last 16 tokens, across segment borders."""
    return replace_model(run, decoder=dataclasses.replace(run.model.decoder, window_tokens=16))


HYBRID = MixedJoin(
    parts=(
        Part(layers=(0,), memory=bank(BlockWrite()), join=ResidualJoin()),
        Part(layers=(1,), memory=TITANS, join=ContextJoin(num_persistent=PERSISTENT)),
    )
)
ARMS = (
    arm("mac", 104, TITANS, ContextJoin(num_persistent=PERSISTENT)),
    arm("mac_mix", 64, TITANS, ContextJoin(num_persistent=PERSISTENT, combine=Mix())),
    windowed(arm("mag", 104, TITANS, GateJoin(num_persistent=PERSISTENT))),
    windowed(arm("mal", 104, TITANS, LayerJoin(num_persistent=PERSISTENT))),
    arm("lmm", 192, TITANS, MixerJoin(num_persistent=PERSISTENT)),
    arm("titans_residual", 88, TITANS, ResidualJoin(read="own", source="attention")),
    arm("hybrid", 152, NoMemory(), HYBRID),
    windowed(arm("none_window", 264, NoMemory(), PlainJoin(num_persistent=PERSISTENT))),
)
PRESETS = {run.name: run for run in ARMS}
HARDWARE = "CPU, tens of minutes"
PURPOSES = {
    "probe_mac": "Titans, memory as context (MAC)",
    "probe_mac_mix": "MAC with a learned mix of memory and attention",
    "probe_mag": "Titans, memory as gate (MAG)",
    "probe_mal": "Titans, memory as layer (MAL)",
    "probe_lmm": "Titans' memory alone, without attention (LMM)",
    "probe_titans_residual": "Titans' memory added to the residual stream",
    "probe_hybrid": "LM2 in the first block, Titans in the second",
    "probe_none_window": "baseline of MAG and MAL: sliding-window attention",
}
