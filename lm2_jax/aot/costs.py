"""Costs of a compiled program on one device, loop bodies times trip counts, and the roofline bound on its time."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from lm2_jax.aot.hbm import hbm_traffic
from lm2_jax.aot.hlo import (
    COLLECTIVES,
    Computation,
    Instruction,
    Program,
    between_slices,
    convolution_flops,
    dot_flops,
    groups,
    kernel_flops,
    size_bytes,
    trip_count,
)
from lm2_jax.chips import Chip


class Collective(NamedTuple):
    """A kind of collective on groups of one size."""

    kind: str
    size: int  # devices per group
    slices: int  # TPU slices that a group spans


class Traffic(NamedTuple):
    """What one device sends in collectives of one kind."""

    count: int
    ici_bytes: float  # within its slice
    dcn_bytes: float  # to other slices

    def plus(self, other: "Traffic", times: int = 1) -> "Traffic":
        """The sum of this and `times` the other."""
        return Traffic(
            self.count + times * other.count,
            self.ici_bytes + times * other.ici_bytes,
            self.dcn_bytes + times * other.dcn_bytes,
        )


@dataclasses.dataclass
class Costs:
    """Costs of one device, loop bodies times their trip counts."""

    matmul_flops: float = 0.0
    kernel_flops: float = 0.0
    hbm_bytes: float = 0.0
    collectives: dict[Collective, Traffic] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0
    """Loops of unknown trip count; their bodies are counted once."""

    @property
    def flops(self) -> float:
        """Operations of matrix products and Pallas kernels; elementwise operations are not counted."""
        return self.matmul_flops + self.kernel_flops

    @property
    def ici_bytes(self) -> float:
        """Bytes sent within the slice."""
        return sum(traffic.ici_bytes for traffic in self.collectives.values())

    @property
    def dcn_bytes(self) -> float:
        """Bytes sent to other slices."""
        return sum(traffic.dcn_bytes for traffic in self.collectives.values())

    def add(self, other: "Costs", times: int = 1) -> None:
        """Adds `times` the costs of another computation."""
        self.matmul_flops += times * other.matmul_flops
        self.kernel_flops += times * other.kernel_flops
        self.hbm_bytes += times * other.hbm_bytes
        self.unknown_loops += other.unknown_loops
        for key, traffic in other.collectives.items():
            self.send(key, traffic, times)

    def send(self, key: Collective, traffic: Traffic, times: int = 1) -> None:
        """Adds collectives of one kind."""
        self.collectives[key] = self.collectives.get(key, Traffic(0, 0.0, 0.0)).plus(traffic, times)


def program_costs(program: Program, slice_of: Callable[[int], int] = lambda device: 0) -> Costs:
    """Adds up the costs of a program.

    Args:
      program: from `hlo.parse`.
      slice_of: maps a device's number in the program to its TPU slice.
    """
    return _Walk(program, slice_of).of(program.computations[program.entry], fused=False)


class _Walk:
    """Costs of computations, each computed once."""

    def __init__(self, program: Program, slice_of: Callable[[int], int]):
        self._program, self._slice_of = program, slice_of
        self._known: dict[tuple[str, bool], Costs] = {}

    def of(self, computation: Computation, fused: bool) -> Costs:
        key = (computation.name, fused)
        if key not in self._known:
            costs = self._known[key] = Costs()
            for instruction in computation.instructions.values():
                self._add(costs, computation, instruction, fused)
        return self._known[key]

    def _add(self, costs: Costs, computation: Computation, instruction: Instruction, fused: bool) -> None:
        program, opcode = self._program, instruction.opcode
        if opcode == "while":
            times = trip_count(program, computation, instruction)
            costs.add(self.of(program.called(instruction, "body"), fused), 1 if times is None else times)
            costs.unknown_loops += times is None
            return
        if opcode == "conditional":
            branches = [self.of(program.computations[name], fused) for name in _branches(instruction)]
            costs.add(max(branches, key=lambda branch: branch.flops))
            return
        if opcode == "dot":
            costs.matmul_flops += dot_flops(computation, instruction)
        elif opcode == "convolution":
            costs.matmul_flops += convolution_flops(computation, instruction)
        elif opcode == "custom-call":
            costs.kernel_flops += kernel_flops(computation, instruction)
        elif opcode.removesuffix("-start") in COLLECTIVES and not _continues(computation, instruction):
            costs.send(*self._collective(computation, instruction))
        elif opcode == "send" and (exchange := between_slices(instruction)) is not None:
            kind, slices = exchange
            own = size_bytes(computation.instructions[instruction.operands[0]].shape)
            costs.send(Collective(kind, slices, slices), Traffic(1, *sent(kind, own, slices, slices)))
        elif opcode == "fusion":
            costs.add(self.of(program.called(instruction, "calls"), fused=True))
        elif opcode in ("call", "async-start"):
            inner = "to_apply" if opcode == "call" else "calls"
            costs.add(self.of(program.called(instruction, inner), fused))
            return
        if not fused:
            costs.hbm_bytes += hbm_traffic(program, computation, instruction)

    def _collective(self, computation: Computation, instruction: Instruction) -> tuple[Collective, Traffic]:
        kind = instruction.opcode.removesuffix("-start")
        if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # in a fusion that keeps only this device's part
        own = sum(size_bytes(computation.instructions[name].shape) for name in instruction.operands)
        members = groups(instruction, self._program.partitions)
        if kind == "collective-permute":
            crossing = any(len({self._slice_of(n) for n in pair}) > 1 for pair in members)
            return Collective(kind, 2, 1 + crossing), Traffic(1, 0 if crossing else own, own if crossing else 0)
        size = max(map(len, members))
        slices = max(len({self._slice_of(n) for n in group}) for group in members)
        return Collective(kind, size, slices), Traffic(1, *sent(kind, own, size, slices))


def sent(kind: str, own: float, size: int, slices: int = 1) -> tuple[float, float]:
    """Fewest bytes that one device must send in a collective, within its slice and to other slices.

    On a ring of n devices: (n-1) own for an all-gather, own (n-1)/n for a reduce-scatter or all-to-all, twice that for
    an all-reduce. Between slices the collective is hierarchical: each piece of data crosses once.

    Args:
      kind: of collective.
      own: bytes of one device's operand.
      size: devices per group.
      slices: slices over which the group is spread evenly.
    """
    near, far = size // slices, slices
    if kind == "all-gather":
        return own * far * (near - 1), own * (far - 1)
    if kind in ("all-to-all", "ragged-all-to-all"):
        return own * (near - 1) / size, own * (size - near) / size
    if kind == "collective-broadcast":
        return own * (near > 1), own * (far > 1)
    if kind == "one-to-one":  # a permutation between slices
        return 0, own
    twice = 2 if kind == "all-reduce" else 1
    return twice * own * (near - 1) / near, twice * own / near * (far - 1) / far


def _continues(computation: Computation, instruction: Instruction) -> bool:
    """Whether a collective was started in another fusion, and so is counted there.

    libtpu fuses an asynchronous collective with the matrix products that overlap it; each of those fusions repeats it.
    """
    if "chain_id=" not in instruction.attributes:
        return False
    return not any(
        "AsyncCollectiveStart" in other.attributes and instruction.name in other.operands
        for other in computation.instructions.values()
    )


def _branches(instruction: Instruction) -> list[str]:
    listed = instruction.attribute("branch_computations")
    if listed is None:
        return [instruction.attribute("true_computation") or "", instruction.attribute("false_computation") or ""]
    return [name.strip().lstrip("%") for name in listed.split(",")]


class Roofline(NamedTuple):
    """Lower bounds on the time of a step in seconds, one per resource."""

    compute: float
    memory: float
    ici: float
    dcn: float

    @property
    def seconds(self) -> float:
        """The bound if all resources overlap perfectly: the largest."""
        return max(self)

    @property
    def bound(self) -> str:
        """The resource that limits the step."""
        return max(zip(self, self._fields, strict=True))[1]


def roofline_bound(costs: Costs, chip: Chip) -> Roofline:
    """Lower bounds on the time of a step, from the costs of one device and the peak figures of its chip.

    A device that is one of several on a chip has its share of the chip's figures.
    """
    share = chip.devices
    assert chip.ici_bandwidth is not None, chip
    assert chip.dcn_bandwidth is not None, chip
    return Roofline(
        costs.flops * share / chip.flops,
        costs.hbm_bytes * share / chip.hbm_bandwidth,
        costs.ici_bytes * share / chip.ici_bandwidth,
        costs.dcn_bytes * share / chip.dcn_bandwidth,
    )
