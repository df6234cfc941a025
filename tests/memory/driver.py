"""A memory driven as `blocks.ports` drives it: for a full segment, and for a segment in pieces.

Each function takes the module first, for `module.apply(params, ..., method=function)`.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp

from lm2_jax.memory.base import TokenInputs
from lm2_jax.state import begin_rows, clear_start


class Opened(NamedTuple):
    """A memory inside a segment: the state at its start, one for reads of that, one that runs along."""

    state: Any
    reader: Any
    running: Any


def init(module: Any) -> Any:
    """`module.init` of all parameters."""
    return functools.partial(module.init, method=call)


def begun(module: Any, state: Any) -> Any:
    return begin_rows(state, module.start_state(), module.state_axes())


def call(module: Any, x: Any, state: Any, valid: Any, metrics: Any = None) -> Any:
    """The running memory over a full segment."""
    state = begun(module, state)
    y, opened = module.advance(TokenInputs(x, valid), module.open(state), metrics)
    return y, clear_start(module.close(opened, state), module.state_axes())


def write(module: Any, x: Any, state: Any, valid: Any, metrics: Any = None) -> Any:
    state = begun(module, state)
    opened = module.absorb(TokenInputs(x, valid), module.open(state), metrics)
    return clear_start(module.close(opened, state), module.state_axes())


def read(module: Any, x: Any, state: Any) -> Any:
    return module.read(x, jnp.ones(x.shape[:2], bool), module.reader(begun(module, state)))[0]


def opened(module: Any, state: Any) -> Opened:
    state = begun(module, state)
    return Opened(state, module.reader(state), module.open(state))


def extend(module: Any, x: Any, position: Any, segment_tokens: int, at: Opened) -> tuple[Any, Opened]:
    y, running = module.advance(TokenInputs(x, position < segment_tokens, None, position), at.running)
    return y, at._replace(running=running)


def store(module: Any, x: Any, position: Any, segment_tokens: int, at: Opened) -> Opened:
    inputs = TokenInputs(x, position < segment_tokens, None, position)
    return at._replace(running=module.absorb(inputs, at.running))


def ask(module: Any, x: Any, position: Any, segment_tokens: int, at: Opened) -> tuple[Any, Opened]:
    y, reader = module.read(x, position < segment_tokens, at.reader)
    return y, at._replace(reader=reader)


def close(module: Any, at: Opened) -> Any:
    return clear_start(module.close(at.running, at.state), module.state_axes())
