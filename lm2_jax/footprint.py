"""Lower bounds of the memory that a run needs, from its config alone, before anything of that size is made."""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lm2_jax.config import RunConfig
from lm2_jax.errors import UserError
from lm2_jax.model import LanguageModel

MLP_KERNELS = {"swiglu": 3, "gelu": 2}
HOST_BYTES_PER_TOKEN = 20  # of a batch: five int32 or bool arrays at least


def lower_bound(run: RunConfig) -> dict[str, int]:
    """Bytes that a run needs at least, by what needs them; the key names the fields that decide.

    Counted are the decoder's parameters with their gradients and both moments, the recurrent state, one batch, and
    the activations of one segment. Nothing of these sizes is made.
    """
    model, data, parameters = run.model, run.data, _decoder_parameters(run)
    moments = _bytes(model.precision.moments) + 4
    rows = data.rows // run.optim.accumulate
    return {
        "parameters, gradients and moments (model.decoder, model.vocab_size)": parameters
        * (2 * _bytes(model.precision.params) + moments),
        "recurrent state (model.memory, data.rows, optim.accumulate)": state_bytes(run, rows),
        "one batch (data.rows, data.segments, model.segment_tokens)": data.rows
        * max(data.segments)
        * model.segment_tokens
        * HOST_BYTES_PER_TOKEN,
        "activations of a segment (data.rows, model.segment_tokens, model.decoder.width, optim.accumulate)": rows
        * model.segment_tokens
        * model.decoder.width
        * _bytes(model.precision.compute),
    }


def _decoder_parameters(run: RunConfig) -> int:
    decoder, model = run.model.decoder, run.model
    D, K = decoder.width, decoder.head_dim
    attention = 2 * D * K * (decoder.num_heads + decoder.num_kv_heads)
    embeddings = model.vocab_size * D * (1 if decoder.tie_head else 2)
    return embeddings + decoder.num_layers * (attention + MLP_KERNELS[decoder.mlp] * D * decoder.mlp_width)


def state_bytes(run: RunConfig, rows: int) -> int:
    """Bytes of the recurrent state of so many rows, without making it."""
    state = jax.eval_shape(lambda: LanguageModel(run.model).init_state(rows))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def check_memory(run: RunConfig, devices: Sequence[Any]) -> None:
    """Refuses a run that cannot fit into the memory of the devices together.

    Raises:
      UserError: the lower bound is larger, with the largest item and the fields that decide it.
    """
    _check("this run", lower_bound(run), devices)


def check_inference_memory(run: RunConfig, devices: Sequence[Any]) -> None:
    """Refuses to load a trained run whose parameters, with the state of one row, cannot fit into the devices together.

    Raises:
      UserError: as `check_memory`.
    """
    parameters = _decoder_parameters(run) * _bytes(run.model.precision.params)
    state = state_bytes(run, 1)
    needs = {"parameters (model.decoder, model.vocab_size)": parameters, "recurrent state (model.memory)": state}
    _check(f"evaluating {run.name}", needs, devices, "use more or larger devices (--mesh)")


def _check(what: str, needs: dict[str, int], devices: Sequence[Any], advice: str = "make those fields smaller") -> None:
    available = device_bytes(devices)
    if available is None or sum(needs.values()) <= available:
        return
    largest = max(needs, key=needs.__getitem__)
    raise UserError(
        f"{what} needs at least {_size(sum(needs.values()))} of memory, but the {len(devices)} devices have "
        f"{_size(available)}. The largest part is {_size(needs[largest])} of {largest}: {advice}",
        status=1,
    )


def device_bytes(devices: Sequence[Any]) -> int | None:
    """Memory of all devices together; CPU devices share the machine's. None where it is unknown."""
    if devices[0].platform == "cpu":
        try:
            one = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):  # not on every system
            return None
        return one * len({device.process_index for device in devices})
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices if device.process_index == 0]
    return limits[0] * len(devices) if limits and limits[0] else None


def _bytes(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize


def _size(count: float) -> str:
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = min(int(math.log2(max(count, 1)) // 10), len(units) - 1)
    return f"{count / 1024**power:,.{1 if power else 0}f} {units[power]}"
