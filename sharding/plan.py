"""Where every array of a run would lie, told without devices and without allocating anything."""

import math
from collections.abc import Sequence
from typing import Any

import jax

from lm2_jax.config import RunConfig
from lm2_jax.model import LanguageModel
from lm2_jax.precision import prepare_numbers
from lm2_jax.sharding.check import Placed, placed, unsharded
from lm2_jax.sharding.layout import Layout
from lm2_jax.sharding.mesh import MeshConfig, planned_mesh
from lm2_jax.training.state import make_plan


def describe_plan(config: RunConfig, mesh: MeshConfig) -> str:
    """The table of `train.py PRESET --plan`.

    Args:
      config: of the run.
      mesh: its sizes; -1 counts as 1, since nothing says how many devices there are.
    Returns:
      Each parameter, array of the optimizer and array of the recurrent state: shape, type, mesh axes of each
      dimension, bytes on one device; then sums, and what lies whole on every device.
    Raises:
      UserError: mesh and run do not go together.
    """
    prepare_numbers(config.model.precision)
    layout = Layout(planned_mesh(mesh), config=config)
    plan = make_plan(config, LanguageModel(config.model))
    shardings = plan.shardings(layout)
    memory = jax.eval_shape(lambda: plan.model.init_state(config.data.rows))
    trees = {
        "parameters": (plan.shapes.params, shardings.params),
        "optimizer": (plan.shapes.opt_state, shardings.opt_state),
        f"recurrent state, {config.data.rows} rows": (memory, layout.shardings(plan.memory_axes, memory)),
    }
    sizes = " x ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items())
    lines = [f"{config.name} on {math.prod(layout.mesh.shape.values())} devices: {sizes}"]
    for name, (shapes, where) in trees.items():
        lines += ["", *_section(name, list(placed(shapes, where)))]
    whole = [array for shapes, where in trees.values() for array in unsharded(shapes, where)]
    lines += ["", f"whole on every device: {', '.join(array.path for array in whole) or 'nothing of 1 MiB or more'}"]
    return "\n".join(lines)


def _section(name: str, arrays: Sequence[Placed]) -> list[str]:
    """Lines of one tree, the sum first."""
    total = sum(array.device_bytes for array in arrays)
    rows: list[Any] = [
        (array.path, str(list(array.shape)), array.dtype, array.spec, f"{array.device_bytes:,}") for array in arrays
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(5)]
    head = f"{name}: {len(rows)} arrays, {total:,} bytes ({total / 2**20:,.1f} MiB) on each device"
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row[:4], widths, strict=False)) for row in rows]
    return [head, *(f"  {line}  {row[4].rjust(widths[4])}" for line, row in zip(lines, rows, strict=True))]
