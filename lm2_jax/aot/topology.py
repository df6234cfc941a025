"""TPU slices by name, and compile-only devices for slices that this machine does not have.

Shapes of slices are those of the vendor's pages as of November 2026 (https://docs.cloud.google.com/tpu/docs). libtpu
also accepts slices that nobody can rent, such as v5e:32x32, so the limits are listed here.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from lm2_jax.chips import CHIPS, Chip
from lm2_jax.errors import UserError
from lm2_jax.registry import near_misses


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The slices that are made of one kind of chip."""

    listed: tuple[tuple[int, ...], ...]
    """Shapes of slices; of 3-dimensional ones, those below a cube of 4 x 4 x 4."""
    largest: tuple[int, ...] = ()
    """The largest 3-dimensional slice. Each side is a multiple of 4, and sides do not decrease. Empty: none."""

    def __contains__(self, shape: tuple[int, ...]) -> bool:
        if shape in self.listed:
            return True
        return (
            len(shape) == len(self.largest)
            and all(side >= 4 and side % 4 == 0 for side in shape)
            and list(shape) == sorted(shape)
            and all(side <= limit for side, limit in zip(shape, self.largest, strict=True))
        )


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_BELOW_A_CUBE = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))

# The chips that --topology offers.
SLICES: dict[str, Shapes] = {
    "v5e": Shapes(_FLAT),  # up to 256 chips
    "v5p": Shapes(_BELOW_A_CUBE, largest=(16, 16, 24)),  # up to 6,144 of the 8,960 chips of a pod
    "v6e": Shapes(_FLAT),  # up to 256 chips
    "tpu7x": Shapes(_BELOW_A_CUBE, largest=(16, 24, 24)),  # up to 9,216 chips
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One slice, or several equal slices connected by the data-centre network."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Number of chips in all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Number of jax devices in all slices."""
        return self.chips * self.chip.devices

    @property
    def slice_name(self) -> str:
        """libtpu's name of one slice."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        return self.slice_name if self.slices == 1 else f"{self.slices}x{self.slice_name}"


def parse_topology(text: str) -> Topology:
    """Parses the name of a slice, `v5e:16x16`, or of several, `2xv5e:16x16`.

    Raises:
      UserError: a malformed name, an unknown chip, or a slice that does not exist.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)", text.strip().lower())
    if match is None:
        raise UserError(
            f"--topology: expected CHIP:SHAPE such as v5e:16x16 or v5p:8x8x8, or several slices such as 2xv5e:16x16; "
            f"got {text!r}"
        )
    slices, name, sides = int(match[1] or 1), match[2], tuple(map(int, match[3].split("x")))
    if name not in SLICES:
        known = list(SLICES)
        raise UserError(f"--topology: unknown chip {name!r}; known: {known}.{near_misses(name, known)}")
    if slices < 1 or sides not in SLICES[name]:
        raise UserError(f"--topology: there is no slice {text!r}. {_describe_slices(name)}")
    return Topology(CHIPS[name], sides, slices)


def _describe_slices(chip: str) -> str:
    """The slices of a chip, as a sentence for error messages."""
    shapes = ["x".join(map(str, shape)) for shape in SLICES[chip].listed]
    largest = "x".join(map(str, SLICES[chip].largest))
    if not largest:
        return f"{chip} slices are {', '.join(shapes)}; several of them: 2x{chip}:{shapes[-1]}."
    return f"{chip} slices are {', '.join(shapes)}, and AxBxC of multiples of 4 with A <= B <= C up to {largest}."


def compile_only_devices(topology: Topology) -> Sequence[Any]:
    """Devices of a slice that this machine does not have: programs can be compiled for them, but not run.

    libtpu provides them. Without the settings of `quiet_libtpu` it would search for a TPU over the network.

    Raises:
      UserError: libtpu is not installed, or does not support the slice.
    """
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise UserError(
            "--compile-only needs libtpu, the compiler for TPUs, which also runs on machines without TPUs; "
            "install it with: pip install -r requirements-tpu.txt",
            status=1,
        )
    quiet_libtpu()
    from jax.experimental import topologies  # after libtpu's settings

    options: dict[str, Any] = {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if math.prod(topology.shape) == 1:  # libtpu assumes four chips per host
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(topology.slice_name, platform="tpu", **options).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise UserError(f"libtpu cannot compile for {topology}: {error}", status=1) from error


def quiet_libtpu() -> None:
    """Sets environment variables with which libtpu only compiles; call it before the first use of libtpu.

    Variables that are already set keep their values. jax itself runs on the CPU, so the process uses no TPU.
    """
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # do not query a metadata server for the machine type
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a training process on the same machine may use libtpu too
    }.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
