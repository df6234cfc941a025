"""Accelerator chips: peak FLOP/s, memory and bandwidth, for model FLOPs utilisation and for `lm2_jax.aot`.

TPU figures are those of the vendor's pages as of November 2026 (https://docs.cloud.google.com/tpu/docs). Interconnect:
the pages give both directions together (400, 1200, 800, 1200 GB/s); one direction is half of it. Data-centre network:
v5e 6.4 Tbit/s per 256 chips; v5p, v6e and TPU7x 50, 100 and 100 Gbit/s per chip. GPU figures are those of the SXM data
sheets, dense.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator chip; all figures are per chip."""

    name: str
    """Short name, as in `--topology v5e:16x16`."""
    device_kinds: tuple[str, ...]
    """Substrings of `jax.Device.device_kind` that identify it."""
    flops: float
    """Dense bfloat16 operations per second."""
    hbm_bytes: int
    """Bytes of main memory."""
    hbm_bandwidth: float
    """Bytes per second between the chip and its main memory."""
    ici_bandwidth: float | None = None
    """Bytes per second that a TPU chip can send to its neighbours in the slice, all links together, one direction."""
    dcn_bandwidth: float | None = None
    """Bytes per second that a TPU chip can send to another slice: its share of the host's network card."""
    devices: int = 1
    """jax devices per chip."""


# In order of precedence: the first chip that lists a substring of the device kind. `TPU v5` alone is a v5p.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9, 200e9, 3.125e9),
        Chip("v5p", ("TPU v5",), 459e12, 95 * GIB, 2765e9, 600e9, 6.25e9),
        Chip("v6e", ("TPU v6",), 918e12, 32 * GIB, 1638e9, 400e9, 12.5e9),
        Chip("tpu7x", ("TPU7x", "TPU v7"), 2307e12, 192 * GIB, 7380e9, 600e9, 12.5e9, devices=2),
        Chip("v4", ("TPU v4",), 275e12, 32 * GIB, 1228e9),
        Chip("h200", ("H200",), 989e12, 141 * 10**9, 4800e9),
        Chip("h100", ("H100",), 989e12, 80 * 10**9, 3350e9),
        Chip("a100", ("A100",), 312e12, 80 * 10**9, 2039e9),
    )
}


def find_chip(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`, or None if the table has no such chip."""
    return next((chip for chip in CHIPS.values() if any(kind in device_kind for kind in chip.device_kinds)), None)


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of one jax device, or None if the table has no such chip."""
    chip = find_chip(device_kind)
    return None if chip is None else chip.flops / chip.devices
