"""Traffic by loop adds up to the report's, and a loop is found under those around it."""

import jax
import jax.numpy as jnp

from benchmarks.tpu_traffic import Traffic
from lm2_jax.aot.costs import program_costs
from lm2_jax.aot.hlo import parse


def test_loops_are_named_by_their_iterations():
    def inner(x, row):
        return jnp.tanh(x @ row), None

    def outer(x, rows):
        return jax.lax.scan(inner, x, rows)[0], None

    arguments = jnp.ones((8, 8)), jnp.ones((5, 3, 8, 8))
    text = jax.jit(lambda x, rows: jax.lax.scan(outer, x, rows)[0]).lower(*arguments).compile().as_text()
    program = parse(text)
    traffic = Traffic(program)
    assert traffic.total == program_costs(program).hbm_bytes > 0
    loops = {path for path, kinds in traffic.bytes.items() if kinds.total()}
    assert (5, 3) in loops
    assert sum(traffic.bytes[5, 3].values()) >= 5 * 3 * 3 * 8 * 8 * 4  # a product reads two squares and writes one
