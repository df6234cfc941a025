"""The device mesh: four axes, any of which may have size 1.

A pipeline over stacked layers would be a fifth axis, `stage`; nothing else here counts them.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from lm2_jax.errors import UserError

AXES = ("data", "fsdp", "model", "slots")
THREADS_OF_A_DEVICE = 8


def spare_threads(devices: int) -> None:
    """Gives so many virtual CPU devices threads enough to wait for one another; before anything asks for devices.

    XLA's CPU devices run independent collectives in any order, and each keeps a thread until all devices are there.
    With one thread a device, what each of them waits for may be what none has a thread left to begin: after 40 seconds
    XLA aborts the process. $NPROC is how many threads XLA makes.
    """
    if devices > 1:
        os.environ.setdefault("NPROC", str(THREADS_OF_A_DEVICE * devices))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1 and takes what the others leave."""

    data: int = -1
    """Copies of the model, each with its own rows of the batch."""
    fsdp: int = 1
    """Shards of parameters and optimizer state; the batch is split over these devices too."""
    model: int = 1
    """Shards of heads, MLP and vocabulary (tensor parallelism)."""
    slots: int = 1
    """Shards of the memory's slots, and of the tokens of a segment."""
    slices: int | None = None
    """Slices that only a data-centre network joins; they divide mesh.data. None: as many as the devices say."""

    def sizes(self, devices: int) -> tuple[int, int, int, int]:
        """Sizes of data, fsdp, model and slots on `devices` devices, -1 resolved.

        Raises:
          UserError: sizes that are 0 or below -1, two that are -1, or a product other than `devices`.
        """
        sizes = (self.data, self.fsdp, self.model, self.slots)
        given = ", ".join(f"mesh.{name}={size}" for name, size in zip(AXES, sizes, strict=True))
        if any(size < 1 and size != -1 for size in sizes):
            raise UserError(f"Each mesh size must be at least 1, or -1 for all that is left; got {given}.")
        if sizes.count(-1) > 1:
            raise UserError(f"At most one mesh size can be -1; got {given}.")
        fixed = math.prod(size for size in sizes if size != -1)
        if -1 in sizes and devices % fixed:
            raise UserError(
                f"{devices} devices are not a multiple of {fixed}, the product of the mesh sizes that are set; "
                f"got {given}. Change one of them."
            )
        if -1 not in sizes and fixed != devices:
            raise UserError(
                f"The mesh sizes multiply to {fixed}, but there are {devices} devices; got {given}. "
                "Change one of them, or set one to -1."
            )
        data, fsdp, model, slots = (devices // fixed if size == -1 else size for size in sizes)
        return data, fsdp, model, slots


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh of `config`, with neighbours on the mesh near each other in the hardware.

    Args:
      config: sizes of its axes.
      devices: `jax.Device`s, those to use; None: all of the job's.
    Raises:
      UserError: sizes that do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, slices = config.sizes(len(devices)), _by_slice(devices, config.slices)
    data, *rest = sizes
    if data % len(slices):
        raise UserError(
            f"mesh.data={data} is not divisible by the {len(slices)} slices of the devices, and only copies of the "
            "model may lie in different slices; change mesh.data or mesh.slices."
        )
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
    inner = [_arranged((data // len(slices), *rest), part) for part in slices]
    return jax.sharding.Mesh(np.concatenate(inner), AXES, axis_types=kinds)


def _arranged(sizes: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """The devices of a slice in the mesh's shape, each mesh axis along whole axes of the slice's torus if possible."""
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:  # such as 16 x 16 on a torus of 4 x 8 x 8
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def planned_mesh(config: MeshConfig) -> jax.sharding.AbstractMesh:
    """The mesh of `config` without devices; a size of -1 counts as 1, because nothing says how many there are.

    Raises:
      UserError: sizes that no number of devices has.
    """
    config = dataclasses.replace(config, **{name: 1 for name in AXES if getattr(config, name) == -1})
    return jax.sharding.AbstractMesh(config.sizes(math.prod(getattr(config, name) for name in AXES)), AXES)


def _by_slice(devices: Sequence[Any], slices: int | None) -> list[list[Any]]:
    """The devices of each slice; where devices do not say theirs (CPUs), as many pieces as are asked for.

    Raises:
      UserError: another number of slices than the devices lie in, or slices of different size.
    """
    groups: dict[int, list[Any]] = {}
    for device in devices:
        groups.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    parts = [groups[index] for index in sorted(groups)]
    if slices is None or slices == len(parts):
        return parts
    if len(parts) > 1 or slices < 1 or len(devices) % slices:
        raise UserError(f"mesh.slices={slices}, but {len(devices)} devices lie in {len(parts)} slices; leave it out.")
    if hasattr(devices[0], "slice_index"):
        raise UserError(f"mesh.slices={slices}, but all {len(devices)} devices lie in one slice; leave it out.")
    size = len(devices) // slices
    return [list(devices[first : first + size]) for first in range(0, len(devices), size)]
