"""The device mesh. Its axes are the fields of `MeshConfig` but `slices`; any may have size 1.

A pipeline over layers would add an axis `stage`: a field of `MeshConfig` and a name in `AXES`.
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
_THREADS_PER_DEVICE = 8


def spare_threads(devices: int) -> None:
    """Gives virtual CPU devices enough threads, by setting $NPROC; call it before jax is asked for its devices.

    XLA's CPU devices start independent collectives in any order, and each blocks a thread until all devices joined it.
    With one thread per device they can deadlock, each blocked in another collective; XLA aborts the process after 40
    seconds. $NPROC is the number of threads that XLA creates.

    Args:
      devices: number of virtual CPU devices.
    """
    if devices > 1:
        os.environ.setdefault("NPROC", str(_THREADS_PER_DEVICE * devices))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis; one of them may be -1: all remaining devices."""

    data: int = -1
    """Replicas of the model, each with its own rows of the batch."""
    fsdp: int = 1
    """Shards of parameters and optimizer state; the rows of the batch are split over these devices too."""
    model: int = 1
    """Shards of heads, MLP and vocabulary (tensor parallelism)."""
    slots: int = 1
    """Shards of the memory's slots, and of the tokens of a segment."""
    slices: int | None = None
    """Number of TPU slices, which a data-centre network connects; divides mesh.data. None: as the devices report."""

    def sizes(self, devices: int) -> tuple[int, ...]:
        """Sizes of the mesh axes in the order of `AXES`, with -1 resolved.

        Args:
          devices: number of devices.
        Raises:
          UserError: sizes that are 0 or below -1, two that are -1, or a product other than `devices`.
        """
        sizes = tuple(getattr(self, name) for name in AXES)
        given = ", ".join(f"mesh.{name}={size}" for name, size in zip(AXES, sizes, strict=True))
        if any(size < 1 and size != -1 for size in sizes):
            raise UserError(f"Each mesh size must be at least 1, or -1 for all remaining devices; got {given}.")
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
        return tuple(devices // fixed if size == -1 else size for size in sizes)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh of `config`, with neighbours on the mesh close to each other in the hardware.

    Args:
      config: sizes of the mesh axes.
      devices: `jax.Device`s to use; None: all devices of the job.
    Raises:
      UserError: sizes that do not fit the number of devices or of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, slices = config.sizes(len(devices)), _by_slice(devices, config.slices)
    data, *rest = sizes  # slices are stacked along the first axis
    if data % len(slices):
        raise UserError(
            f"mesh.data={data} is not divisible by {len(slices)} slices, the number that the devices belong to. Only "
            "the axis data can span slices; change mesh.data or mesh.slices."
        )
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
    inner = [_arranged((data // len(slices), *rest), part) for part in slices]
    return jax.sharding.Mesh(np.concatenate(inner), AXES, axis_types=kinds)


def _arranged(sizes: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """The devices of a slice in the mesh's shape, each mesh axis along complete axes of the torus if possible."""
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:  # such as 16 x 16 on a torus of 4 x 8 x 8
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def planned_mesh(config: MeshConfig) -> jax.sharding.AbstractMesh:
    """The mesh of `config` without devices; a size of -1 counts as 1, since the number of devices is unknown.

    Raises:
      UserError: sizes below 1 other than -1.
    """
    config = dataclasses.replace(config, **{name: 1 for name in AXES if getattr(config, name) == -1})
    return jax.sharding.AbstractMesh(config.sizes(math.prod(getattr(config, name) for name in AXES)), AXES)


def _by_slice(devices: Sequence[Any], slices: int | None) -> list[list[Any]]:
    """The devices of each slice. Devices that do not report their slice (CPUs) are divided into `slices` groups.

    Raises:
      UserError: another number of slices than the devices report.
    """
    groups: dict[int, list[Any]] = {}
    for device in devices:
        groups.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    in_order = [groups[index] for index in sorted(groups)]
    if slices is None or slices == len(in_order):
        return in_order
    if len(in_order) > 1 or slices < 1 or len(devices) % slices:
        raise UserError(
            f"mesh.slices={slices}, but {len(devices)} devices belong to {len(in_order)} slices; omit mesh.slices."
        )
    if hasattr(devices[0], "slice_index"):
        raise UserError(f"mesh.slices={slices}, but all {len(devices)} devices belong to one slice; omit mesh.slices.")
    size = len(devices) // slices
    return [list(devices[first : first + size]) for first in range(0, len(devices), size)]
