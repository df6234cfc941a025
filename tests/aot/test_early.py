"""Programs that are read before they become machine code: what counts as written, and what a compilation ends in."""

import threading
from pathlib import Path

import pytest

from lm2_jax.aot.early import Early, optimised, read_dump

PROGRAM = "HloModule m\n\nENTRY %main () -> f32[] {\n  ROOT %c = f32[] constant(0)\n}\n\n"
MEMORY = "Memory Space: default (color=0)\nTotal bytes: 5292032 (5.05MiB)\n  rest\nMemory Space: vmem (color=1)\n"
NAMES = ("after_optimizations_after_buffer_assignment.txt", "after_optimizations-memory-usage-report.txt")


def write(folder, program=PROGRAM, memory=MEMORY):
    for name, text in zip(NAMES, (program, memory), strict=True):
        (folder / f"module_0000.jit_train_step.{name}").write_text(text)


def test_a_whole_dump_is_read(tmp_path):
    write(tmp_path)
    assert read_dump(tmp_path) == Early(PROGRAM, 5292032)


@pytest.mark.parametrize("length", [0, 20, PROGRAM.index("ROOT"), PROGRAM.index("\n}\n")])
def test_a_part_of_a_program_is_not_taken_for_the_whole(tmp_path, length):
    write(tmp_path, program=PROGRAM[:length])
    assert read_dump(tmp_path) is None


def test_a_program_without_its_memory_is_not_taken(tmp_path):
    write(tmp_path, memory=MEMORY[:20])
    assert read_dump(tmp_path) is None
    assert read_dump(tmp_path / "nothing") is None


def test_nobody_waits_for_the_code():
    done = threading.Event()

    def compile_with(options):
        write(Path(options["xla_dump_to"]))
        done.wait(60)

    try:
        assert optimised(compile_with, poll_seconds=0.01) == Early(PROGRAM, 5292032)
    finally:
        done.set()


def test_a_compilation_that_ends_first_is_what_counts():
    assert optimised(lambda options: "compiled", poll_seconds=0.01) == "compiled"


def test_a_failure_is_passed_on():
    def compile_with(options):
        raise MemoryError("does not fit")

    with pytest.raises(MemoryError, match="does not fit"):
        optimised(compile_with, poll_seconds=0.01)
