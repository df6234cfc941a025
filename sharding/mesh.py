"""The device mesh: four axes, any of which may have size 1."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from lm2_jax.errors import UserError

AXES = ("data", "fsdp", "model", "slots")


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
    """Shards of the memory's slots."""

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
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(config.sizes(len(devices)), AXES, axis_types=kinds, devices=devices)
