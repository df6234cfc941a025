"""What one device does in one call of a compiled program, and how long that takes at least."""

import collections
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from lm2_jax.sharding.hlo import (
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
from lm2_jax.sharding.topology import Chip

# Names and views: nothing is computed or moved.
_FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast after-all partition-id replica-id copy-done slice-done "
    "all-gather-done all-reduce-done collective-permute-done async-done async-update send-done recv-done "
    "optimization-barrier add-dependency iota".split()
)
_SLICES = ("dynamic-slice", "slice", "gather")


class Collective(NamedTuple):
    """Collectives of one kind among groups of one form."""

    kind: str
    size: int  # devices of a group
    slices: int  # TPU slices over which a group is spread


class Moved(NamedTuple):
    """What one device sends in them."""

    count: int
    ici_bytes: float  # inside its slice
    dcn_bytes: float  # to other slices

    def plus(self, other: "Moved", times: int = 1) -> "Moved":
        """Both, the other so many times."""
        return Moved(
            self.count + times * other.count,
            self.ici_bytes + times * other.ici_bytes,
            self.dcn_bytes + times * other.dcn_bytes,
        )


@dataclasses.dataclass
class Costs:
    """Of one device, loop bodies times their trip counts."""

    matmul_flops: float = 0.0
    kernel_flops: float = 0.0
    hbm_bytes: float = 0.0
    collectives: dict[Collective, Moved] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0
    """Loops whose trip count the text does not tell; their bodies are counted once."""

    @property
    def flops(self) -> float:
        """Matrix products and Pallas kernels; elementwise work is left out."""
        return self.matmul_flops + self.kernel_flops

    @property
    def ici_bytes(self) -> float:
        """Sent inside the slice."""
        return sum(moved.ici_bytes for moved in self.collectives.values())

    @property
    def dcn_bytes(self) -> float:
        """Sent to other slices."""
        return sum(moved.dcn_bytes for moved in self.collectives.values())

    def add(self, other: "Costs", times: int = 1) -> None:
        """Adds what another computation costs."""
        self.matmul_flops += times * other.matmul_flops
        self.kernel_flops += times * other.kernel_flops
        self.hbm_bytes += times * other.hbm_bytes
        self.unknown_loops += other.unknown_loops
        for key, moved in other.collectives.items():
            self.send(key, moved, times)

    def send(self, key: Collective, moved: Moved, times: int = 1) -> None:
        """Adds collectives of one kind."""
        self.collectives[key] = self.collectives.get(key, Moved(0, 0.0, 0.0)).plus(moved, times)


def program_costs(program: Program, slice_of: Callable[[int], int] = lambda device: 0) -> Costs:
    """Walks through a program.

    Args:
      program: see `hlo.parse`.
      slice_of: TPU slice of each device, by its number in the program.
    """
    return _Walk(program, slice_of).of(program.computations[program.entry], fused=False)


class _Walk:
    """Costs of computations, each looked at once."""

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
        elif opcode.removesuffix("-start") in COLLECTIVES and not _goes_on(computation, instruction):
            costs.send(*self._collective(computation, instruction))
        elif opcode == "send" and (exchange := between_slices(instruction)) is not None:
            kind, slices = exchange
            own = size_bytes(computation.instructions[instruction.operands[0]].shape)
            costs.send(Collective(kind, slices, slices), Moved(1, *sent(kind, own, slices, slices)))
        elif opcode == "fusion":
            costs.add(self.of(program.called(instruction, "calls"), fused=True))
        elif opcode in ("call", "async-start"):
            inner = "to_apply" if opcode == "call" else "calls"
            costs.add(self.of(program.called(instruction, inner), fused))
            return
        if not fused:
            costs.hbm_bytes += self._traffic(computation, instruction)

    def _collective(self, computation: Computation, instruction: Instruction) -> tuple[Collective, Moved]:
        kind = instruction.opcode.removesuffix("-start")
        if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # a fusion that keeps only this device's part
        own = sum(size_bytes(computation.instructions[name].shape) for name in instruction.operands)
        members = groups(instruction, self._program.partitions)
        if kind == "collective-permute":
            crossing = any(len({self._slice_of(n) for n in pair}) > 1 for pair in members)
            return Collective(kind, 2, 1 + crossing), Moved(1, 0 if crossing else own, own if crossing else 0)
        size = max(map(len, members))
        slices = max(len({self._slice_of(n) for n in group}) for group in members)
        return Collective(kind, size, slices), Moved(1, *sent(kind, own, size, slices))

    def _traffic(self, computation: Computation, instruction: Instruction) -> int:
        """Bytes between memory and chip; a slice of an array that stays where it is counts for itself only."""
        opcode, lookup = instruction.opcode, computation.instructions
        if opcode in _FREE:
            return 0
        if opcode == "fusion":
            return _fusion_traffic(self._program.called(instruction, "calls"))
        if opcode in _SLICES:
            return 2 * size_bytes(instruction.shape, in_hbm=True)
        if opcode == "dynamic-update-slice":
            return 2 * size_bytes(lookup[instruction.operands[1]].shape, in_hbm=True)
        if opcode.endswith("-start"):  # its shape holds operand and result
            return size_bytes(instruction.shape, in_hbm=True)
        if opcode == "custom-call" and "AllocateBuffer" in instruction.attributes:
            return 0
        read = sum(size_bytes(lookup[name].shape, in_hbm=True) for name in instruction.operands if name in lookup)
        return read + size_bytes(instruction.shape, in_hbm=True)


def sent(kind: str, own: float, size: int, slices: int = 1) -> tuple[float, float]:
    """Bytes that one device sends at least in a collective: to its own slice, and to others.

    On a ring of n: (n-1) own for an all-gather, own (n-1)/n for a reduce-scatter or all-to-all, twice that for an
    all-reduce. Over several slices the part that crosses is done among one device of each (hierarchically).

    Args:
      kind: of collective.
      own: bytes of one device's operand.
      size: devices of a group.
      slices: over which the group is spread evenly.
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


def _goes_on(computation: Computation, instruction: Instruction) -> bool:
    """Whether a collective is a later link of a chain that was begun elsewhere.

    libtpu fuses an asynchronous collective into the matrix products that hide it; each of those fusions repeats it.
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


def _fusion_traffic(computation: Computation) -> int:
    """Of a fusion: its parameters and results in memory, of which slices are read or written alone."""
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for instruction in computation.instructions.values():
        if instruction.opcode not in ("parameter", "constant"):
            for name in instruction.operands:
                users[name].append(instruction)

    def read(name: str, shape: str) -> int:
        """Bytes that are read of a parameter, or of a view of it."""
        whole, parts = size_bytes(shape, in_hbm=True), 0
        for user in users[name]:
            if user.opcode == "bitcast":
                parts += min(read(user.name, shape), whole)
            elif user.opcode in _SLICES and user.operands[0] == name:
                parts += size_bytes(user.shape)
            elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == name):
                return whole
        return min(parts, whole)

    def written(instruction: Instruction) -> int:
        whole = size_bytes(instruction.shape, in_hbm=True)
        while instruction.opcode == "bitcast":
            instruction = computation.instructions[instruction.operands[0]]
        if instruction.opcode == "tuple":
            return sum(written(computation.instructions[name]) for name in instruction.operands)
        if instruction.opcode == "dynamic-update-slice":
            return min(size_bytes(computation.instructions[instruction.operands[1]].shape), whole)
        return whole

    parameters = [i for i in computation.instructions.values() if i.opcode == "parameter"]
    return sum(read(p.name, p.shape) for p in parameters) + written(computation.root)


class Floor(NamedTuple):
    """Seconds that a step takes at least, by what limits it."""

    compute: float
    memory: float
    ici: float
    dcn: float

    @property
    def seconds(self) -> float:
        """If all of them overlap perfectly: the largest."""
        return max(self)

    @property
    def bound(self) -> str:
        """What limits it."""
        return max(zip(self, self._fields, strict=True))[1]


def floor(costs: Costs, chip: Chip) -> Floor:
    """The step's least time on a chip; work of a device that is a part of one is given its part of the figures."""
    share = chip.devices
    return Floor(
        costs.flops * share / chip.flops,
        costs.hbm_bytes * share / chip.hbm_bandwidth,
        costs.ici_bytes * share / chip.ici_bandwidth,
        costs.dcn_bytes * share / chip.dcn_bandwidth,
    )
