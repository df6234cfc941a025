"""TPU slices by name: their chips, and compile-only devices of slices that are not here.

Figures of chips and slices are those of the vendor's pages as of November 2026 (https://docs.cloud.google.com/tpu/docs):
v5e, v5p, v6e and tpu7x. libtpu itself accepts slices that nobody can rent (v5e:32x32), so the limits stand here.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from lm2_jax.errors import UserError
from lm2_jax.registry import near_misses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU chip, and the slices that are made of it."""

    name: str
    """As in a topology's name."""
    flops: float
    """Dense bfloat16 operations per second of a chip."""
    hbm_bytes: int
    """Memory of a chip."""
    hbm_bandwidth: float
    """Bytes per second between a chip and its memory."""
    ici_bandwidth: float
    """Bytes per second that a chip can send to its neighbours in the slice, all links together, one direction."""
    dcn_bandwidth: float
    """Bytes per second that a chip can send to another slice: the share of its host's network card."""
    dimensions: int
    """Of the torus."""
    devices: int = 1
    """What jax calls a device, per chip."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Shapes of slices; for 3-dimensional ones those below a cube of 4 x 4 x 4."""
    largest: tuple[int, ...] = ()
    """Of 3-dimensional slices: the largest shape; each side is a multiple of 4 and they do not decrease."""


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_BELOW_A_CUBE = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))

# Interconnect: the pages give both directions together (400, 1200, 800, 1200 GB/s); one is half of it. Network: v5e
# 6.4 Tbit/s for 256 chips; 50, 100 and 100 Gbit/s a chip.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        # docs/v5e: 197 TFLOPs, 16 GB at 819 GB/s, slices to 256 chips.
        Chip("v5e", 197e12, 16 * GIB, 819e9, 200e9, 3.125e9, 2, shapes=_FLAT),
        # docs/v5p: 459 TFLOPs, 95 GB at 2765 GB/s, slices to 16x16x24 = 6,144 chips of a pod's 8,960.
        Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9, 6.25e9, 3, shapes=_BELOW_A_CUBE, largest=(16, 16, 24)),
        # docs/v6e: 918 TFLOPs, 32 GB at 1638 GB/s, slices to 256 chips.
        Chip("v6e", 918e12, 32 * GIB, 1638e9, 400e9, 12.5e9, 2, shapes=_FLAT),
        # docs/tpu7x: 2307 TFLOPs, 192 GB at 7380 GB/s, two devices a chip, slices to 9,216 chips.
        Chip("tpu7x", 2307e12, 192 * GIB, 7380e9, 600e9, 12.5e9, 3, 2, shapes=_BELOW_A_CUBE, largest=(16, 24, 24)),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One slice, or several equal ones that are joined by the data-centre network."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """In all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """That jax sees."""
        return self.chips * self.chip.devices

    @property
    def slice_name(self) -> str:
        """As libtpu calls one slice."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        return self.slice_name if self.slices == 1 else f"{self.slices}x{self.slice_name}"


def parse_topology(text: str) -> Topology:
    """The slice or slices called `v5e:16x16`, `v5p:8x8x8` or, for two of them, `2xv5e:16x16`.

    Raises:
      UserError: a name that is none, an unknown chip, or a slice that does not exist.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)", text.strip().lower())
    if match is None:
        raise UserError(
            f"--topology: expected CHIP:SHAPE such as v5e:16x16 or v5p:8x8x8, or several slices such as 2xv5e:16x16; "
            f"got {text!r}"
        )
    slices, name, sides = int(match[1] or 1), match[2], tuple(map(int, match[3].split("x")))
    if name not in CHIPS:
        known = list(CHIPS)
        raise UserError(f"--topology: unknown chip {name!r}; known: {known}.{near_misses(name, known)}")
    chip = CHIPS[name]
    if slices < 1 or not _exists(chip, sides):
        raise UserError(f"--topology: there is no slice {text!r}. {_offer(chip)}")
    return Topology(chip, sides, slices)


def _exists(chip: Chip, shape: tuple[int, ...]) -> bool:
    if shape in chip.shapes:
        return True
    return (
        len(shape) == len(chip.largest)
        and all(side >= 4 and side % 4 == 0 for side in shape)
        and list(shape) == sorted(shape)
        and all(side <= limit for side, limit in zip(shape, chip.largest, strict=True))
    )


def _offer(chip: Chip) -> str:
    """What slices there are."""
    shapes = ", ".join("x".join(map(str, shape)) for shape in chip.shapes)
    if not chip.largest:
        return f"{chip.name} slices are {shapes}; several of them: 2x{chip.name}:{'x'.join(map(str, chip.shapes[-1]))}."
    largest = "x".join(map(str, chip.largest))
    return f"{chip.name} slices are {shapes}, and AxBxC of multiples of 4 with A <= B <= C up to {largest}."


def compile_only_devices(topology: Topology) -> Sequence[Any]:
    """Devices of a slice that is not here: programs can be compiled for them, not run.

    Asks libtpu, which must be told that it is on no TPU machine, or it would look for one over the network.

    Raises:
      UserError: libtpu is not installed, or does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise UserError(
            "--compile-only needs libtpu, the compiler for TPUs, which also runs on machines without any; "
            "install it with: pip install -r requirements-tpu.txt",
            status=1,
        )
    quiet_libtpu()
    from jax.experimental import topologies  # after the settings of libtpu

    options: dict[str, Any] = {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if math.prod(topology.shape) == 1:  # libtpu assumes four chips a host
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(topology.slice_name, platform="tpu", **options).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise UserError(f"libtpu cannot compile for {topology}: {error}", status=1) from error


def quiet_libtpu() -> None:
    """Settings with which libtpu only compiles; they must precede its first use.

    What the user has set is kept. jax itself stays on the CPU: the process needs no TPU and takes none.
    """
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # no metadata server is asked what machine this is
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # beside a training process on a TPU machine
    }.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
