"""Matrix operations of a train step by hand, from the equations and the sizes of a run: what counts are held against.

A product of [.. I] with [I O] is 2 I O operations for each of its rows. Attention is written out without its causal
half, which plain attention computes too. What is not here: products with no width in them, such as gates per head.
"""

from typing import NamedTuple

from lm2_jax.config import RunConfig
from lm2_jax.decoder import DecoderConfig
from lm2_jax.memory.bank_writes import BlockWrite, ContentWrite, PaperWrite
from lm2_jax.memory.gated_bank import GatedBankConfig
from lm2_jax.memory.titans import TitansConfig


class Work(NamedTuple):
    """One component."""

    forward: float  # operations of one forward pass over a token
    passes: int  # once forward, twice backward, and once more for each time it is recomputed


def step_flops(run: RunConfig) -> float:
    """Of one train step of the run's longest stage, on all devices."""
    tokens = run.data.rows * max(run.data.segments) * run.model.segment_tokens
    return tokens * sum(work.forward * work.passes for work in components(run).values())


def components(run: RunConfig) -> dict[str, Work]:
    """Of one token, by name."""
    model, d = run.model, run.model.decoder
    block = 3 + (model.remat == "full")
    once = {"head": Work(2 * d.width * model.vocab_size, 4)}  # its logits are made again in the backward pass
    layers = {
        "qkvo": Work(_qkvo(d), block),
        "mlp in": Work(4 * d.width * d.mlp_width, block),
        "mlp out": Work(2 * d.width * d.mlp_width, 3),  # a block's last product: nothing in the block needs it again
        "scores": Work(_scores(d, model.segment_tokens), block),
    }
    if isinstance(model.memory, GatedBankConfig):
        layers |= _bank(run, model.memory, block)
    if isinstance(model.memory, TitansConfig):
        layers |= _titans_context(run, model.memory, block)
    return once | {name: Work(d.num_layers * work.forward, work.passes) for name, work in layers.items()}


def _qkvo(d: DecoderConfig) -> float:
    """Projections of one row."""
    return 4 * d.width * d.head_dim * (d.num_heads + d.num_kv_heads)


def _scores(d: DecoderConfig, keys: int) -> float:
    """q k and p v of one query."""
    return 4 * keys * d.num_heads * d.head_dim


def _bank(run: RunConfig, memory: GatedBankConfig, block: int) -> dict[str, Work]:
    """LM2: N slots, read by each token, and written once a segment."""
    d, D, N = run.model.decoder, run.model.decoder.width, memory.num_slots
    slots = N / run.model.segment_tokens  # per token
    kv = 4 * D * d.num_kv_heads * d.head_dim
    if isinstance(
        memory.write, (PaperWrite, ContentWrite)
    ):  # projections of its own, used once to read and once to write
        return {
            "ask": Work(2 * (2 * D * D + slots * 4 * D * D + 4 * N * D), block),
            "bring": Work(2 * 2 * N * D, block),  # R E_mem and R E
            "gates": Work(2 * D * D + slots * 2 * 2 * D * D, block),
        }
    assert isinstance(memory.write, BlockWrite)
    return {
        "ask": Work(slots * kv + _scores(d, N) + 2 * D * D, block),  # keys of the slots; the heads are merged again
        "slots": Work(slots * (_qkvo(d) + _scores(d, run.model.segment_tokens + N) + 6 * D * d.mlp_width), block),
        "gates": Work(2 * D * D + slots * 2 * 2 * D * D, block),
    }


def _titans_context(run: RunConfig, memory: TitansConfig, block: int) -> dict[str, Work]:
    """Titans as context: retrieved rows next to the segment, then an update per chunk, read after each token."""
    d, D, T = run.model.decoder, run.model.decoder.width, run.model.segment_tokens
    H, C = memory.num_heads, memory.chunk_tokens
    shapes = memory.network.shapes(D // H)
    weights = H * sum(i * o for i, o in shapes)
    later = H * sum(i * o for i, o in shapes[1:])
    edges = H * sum(i + o for i, o in shapes)
    seen = T + run.model.join.persistent_tokens()
    update = {
        "derivatives": 2 * weights + 2 * later,  # f(k) forward, and back to each layer's output
        "recall": 4 * weights + 2 * C * edges,  # start weights and momentum; then P . (z X^T) G
        "presence": 4 * H * C * C,  # P = L_a L_e theta and its like, C x C x C of each chunk
    }
    again = {"none": 0, "chunks": 1, "groups": 2}[memory.remat]  # in addition to the recomputation of the block
    return {
        "retrieved": Work(4 * D * d.num_kv_heads * d.head_dim + _scores(d, seen), block),
        "projections": Work(2 * D * D * (3 + 4), block),  # q, gate, o of the retrieval; q, k, v, gate of the update
        "answer": Work(2 * D * D, block),
        "ask": Work(2 * weights, block),
        # X^T G into weights and momentum, which the last recomputation of a chunk does not need.
        "advance": Work(4 * weights, block + max(again - 1, 0)),
        **{name: Work(work, block + again) for name, work in update.items()},
    }
