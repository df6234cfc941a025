"""The probe of configs/probe.py with the memories of other authors, and with attention that reaches further.

    lm2 compare probe_none probe_full probe_armt --seeds 3 --learning-rates 1e-3 3e-3 --jobs 2 --out runs/compare/probe

Parameters equal those of the other arms within 3%; floats of state differ (the table prints them).
"""

import dataclasses

from lm2_jax.blocks.heads import HeadsJoin
from lm2_jax.blocks.layer_tokens import LayerTokensJoin
from lm2_jax.blocks.mixer import MixerJoin
from lm2_jax.blocks.plain import PlainJoin
from lm2_jax.blocks.residual import ResidualJoin
from lm2_jax.blocks.tokens import TokensJoin
from lm2_jax.config import RunConfig
from lm2_jax.memory.associative import AssociativeConfig
from lm2_jax.memory.bank_writes import BlockWrite
from lm2_jax.memory.compressive import CompressiveConfig
from lm2_jax.memory.gated_delta import GatedDeltaConfig
from lm2_jax.memory.none import NoMemory
from lm2_jax.memory.tokens import TokensConfig
from lm2_jax.presets.probe import SLOTS, arm, bank
from lm2_jax.presets.tiny import replace_model


def reaching(run: RunConfig, **reach: int) -> RunConfig:
    """With attention over more than the segment."""
    return replace_model(run, decoder=dataclasses.replace(run.model.decoder, **reach))


ARMS = (
    reaching(arm("full", 264, NoMemory(), PlainJoin()), max_tokens=2048),
    reaching(arm("window", 264, NoMemory(), PlainJoin()), window_tokens=32),
    arm("block_half", 200, bank(BlockWrite(), num_slots=SLOTS // 2), ResidualJoin()),
    arm("rmt_16", 264, TokensConfig(num_tokens=2 * SLOTS), TokensJoin()),
    arm("armt", 232, AssociativeConfig(num_tokens=SLOTS, key_width=16, norm=True), LayerTokensJoin()),
    arm("infini", 264, CompressiveConfig(), HeadsJoin()),
    arm("gated_delta", 232, GatedDeltaConfig(num_heads=4, chunk_tokens=16), MixerJoin()),
)
PRESETS = {run.name: run for run in ARMS}
HARDWARE = "CPU, minutes"
PURPOSES = {
    "probe_full": "baseline: full attention over all segments",
    "probe_window": "baseline: sliding-window attention over a segment's tokens",
    "probe_block_half": "LM2, block write, a bank in each block, half as many slots",
    "probe_rmt_16": "RMT with 16 memory tokens",
    "probe_armt": "ARMT: an associative memory per layer, written by 8 memory tokens",
    "probe_infini": "Infini-attention, delta update",
    "probe_gated_delta": "the gated delta rule in place of attention",
}
