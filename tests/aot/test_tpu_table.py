"""The tables of docs/tpu.md: the commands of a row, what a report becomes, and that the page is made of its reports."""

from benchmarks import tpu_rows, tpu_table
from lm2_jax.aot.compile_only import QUICK_MORE_BYTES, QUICK_MORE_TRAFFIC

PAGE = tpu_rows.PAGE.read_text()
RESULTS = tpu_rows.read()
GIB = 2**30


def report(**changes):
    return {
        "mesh": {"data": 2, "fsdp": 32, "model": 1, "slots": 4},
        "bytes": {
            "parameters": GIB, "optimizer": 2 * GIB, "state": GIB // 2, "batch": 0, "temporaries": 4 * GIB,
            "program": GIB // 4, "total": 31 * GIB // 4,
        },
        "hbm_bytes": 16 * GIB,
        "fits": True,
        "flops": {"model": 5.58e15, "traced": 9.61e15, "compiled": 9.32e15},
        "collectives": [
            {"ici_bytes": 20e9, "dcn_bytes": 0.0}, {"ici_bytes": 9.26e9, "dcn_bytes": 0.0}
        ],
        "floor": {"compute": 0.185, "memory": 0.14, "ici": 0.1464, "dcn": 0.0},
    } | changes  # fmt: skip


COSTS = """| preset and slice | mesh | kept | temporaries | of | model | traced | share | sent GB | bounds, ms |
|---|---|---|---|---|---|---|---|---|---|
| `lm2_1p7b v5e:16x16 --data.rows 4` | old | 9 | 9 | 9 | 9 | 9 | 9 | 9 | 9 |
"""
SCALING = """text

| chips | options | `--mesh.fsdp 8 --mesh.data N/8` | to | `--mesh.fsdp 16 --mesh.data N/16` | to |
|---|---|---|---|---|---|
| 16 | `--topology v5p:2x2x4 --data.rows 16` | 1 |  | 1 |  |
| 1,024 | `--topology v5p:8x8x16 --data.rows 1024` | 1 | +0.0% | 1 | +0.0% |
"""


def test_a_row_is_what_its_report_says():
    (row,) = tpu_table.rows(COSTS)
    assert row.commands == ["python train.py lm2_1p7b --compile-only --quick --topology v5e:16x16 --data.rows 4"]
    line = tpu_table.written(COSTS, {row.commands[0]: report()}).splitlines()[2]
    assert line == (
        "| `lm2_1p7b v5e:16x16 --data.rows 4` | 2 x 32 x 1 x 4 | 3.50 | 4.25 | 16 | 5.58e15 | 9.61e15 | 0.97 | 29.3 "
        "| 185 / 140 / 146 |"
    )


def test_a_row_without_a_report_stays_and_is_marked_once():
    assert tpu_table.written(tpu_table.written(SCALING, {}), {}) == tpu_table.written(SCALING, {})
    marked = tpu_table.written(COSTS, {})
    assert marked.splitlines()[2] == "| `lm2_1p7b v5e:16x16 --data.rows 4` † | old | 9 | 9 | 9 | 9 | 9 | 9 | 9 | 9 |"
    assert tpu_table.written(marked, {}) == marked


def test_weak_scaling_has_a_command_per_mesh_and_the_change():
    first, last = tpu_table.rows(SCALING)
    assert [command.partition("--topology ")[2] for command in last.commands] == [
        "v5p:8x8x16 --data.rows 1024 --mesh.fsdp 8 --mesh.data 128",
        "v5p:8x8x16 --data.rows 1024 --mesh.fsdp 16 --mesh.data 64",
    ]
    sent = dict(zip([*first.commands, *last.commands], (10e9, 20e9, 11e9, 15e9), strict=True))
    reports = {key: report(collectives=[{"ici_bytes": size, "dcn_bytes": 0}]) for key, size in sent.items()}
    lines = tpu_table.written(SCALING, reports).splitlines()
    assert lines[4].endswith("| 10.00 |  | 20.00 |  |")
    assert lines[5].endswith("| 11.00 | +10.0% | 15.00 | -25.0% |")


def test_the_page_is_what_its_reports_make():
    """After `python -m benchmarks.tpu_rows` the page is not edited by hand."""
    assert len(tpu_table.rows(PAGE)) > 40
    assert RESULTS
    assert tpu_table.written(PAGE, {command: row["report"] for command, row in RESULTS.items()}) == PAGE


def test_the_page_names_the_versions_of_its_rows():
    made = {(row["versions"]["jax"], row["versions"]["libtpu"]) for row in RESULTS.values()}
    missing = [pair for pair in made if f"jax {pair[0]} and libtpu {pair[1]}" not in " ".join(PAGE.split())]
    assert not missing
    assert (tpu_table.OLD in PAGE) == (f"marked {tpu_table.OLD}" in PAGE), "what the mark means is said if it is there"


def test_complete_programs_need_at_most_what_quick_says():
    """And the constants are no larger than the largest ratios that were found, rounded up."""
    results = {command: row["report"] for command, row in tpu_rows.read().items()}
    pairs = [
        (results[command], results[command.replace("--compile-only", "--compile-only --quick")])
        for command in results
        if "--quick" not in command
    ]
    assert len(pairs) == 7
    for value, most in (
        (lambda report: report["bytes"]["total"], QUICK_MORE_BYTES),
        (lambda report: report["floor"]["memory"], QUICK_MORE_TRAFFIC),
    ):
        found = max(value(complete) / value(quick) - 1 for complete, quick in pairs)
        assert most - 0.01 <= found <= most
