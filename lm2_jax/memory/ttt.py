"""TTT-Linear and TTT-MLP (arXiv:2407.04620) as configurations of the Titans memory.

They set fields of `TitansConfig` only, so a run can use them as its `model.memory`, and config.json holds them in full.
"""

import dataclasses
import math
from typing import Any

from lm2_jax.memory.titans import GateConfig, StepConfig, TitansConfig
from lm2_jax.ops.ttt_chunk.networks import MlpNetwork, SquaredError


def ttt_linear(head_width: int, **fields: Any) -> TitansConfig:
    """f(x) = x + LN(x W + b), steps of at most 1 / head_width; see `ttt_mlp`."""
    return _ttt(MlpNetwork(depth=1, bias=True, norm_epsilon=1e-6), 1.0, head_width, fields)


def ttt_mlp(head_width: int, **fields: Any) -> TitansConfig:
    """f(x) = x + LN(gelu(x W1 + b1) W2 + b2), steps of at most 0.1 / head_width.

        W_t = W_0 - sum_{i<=t} eta[t, i] dl/dW_i,  l = |f(k) - v|^2 / 2,
        eta[t, i] = max(0, 1/t + learned_t) * base * sigmoid(x_i w) / head_width

    All gradients are taken at the weights before a mini-batch of 16 tokens. There is no momentum and no forgetting. The
    published target v - k for LN(..) is the target v for f.

    Differences from the released code, which applies RoPE to q and k with the position in the mini-batch, shares one
    projection for q and k if it has convolutions, normalises the output over all heads, and initialises both W1 and W2
    with a standard deviation of 0.02; here that of W2 is 0.01 (`start_scale`).

    Args:
      head_width: width of one head.
      fields: fields of `TitansConfig` that replace those of TTT.
    """
    return _ttt(MlpNetwork(depth=2, bias=True, norm_epsilon=1e-6), 0.1, head_width, fields)


def _ttt(network: MlpNetwork, base: float, head_width: int, fields: dict[str, Any]) -> TitansConfig:
    off = GateConfig("off")
    config = TitansConfig(
        network=network,
        loss=SquaredError(factor=0.5),
        step=StepConfig(maximum=base / head_width, bias=0.0, by_place=True),
        momentum=off,
        forget=off,
        conv_tokens=0,
        silu=False,
        unit_keys=False,
        output_gate="gelu",
        start_scale=0.02 * math.sqrt(head_width),
    )
    return dataclasses.replace(config, **fields)
