"""Low-rank adapters added to the kernels they belong to."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lm2_jax.decoder import LoraConfig
from lm2_jax.runs import Run
from lm2_jax.types import Array, PyTree


def merge_lora(run: Run) -> Run:
    """The same model without adapters, W + (alpha / r) A B in the place of each W; a run without any as it is."""
    model = run.config.model
    if not model.decoder.lora.rank:
        return run
    scale = model.decoder.lora.alpha / model.decoder.lora.rank

    def merged(tree: PyTree) -> PyTree:
        if not isinstance(tree, Mapping):
            return tree
        if "lora_a" in tree:
            rest = {name: part for name, part in tree.items() if not name.startswith("lora_")}
            return rest | {"w": _added(tree["w"], tree["lora_a"], tree["lora_b"], scale)}
        return {name: merged(part) for name, part in tree.items()}

    model = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, lora=LoraConfig()))
    config = dataclasses.replace(run.config, model=model)
    return run._replace(config=config, model=run.model.clone(config=model), params=merged(run.params))


@functools.partial(jax.jit, static_argnums=3)
def _added(w: Array, a: Array, b: Array, scale: float) -> Array:
    """The kernels of a group of blocks, which are stacked on the first axis, with their adapters' products."""
    layers, rank = a.shape[0], a.shape[-1]
    wide = jnp.promote_types(w.dtype, jnp.float32)
    a_LIR, b_LRO = a.reshape(layers, -1, rank).astype(wide), b.reshape(layers, rank, -1).astype(wide)
    product = jnp.einsum("lir,lro->lio", a_LIR, b_LRO, precision="highest").reshape(w.shape)
    return (w.astype(wide) + scale * product).astype(w.dtype)
