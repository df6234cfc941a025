"""Parses the text of a compiled XLA program (HLO) and counts the operations of single instructions.

XLA's own cost analysis counts the body of a loop once, so a model of 16 scanned layers would seem to have one. This
module reads trip counts too, and `lm2_jax.aot.costs` multiplies by them.
"""

import functools
import json
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lm2_jax.attention import splash

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {"pred": 8, "bf16": 16, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "token": 0, "opaque": 0}
_BEGINNING = re.compile(r"\s+(ROOT )?%?[\w.\-]+ = ")
_ARRAY = re.compile(r"\b(pred|token|opaque|bf16|c\d+|[suf]\d+(?:e\w+)?)\[([\d,]*)\](\{[^}]*\})?")


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]  # names; of a constant or parameter: the text in the brackets
    attributes: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """The word after `name=`, without a leading %, or the text in the braces there; None if it is absent."""
        match = re.search(rf"\b{name}=(?:%?([\w.\-]+)|\{{([^}}]*)\}})", self.attributes)
        return None if match is None else match[1] or match[2]


class Computation(NamedTuple):
    """A named list of instructions."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The instruction whose value the computation returns."""
        return next(i for i in self.instructions.values() if i.root)

    @property
    def parameters(self) -> list[Instruction]:
        """Its parameters, in the order of a call's operands."""
        return sorted(
            (i for i in self.instructions.values() if i.opcode == "parameter"), key=lambda i: int(i.operands[0])
        )


class Program(NamedTuple):
    """A module: computations by name, the name of the entry computation, and the number of devices."""

    computations: dict[str, Computation]
    entry: str
    partitions: int

    def called(self, instruction: Instruction, attribute: str) -> Computation:
        """The computation that an attribute of an instruction names, such as `body` or `calls`."""
        return self.computations[instruction.attribute(attribute) or ""]


def parse(text: str) -> Program:
    """Parses what `compiled.as_text()` returns.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current, pending = "", None, ""

    def finish() -> None:
        if current is not None and pending:
            instruction = _instruction(pending)
            current.instructions[instruction.name] = instruction

    for line in text.splitlines():
        if current is None:
            if line.endswith("{") and not line.startswith("HloModule"):
                name = line.removeprefix("ENTRY ").split("(")[0].split()[0].lstrip("%")
                current = computations[name] = Computation(name, {})
                entry = name if line.startswith("ENTRY") else entry
        elif line == "}" or line.startswith("}, execution_thread"):
            finish()
            current, pending = None, ""
        elif _BEGINNING.match(line):
            finish()
            pending = line
        else:  # kernels have attributes of several lines
            pending += line
    if not entry:
        raise ValueError("this is no text of a compiled program: it has no ENTRY computation")
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(line: str) -> Instruction:
    left, right = line.strip().split(" = ", 1)
    shape_end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    rest = right[shape_end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    opcode = rest[:opening]
    literal = opcode in ("constant", "parameter", "iota")
    names = (inside,) if literal else tuple(re.findall(r"%([\w.\-]+)", inside)) or _bare_names(inside)
    name = left.removeprefix("ROOT ").lstrip("%")
    return Instruction(name, right[:shape_end], opcode, names, rest[closing + 1 :], left.startswith("ROOT "))


def _closing(text: str, opening: int) -> int:
    """Position of the bracket that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced brackets in: {text[:200]}")


def _bare_names(inside: str) -> tuple[str, ...]:
    return tuple(part.split()[-1] for part in re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", inside).split(",") if part.strip())


def arrays(shape: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(element type, dimensions, layout) of each array in a shape, which may be a tuple."""
    for match in _ARRAY.finditer(shape):
        yield match[1], tuple(map(int, match[2].split(","))) if match[2] else (), match[3] or ""


def dimensions(shape: str) -> tuple[int, ...]:
    """Dimensions of an array's shape."""
    return next(arrays(shape))[1]


def size_bytes(shape: str, in_hbm: bool = False) -> int:
    """Bytes of an array, or of all arrays of a tuple.

    Args:
      shape: as printed.
      in_hbm: counts only arrays in main memory; S(1) and higher in a layout is memory on the chip.
    """
    total = 0
    for kind, sizes, layout in arrays(shape):
        if not (in_hbm and re.search(r"S\([1-9]", layout)):
            bits = _BITS.get(kind) if kind in _BITS else int(re.search(r"\d+", kind)[0])  # pyright: ignore
            total += int(np.prod(sizes, dtype=np.int64)) * int(bits or 0) // 8
    return total


def trip_count(program: Program, caller: Computation, loop: Instruction) -> int | None:
    """Trip count of a while loop; None if neither the compiler's annotation nor the condition gives it.

    The condition of a loop made by jax compares a counter with a constant. The counter grows by one per iteration. In
    a matrix product that libtpu has split into windows to overlap it with a collective, it grows by two.
    """
    known = re.search(r'"?known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition = program.called(loop, "condition")
    compare, lookup = condition.root, condition.instructions
    if compare.opcode == "fusion":
        arguments = compare.operands
        inner = program.called(compare, "calls")
        compare = inner.root
        lookup = {
            name: condition.instructions[arguments[int(i.operands[0])]] if i.opcode == "parameter" else i
            for name, i in inner.instructions.items()
        }
    if compare.opcode != "compare" or compare.attribute("direction") not in ("LT", "GT"):
        return None
    counter, limit = (lookup[name] for name in compare.operands)
    if compare.attribute("direction") == "GT":
        counter, limit = limit, counter
    if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
        return None
    index = int(counter.attribute("index") or 0)
    start, step = _start(caller, loop, index), _step(program.called(loop, "body"), index)
    return None if start is None else max(-(-(int(limit.operands[0]) - start) // step), 0)


def _step(body: Computation, index: int) -> int:
    """Increment of the counter per iteration; one if the body does not show it."""
    if body.root.opcode != "tuple":
        return 1
    grown = body.instructions[body.root.operands[index]]
    if grown.opcode != "add":
        return 1
    added = [body.instructions[name] for name in grown.operands]
    return next((int(i.operands[0]) for i in added if i.opcode == "constant"), 1)


def _start(caller: Computation, loop: Instruction, index: int) -> int | None:
    """First value of the counter; None if it is not a constant."""
    carried = caller.instructions[loop.operands[0]]
    if carried.opcode != "tuple":
        return None
    first = caller.instructions[carried.operands[index]]
    while first.opcode in ("copy", "bitcast"):
        first = caller.instructions[first.operands[0]]
    return int(first.operands[0]) if first.opcode == "constant" else None


def dot_flops(computation: Computation, dot: Instruction) -> int:
    """Operations of a dot: two per multiply-add."""
    left = dimensions(computation.instructions[dot.operands[0]].shape)
    summed = [left[int(d)] for d in (dot.attribute("lhs_contracting_dims") or "").split(",") if d]
    return 2 * int(np.prod(dimensions(dot.shape), dtype=np.int64)) * int(np.prod(summed, dtype=np.int64))


def convolution_flops(computation: Computation, convolution: Instruction) -> int:
    """Operations of a convolution: two per multiply-add, without those on padding.

    On TPUs every matrix product is a convolution. Batch dimensions of a product become windows that mostly cover
    padding, so the product of all sizes would be far too large.
    """
    left, right = (dimensions(computation.instructions[name].shape) for name in convolution.operands[:2])
    out = dimensions(convolution.shape)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    assert labels is not None
    inputs, kernel, output = labels.groups()
    groups = [int(convolution.attribute(name) or 1) for name in ("feature_group_count", "batch_group_count")]
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    products = left[inputs.index("f")] // groups[0] * out[output.index("f")] * (left[inputs.index("b")] // groups[1])
    for d in sorted(character for character in inputs if character.isdigit()):

        def field(name: str, default: str, d: int = int(d)) -> str:
            return fields[name].split("x")[d] if name in fields else default

        products *= _pairs(
            left[inputs.index(d)],
            right[kernel.index(d)],
            out[output.index(d)],
            int(field("stride", "1")),
            int(field("pad", "0_0").split("_")[0]),
            int(field("lhs_dilate", "1")),
            int(field("rhs_dilate", "1")),
        )
    return 2 * products


@functools.cache
def _pairs(size: int, kernel: int, out: int, stride: int, pad: int, dilation: int, kernel_dilation: int) -> int:
    """Number of (output, kernel) positions in one dimension that multiply an input value, not padding."""
    place = np.arange(out)[:, None] * stride - pad + np.arange(kernel)[None] * kernel_dilation
    return int(np.sum((place >= 0) & (place % dilation == 0) & (place < size * dilation)))


def kernel_flops(computation: Computation, call: Instruction) -> int:
    """Operations of a Pallas kernel: its declared cost estimate, else those of a known attention kernel, else 0."""
    declared = re.search(r'"cost_estimate":\s*(\{[^}]*\})', call.attributes)
    if declared:
        return int(json.loads(declared[1]).get("flops", 0))
    operands = [next(arrays(computation.instructions[name].shape), None) for name in call.operands]
    shapes = [array[1] for array in operands if array is not None and array[0].startswith(("bf", "f"))]
    scope = re.search(r'op_name="([^"]*)"', call.attributes)
    return splash.kernel_flops(f"{scope[1] if scope else ''}/{call.name}", shapes)


def groups(instruction: Instruction, partitions: int) -> list[list[int]]:
    """Groups of devices that communicate in a collective; of a permutation, its (source, target) pairs.

    XLA prints groups in three notations: {{0,1},{2,3}}, [2,4]<=[4,2]T(1,0), and axes of a mesh.
    """
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{(\{[^=]*?\})\}", text):
        return [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}", text):
        return _mesh_groups(mesh[1], mesh[2], mesh[3])
    if iota := re.search(r"replica_groups=\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", text):
        count, size = map(int, iota[1].split(","))
        return _iota(iota[2]).reshape(count, size).tolist()
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", text)
    if listed is None:
        return [list(range(partitions))]
    return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]


def between_slices(instruction: Instruction) -> tuple[str, int] | None:
    """Kind of a collective between TPU slices and the number of slices; None if a `send` is anything else.

    Between slices libtpu passes each device's part to the runtime of its host, which exchanges it with other hosts. The
    program shows `send` and `recv` with `_xla_megascale_target="{1,2}x{0:3}"`: slices 1 and 2, devices 0 to 3 of each.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    target = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', instruction.attributes)
    if instruction.opcode != "send" or kind is None or target is None:
        return None
    spans = [[int(n) for n in span.split(":")] for span in target[1].split(",")]
    return kind[1].lower().replace("_", "-"), sum(span[-1] - span[0] + 1 for span in spans)


def _iota(text: str) -> np.ndarray:
    """Device numbers in the notation `<=[4,2]T(1,0)`: 0, 1, ... in that shape, then transposed."""
    shape, order = re.fullmatch(r"(?:<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()  # pyright: ignore
    ids = np.arange(np.prod([int(n) for n in shape.split(",")])).reshape([int(n) for n in shape.split(",")])
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def _mesh_groups(axes: str, ids: str | None, chosen: str) -> list[list[int]]:
    """Groups in the notation `'a'=2,'b'=4` with `{'a','b':(1)2}`.

    Args:
      axes: names and sizes of the mesh axes.
      ids: device numbers of the mesh in the iota notation; None: 0, 1, ...
      chosen: the axes along which devices communicate. `'b':(m)n` is a part of an axis: n positions, at a stride that
        follows from m, the product of the sizes of the parts before it.
    """
    sizes: dict[str, int] = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", chosen)
    shape: list[int] = []
    communicating: list[int] = []
    for name, size in sizes.items():
        splits = [(int(before), int(part)) for n, before, part in parts if n == name and part]
        if not splits:
            communicating += [len(shape)] if any(n == name for n, _, _ in parts) else []
            shape.append(size)
            continue
        done = 1
        for before, part in sorted(splits):
            shape += [before // done, part]
            communicating.append(len(shape) - 1)
            done = before * part
        shape.append(size // done)
    order = np.arange(np.prod(list(sizes.values()), dtype=np.int64)) if ids is None else _iota(ids).reshape(-1)
    rest = [d for d in range(len(shape)) if d not in communicating]
    width = int(np.prod([shape[d] for d in communicating], dtype=np.int64))
    return order.reshape(shape).transpose(rest + communicating).reshape(-1, width).tolist()
