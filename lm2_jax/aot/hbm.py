"""Bytes that one instruction of a compiled program moves between a device and its main memory (HBM).

Arrays whose layout has S(1) or higher are kept on the chip and cost nothing. An instruction that reads or writes a
slice of an array costs the bytes of the slice, not of the array. That holds inside fusions too, at any depth: libtpu
nests fusions, and a slice of a stack of layers is often the innermost of them.
"""

import collections
from typing import NamedTuple

from lm2_jax.aot.hlo import Computation, Instruction, Program, size_bytes

# Names, views and ends of asynchronous operations: nothing is moved.
_FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast after-all partition-id replica-id copy-done slice-done "
    "all-gather-done all-reduce-done collective-permute-done async-done async-update send-done recv-done "
    "optimization-barrier add-dependency iota".split()
)
_SLICES = ("dynamic-slice", "slice", "gather")


class _Read(NamedTuple):
    """What a computation reads of one value."""

    bytes: int
    is_returned: bool  # whether the computation returns the value itself, or a view of it


def hbm_traffic(program: Program, computation: Computation, instruction: Instruction) -> int:
    """Bytes read from and written to main memory by an instruction outside of fusions.

    Args:
      program: the program, for the computations that fusions call.
      computation: the one that holds the instruction.
      instruction: any but loops, calls and conditionals, whose bodies are counted by their own instructions.
    """
    opcode, lookup = instruction.opcode, computation.instructions
    if opcode in _FREE or (opcode == "custom-call" and "AllocateBuffer" in instruction.attributes):
        return 0
    result = size_bytes(instruction.shape, in_hbm=True)
    if opcode == "fusion":
        return _fusion_traffic(program, program.called(instruction, "calls"))
    if opcode in _SLICES:
        source = size_bytes(lookup[instruction.operands[0]].shape, in_hbm=True)
        return min(size_bytes(instruction.shape), source) + result
    if opcode == "dynamic-update-slice":
        update = lookup[instruction.operands[1]].shape
        return size_bytes(update, in_hbm=True) + min(size_bytes(update), result)
    if opcode.endswith("-start"):  # its shape holds operand and result
        return result
    return result + sum(size_bytes(lookup[name].shape, in_hbm=True) for name in instruction.operands if name in lookup)


def _fusion_traffic(program: Program, fusion: Computation) -> int:
    """Bytes of a fusion: what it reads of its parameters and what it writes of its results."""
    total = _written(program, fusion, fusion.root)
    for parameter in fusion.parameters:
        size = size_bytes(parameter.shape, in_hbm=True)
        read = _read(program, fusion, parameter.name, size)
        total += size if read.is_returned else min(read.bytes, size)
    return total


def _read(program: Program, computation: Computation, name: str, size: int) -> _Read:
    """What a computation reads of a value.

    Args:
      program: the program.
      computation: a fusion's, or one nested in it.
      name: of the value.
      size: its bytes in main memory, the cost of any use that is not a slice.
    """
    total, is_returned = 0, computation.root.name == name
    for user in _users(computation)[name]:
        views = []
        if user.opcode == "bitcast":
            views = [_read(program, computation, user.name, size)]
        elif user.opcode in _SLICES and user.operands[0] == name:
            total += size_bytes(user.shape)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            pass  # updated in place
        elif user.opcode == "fusion":
            views = _nested_reads(program, computation, user, name, size)
        else:
            total += size
        total += sum(view.bytes for view in views)
        is_returned |= any(view.is_returned for view in views)
    return _Read(total, is_returned)


def _nested_reads(program: Program, computation: Computation, fusion: Instruction, name: str, size: int) -> list[_Read]:
    """What a nested fusion reads of a value, and, where it returns a view of it, what the users of that view read."""
    inner = program.called(fusion, "calls")
    reads = [
        _read(program, inner, parameter.name, size)
        for parameter, operand in zip(inner.parameters, fusion.operands, strict=True)
        if operand == name
    ]
    views = [_read(program, computation, fusion.name, size) for read in reads if read.is_returned]
    return [read._replace(is_returned=False) for read in reads] + views


def _written(program: Program, computation: Computation, result: Instruction) -> int:
    """Bytes that a fusion writes for a result: those of the update where an array is updated in place."""
    size = size_bytes(result.shape, in_hbm=True)
    owner, source = _source(program, computation, result)
    if source.opcode == "tuple":
        return sum(_written(program, owner, owner.instructions[name]) for name in source.operands)
    if source.opcode == "dynamic-update-slice":
        return min(size_bytes(owner.instructions[source.operands[1]].shape), size)
    return size


def _source(program: Program, computation: Computation, value: Instruction) -> tuple[Computation, Instruction]:
    """The instruction that makes a value, and its computation: views are skipped, nested fusions entered."""
    while value.opcode in ("bitcast", "fusion"):
        if value.opcode == "bitcast":
            value = computation.instructions[value.operands[0]]
            continue
        inner = program.called(value, "calls")
        owner, source = _source(program, inner, inner.root)
        if owner.name != inner.name or source.opcode != "parameter":
            return owner, source
        value = computation.instructions[value.operands[int(source.operands[0])]]
    return computation, value


def _users(computation: Computation) -> dict[str, list[Instruction]]:
    """The instructions that use each value; one that uses it twice is listed once."""
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for instruction in computation.instructions.values():
        if instruction.opcode not in ("parameter", "constant"):
            for name in dict.fromkeys(instruction.operands):
                users[name].append(instruction)
    return users
