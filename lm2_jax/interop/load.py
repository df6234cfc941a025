"""Parameters of a model from a checkpoint of another project, one tensor at a time, each placed where it is wanted."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm2_jax.errors import UserError
from lm2_jax.interop.names import from_hf
from lm2_jax.interop.source import Source
from lm2_jax.params import Entry, entries, without_layers
from lm2_jax.training.state import Plan
from lm2_jax.types import PyTree


class Reader(NamedTuple):
    """Arrays by canonical name, one for each layer."""

    has: Callable[[str], bool]
    read: Callable[[str, tuple[int, ...]], np.ndarray]  # of a name, in this shape


def source_reader(source: Source) -> Reader:
    """The parameters that a checkpoint has: the decoder's, and those of a memory that it was trained with."""
    names = source.shapes()

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        foreign = source.name_of(name)
        assert foreign is not None
        array = source.read(foreign)
        if array.size != math.prod(shape):
            raise UserError(
                f"{source.where}: {foreign} has the shape {list(array.shape)}, which does not fit the model's {name} "
                f"of {list(shape)}; use the sizes of the checkpoint's memory",
                status=1,
            )
        return from_hf(name, array, shape)

    return Reader(lambda name: source.name_of(name) in names, read)


def load_params(plan: Plan, shardings: PyTree, reader: Reader, zeros: Iterable[str] = ()) -> PyTree:
    """The parameters of a model: from the reader where it has them, else their initial values.

    Host memory holds the tensor that is being read, and on a CPU the parameters so far. No device holds more than its
    shard of a parameter and of one layer of it.

    Args:
      plan: of the run; its seed decides the initial values.
      shardings: of the parameters.
      reader: where arrays come from.
      zeros: endings of the names of parameters that start at zero, unless they are read; of each module only the
        first that it has.
    """
    shapes = plan.shapes.params
    found, leaves = entries(shapes), jax.tree.leaves(shapes)
    places = jax.tree.leaves(shardings, is_leaf=lambda x: isinstance(x, jax.sharding.Sharding))
    read = [all(reader.has(name) for name in entry.names) for entry in found]
    made: dict[int, Any] = {}
    # Arrays without a layers axis are copied as one, the large ones while nothing else is in memory.
    order = sorted(range(len(found)), key=lambda i: (found[i].stacked, -leaves[i].size))
    for index in order:
        if read[index]:
            made[index] = _filled(found[index], leaves[index], places[index], reader)
    at_zero = _at_zero(found, zeros)
    missing = [index for index in range(len(found)) if not read[index]]

    def initial() -> list[Any]:
        values = jax.tree.leaves(plan.first_params())
        return [jnp.zeros_like(values[i]) if i in at_zero else values[i] for i in missing]

    if missing:  # what is not returned is not computed
        made |= dict(zip(missing, jax.jit(initial, out_shardings=[places[i] for i in missing])(), strict=True))
    return jax.tree.unflatten(jax.tree.structure(shapes), [made[index] for index in range(len(found))])


def _at_zero(found: list[Entry], zeros: Iterable[str]) -> set[int]:
    """Parameters that start at zero, see `load_params`."""
    chosen: dict[str, int] = {}
    for ending in zeros:
        for index, entry in enumerate(found):
            if any(name.endswith(ending) for name in entry.names):
                chosen.setdefault(entry.names[0].rsplit("/", 2)[0], index)
    return set(chosen.values())


def _filled(entry: Entry, leaf: Any, sharding: Any, reader: Reader) -> jax.Array:
    """One parameter; a stacked one is updated in place, layer by layer."""
    if not entry.stacked:
        return jax.device_put(_host(reader, entry.names[0], leaf.shape, leaf.dtype), sharding)
    make, put = _stack_programs(leaf.shape, leaf.dtype, sharding)
    stack = make()
    for index, name in enumerate(entry.names):
        layer = jax.device_put(_host(reader, name, leaf.shape[1:], leaf.dtype), without_layers(sharding))
        stack = put(stack, layer, np.int32(index))
        stack.block_until_ready()  # else the host would read ahead, and keep what it has read
    return stack


@functools.lru_cache(maxsize=64)
def _stack_programs(shape: tuple[int, ...], dtype: Any, sharding: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Makes a stack of zeros, and puts one layer into it, in place."""
    make = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)
    put = jax.jit(
        lambda stack, layer, index: jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )
    return make, put


def _host(reader: Reader, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.ascontiguousarray(reader.read(name, shape).astype(dtype, copy=False))


def array_reader(params: PyTree) -> Callable[[str], np.ndarray]:
    """Gives host arrays of parameters by canonical name, one at a time."""
    found = {}
    for entry, leaf in zip(entries(params), jax.tree.leaves(params), strict=True):
        for index, name in enumerate(entry.names):
            found[name] = (leaf, index if entry.stacked else None)

    def read(name: str) -> np.ndarray:
        leaf, index = found[name]
        return np.asarray(jax.device_get(leaf if index is None else leaf[index]))

    return read
