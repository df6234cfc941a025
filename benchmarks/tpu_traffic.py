"""Memory traffic of a compiled program by loop: `python -m benchmarks.tpu_traffic program.txt`.

`program.txt` is what `train.py PRESET --compile-only --hlo program.txt` has written. A loop is named by the numbers of
iterations of the loops around it and of itself, as in `18 x 16`; bytes are those of a step on one device.
"""

import argparse
import collections
import pathlib

from lm2_jax.aot.costs import program_costs
from lm2_jax.aot.hbm import hbm_traffic
from lm2_jax.aot.hlo import Computation, Program, parse, trip_count

Path = tuple[int, ...]


class Traffic:
    """Bytes by loop and by kind of instruction."""

    def __init__(self, program: Program):
        self._program = program
        self.bytes: dict[Path, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self._add(program.computations[program.entry], (), 1)

    def _add(self, computation: Computation, path: Path, times: int) -> None:
        program = self._program
        for instruction in computation.instructions.values():
            opcode = instruction.opcode
            if opcode == "while":
                trips = trip_count(program, computation, instruction) or 1
                self._add(program.called(instruction, "body"), (*path, trips), times * trips)
            elif opcode in ("call", "async-start"):
                inner = "to_apply" if opcode == "call" else "calls"
                self._add(program.called(instruction, inner), path, times)
            elif opcode == "conditional":
                raise SystemExit("this program has a branch, which costs as much as the larger side: not counted here")
            else:
                name = instruction.name.rstrip("0123456789.") if opcode == "fusion" else opcode
                self.bytes[path][name] += times * hbm_traffic(program, computation, instruction)

    @property
    def total(self) -> int:
        """Bytes of a step."""
        return sum(sum(kinds.values()) for kinds in self.bytes.values())


def main() -> None:
    """Prints a line per loop with its largest kinds of instructions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=pathlib.Path)
    parser.add_argument("--kinds", type=int, default=4, metavar="N", help="kinds shown for each loop (%(default)s)")
    options = parser.parse_args()
    program = parse(options.program.read_text())
    traffic = Traffic(program)
    if traffic.total != program_costs(program).hbm_bytes:
        raise SystemExit(f"{traffic.total} bytes here, {program_costs(program).hbm_bytes} in the report")
    print(f"{traffic.total / 1e9:.1f} GB")
    for path, kinds in sorted(traffic.bytes.items(), key=lambda item: -sum(item[1].values())):
        largest = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in kinds.most_common(options.kinds) if size)
        print(f"{sum(kinds.values()) / 1e9:10.1f}  {' x '.join(map(str, path)) or 'outside':<24} {largest}")


if __name__ == "__main__":
    main()
