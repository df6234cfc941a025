"""The placement of every array of a run, computed without devices and without allocating anything."""

import math
from collections.abc import Sequence
from typing import Any

import jax

from lm2_jax.config import RunConfig
from lm2_jax.model import LanguageModel
from lm2_jax.precision import prepare_numbers
from lm2_jax.sharding.check import Placement, placements, replicated_arrays
from lm2_jax.sharding.layout import Layout
from lm2_jax.sharding.mesh import MeshConfig, planned_mesh
from lm2_jax.training.state import make_plan


def describe_plan(config: RunConfig, mesh: MeshConfig) -> str:
    """The table of `train.py PRESET --plan`.

    Args:
      config: the run.
      mesh: sizes of the mesh; -1 counts as 1, since the number of devices is unknown.
    Returns:
      For each array of parameters, optimizer and recurrent state: shape, type, mesh axes of each dimension, bytes on
      one device. Then the arrays that are replicated on every device.
    Raises:
      UserError: mesh and run are incompatible.
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
        lines += ["", *_section(name, list(placements(shapes, where)))]
    replicated = [array.path for shapes, where in trees.values() for array in replicated_arrays(shapes, where)]
    return "\n".join([*lines, "", _describe_replication(dict(layout.mesh.shape), replicated)])


def _describe_replication(sizes: dict[str, int], replicated: list[str]) -> str:
    """The last line of the plan: what each device holds completely."""
    axes = [axis for axis, size in sizes.items() if size > 1]
    if not axes:
        return (
            "replicated: nothing, as there is one device: it holds every array completely. "
            "To plan for several devices, set --mesh.fsdp N or another axis"
        )
    if axes == ["data"]:
        return "replicated on every device: all parameters and the optimizer, as mesh.data is the only axis above 1"
    return f"replicated on every device: {', '.join(replicated) or 'nothing of 1 MiB or more'}"


def _section(name: str, arrays: Sequence[Placement]) -> list[str]:
    """The lines of one tree, starting with the sum."""
    total = sum(array.device_bytes for array in arrays)
    rows: list[Any] = [
        (array.path, str(list(array.shape)), array.dtype, array.spec, f"{array.device_bytes:,}") for array in arrays
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(5)]
    head = f"{name}: {len(rows)} arrays, {total:,} bytes ({total / 2**20:,.1f} MiB) on each device"
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row[:4], widths, strict=False)) for row in rows]
    return [head, *(f"  {line}  {row[4].rjust(widths[4])}" for line, row in zip(lines, rows, strict=True))]
