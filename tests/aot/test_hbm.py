"""Bytes of main memory: slices cost their own size at any depth of fusions, and on-chip memory costs nothing."""

import pytest

from lm2_jax.aot import costs, hlo

STACK, ROW = 6 * 8 * 4, 8 * 4  # bytes of a float32 array of 6 rows, and of one row

HEAD = "HloModule m, is_scheduled=true, num_partitions=1\n\n"
INDEX = "s32[]{:T(128)S(6)}"

# A slice of a stack, two fusions deep, and used through a bitcast there.
INNERMOST = f"""%take (p.2: f32[6,8], i.2: s32[]) -> f32[8] {{
  %p.2 = f32[6,8]{{1,0}} parameter(0)
  %i.2 = {INDEX} parameter(1)
  %t = f32[1,8]{{1,0}} dynamic-slice(%p.2, %i.2, %i.2), dynamic_slice_sizes={{1,8}}
  ROOT %b.2 = f32[8]{{0}} bitcast(%t)
}}

%middle (i.1: s32[], p.1: f32[6,8]) -> f32[8] {{
  %p.1 = f32[6,8]{{1,0}} parameter(1)
  %i.1 = {INDEX} parameter(0)
  %n.1 = f32[8]{{0}} fusion(%p.1, %i.1), kind=kLoop, calls=%take
  ROOT %m.1 = f32[8]{{0}} multiply(%n.1, %n.1)
}}

"""
READ = (
    HEAD
    + INNERMOST
    + f"""ENTRY %main (a: f32[6,8], c: s32[]) -> f32[8] {{
  %a = f32[6,8]{{1,0}} parameter(0)
  %c = {INDEX} parameter(1)
  ROOT %one = f32[8]{{0}} fusion(%c, %a), kind=kLoop, calls=%middle
}}
"""
)

# A nested fusion that only returns a view of its parameter: its users decide what is read.
VIEW = (
    HEAD
    + f"""%view (p.1: f32[6,8]) -> f32[48] {{
  %p.1 = f32[6,8]{{1,0}} parameter(0)
  ROOT %b.1 = f32[48]{{0}} bitcast(%p.1)
}}

%outer (p: f32[6,8], i: s32[]) -> f32[8] {{
  %p = f32[6,8]{{1,0}} parameter(0)
  %i = {INDEX} parameter(1)
  %v = f32[48]{{0}} fusion(%p), kind=kLoop, calls=%view
  ROOT %r = f32[8]{{0}} USE
}}

ENTRY %main (a: f32[6,8], c: s32[]) -> f32[8] {{
  %a = f32[6,8]{{1,0}} parameter(0)
  %c = {INDEX} parameter(1)
  ROOT %one = f32[8]{{0}} fusion(%a, %c), kind=kLoop, calls=%outer
}}
"""
)

# An update in place of one row of a stack, in a nested fusion; a second one only changes the view.
WRITE = (
    HEAD
    + f"""%update (p.1: f32[6,8], q.1: f32[1,8], i.1: s32[]) -> f32[6,8] {{
  %p.1 = f32[6,8]{{1,0}} parameter(0)
  %q.1 = f32[1,8]{{1,0}} parameter(1)
  %i.1 = {INDEX} parameter(2)
  ROOT %u = f32[6,8]{{1,0}} dynamic-update-slice(%p.1, %q.1, %i.1, %i.1)
}}

%view (p.2: f32[6,8]) -> f32[48] {{
  %p.2 = f32[6,8]{{1,0}} parameter(0)
  ROOT %b.2 = f32[48]{{0}} bitcast(%p.2)
}}

%outer (p: f32[6,8], q: f32[1,8], i: s32[]) -> f32[48] {{
  %p = f32[6,8]{{1,0}} parameter(0)
  %q = f32[1,8]{{1,0}} parameter(1)
  %i = {INDEX} parameter(2)
  %f = f32[6,8]{{1,0}} fusion(%p, %q, %i), kind=kLoop, calls=%update
  ROOT %g = f32[48]{{0}} fusion(%f), kind=kLoop, calls=%view
}}

ENTRY %main (a: f32[6,8], b: f32[1,8], c: s32[]) -> f32[48] {{
  %a = f32[6,8]{{1,0}} parameter(0)
  %b = f32[1,8]{{1,0}} parameter(1)
  %c = {INDEX} parameter(2)
  ROOT %new = f32[48]{{0}} fusion(%a, %b, %c), kind=kLoop, calls=%outer
}}
"""
)


def hbm_bytes(text: str) -> float:
    return costs.program_costs(hlo.parse(text)).hbm_bytes


def test_a_slice_in_a_nested_fusion_costs_its_own_size():
    assert hbm_bytes(READ) == ROW + ROW


@pytest.mark.parametrize(
    ("use", "read"),
    [
        ("dynamic-slice(%v, %i), dynamic_slice_sizes={8}", ROW),
        ("reduce(%v, %i), dimensions={0}, to_apply=%add", STACK),
    ],
)
def test_what_is_read_of_a_view_counts_for_the_array(use, read):
    assert hbm_bytes(VIEW.replace("USE", use)) == read + ROW


def test_an_update_in_a_nested_fusion_writes_the_update_only():
    assert hbm_bytes(WRITE) == ROW + ROW


def test_a_nested_fusion_without_a_slice_reads_everything():
    everything = READ.replace(
        "f32[1,8]{1,0} dynamic-slice(%p.2, %i.2, %i.2), dynamic_slice_sizes={1,8}",
        "f32[1,8]{1,0} reduce(%p.2, %i.2), dimensions={0}, to_apply=%add",
    )
    assert everything != READ
    assert hbm_bytes(everything) == STACK + ROW


@pytest.mark.parametrize(
    ("source", "result", "expected"),
    [("", "", 2 * ROW), ("", "S(1)", ROW), ("S(1)", "", ROW), ("S(1)", "S(1)", 0)],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_a_slice_that_is_copied_to_or_from_the_chip(source, result, expected, is_async):
    """libtpu prefetches slices of main memory into on-chip memory, often asynchronously."""
    array, row = f"f32[6,8]{{1,0:T(8,128){source}}}", f"f32[1,8]{{1,0:T(8,128){result}}}"
    expression = "slice({}), slice={{[0:1], [0:8]}}"
    direct = f"  ROOT %s = {row} {expression.format('%n')}"
    started = f"  %g = (({array}), {row}, s32[]) async-start(%n), calls=%part\n  ROOT %s = {row} async-done(%g)"
    text = (
        f"{HEAD}%part (p: f32[6,8]) -> f32[1,8] {{\n  %p = {array} parameter(0)\n"
        f"  ROOT %c = {row} {expression.format('%p')}\n}}\n\n"
        f"ENTRY %main (n: f32[6,8]) -> f32[1,8] {{\n  %n = {array} parameter(0)\n"
        f"{started if is_async else direct}\n}}\n"
    )
    assert hbm_bytes(text) == expected
