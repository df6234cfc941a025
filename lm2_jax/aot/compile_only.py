"""Compiles a run's train step for a TPU slice, on a machine without TPUs, and reports what it costs."""

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lm2_jax.aot.costs import Costs, program_costs, roofline_bound
from lm2_jax.aot.early import Early, optimised
from lm2_jax.aot.hlo import parse
from lm2_jax.aot.topology import Topology, compile_only_devices, parse_topology
from lm2_jax.config import RunConfig
from lm2_jax.errors import UserError
from lm2_jax.folders import check_file, prepare_file
from lm2_jax.layout import sharded_shapes
from lm2_jax.model import LanguageModel
from lm2_jax.precision import prepare_numbers
from lm2_jax.sharding.layout import Layout
from lm2_jax.sharding.mesh import AXES, MeshConfig, make_mesh
from lm2_jax.training.fit import check_trainable
from lm2_jax.training.flops import traced_flops
from lm2_jax.training.objective import batch_shapes
from lm2_jax.training.progress import flops_per_token
from lm2_jax.training.state import Plan, make_plan
from lm2_jax.training.step import jit_train_step, make_train_step

# The most that the complete compilation has needed in addition to what `--quick` reports: docs/tpu.md, part 2.
QUICK_MORE_BYTES, QUICK_MORE_TRAFFIC = 0.31, 0.34

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """What train.py compiles instead of training."""

    compile_only: bool = False
    """Compiles the train step for --topology, reports its costs, and trains nothing; needs libtpu, but no TPU."""
    topology: str | None = None
    """TPU slice for --compile-only: v5e:16x16, v5p:8x8x8, v6e:4x4, tpu7x:4x4x4; several slices: 2xv5e:16x16."""
    json: str | None = None
    """File for the report of --compile-only as JSON; -: standard output, instead of the table."""
    hlo: str | None = None
    """File for the text of the compiled program, which shows where each collective comes from."""
    quick: bool = False
    """Stops before machine code is generated, which takes most of the time. Operations and collectives are exact;
    memory and its traffic are those of libtpu's first attempt and can grow: docs/tpu.md."""

    def is_requested(self) -> bool:
        """Whether to compile instead of training.

        Raises:
          UserError: options of --compile-only without it, or --compile-only without --topology.
        """
        if self.compile_only and self.topology is None:
            raise UserError("--compile-only needs --topology: which TPU slice to compile for, such as v5e:16x16")
        if not self.compile_only and (self.topology or self.json or self.hlo or self.quick):
            raise UserError("--topology, --json, --hlo and --quick need --compile-only")
        return self.compile_only


@dataclasses.dataclass(frozen=True)
class Report:
    """Costs of one call of the compiled train step; bytes and times are those of one device."""

    preset: str
    topology: str
    chips: int
    devices: int
    mesh: dict[str, int]
    rows: int
    segments: int
    segment_tokens: int
    parameters: int
    """Number of parameters of the model."""
    bytes: dict[str, int]
    """parameters, optimizer, state (carried memory), batch, temporaries, program, and their sum as `total`."""
    hbm_bytes: int
    """Bytes of memory of one device."""
    fits: bool
    advice: str
    """What to change if it does not fit, else empty."""
    flops: dict[str, float]
    """Per step, all devices: `model` (6 N per token and causal attention), `traced` (all matrix products of the step,
    recomputation included), `compiled` (those of the compiled program)."""
    collectives: list[dict[str, Any]]
    """Per kind, group size and number of slices: the count, and the bytes that a device sends."""
    floor: dict[str, float]
    """Lower bounds in seconds: compute, memory, ici, dcn, and the largest as `seconds`."""
    unknown_loops: int
    """Loops of unknown trip count; their bodies are counted once."""
    compile_seconds: float
    quick: bool = False
    """Whether code generation was skipped: memory and its traffic may be larger in the end."""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return dataclasses.asdict(self)


def compile_and_report(config: RunConfig, mesh_for: Callable[[int], MeshConfig], compilation: CompileConfig) -> int:
    """Runs `train.py PRESET --compile-only`.

    Args:
      config: the run.
      mesh_for: returns the mesh for a number of devices.
      compilation: the slice, and where to write the report.
    Returns:
      Exit status: 0, or 1 if the step does not fit into the slice's memory.
    """
    topology = parse_topology(compilation.topology or "")
    mesh = mesh_for(topology.devices)
    mesh.sizes(topology.devices)  # refuses a wrong mesh before libtpu is loaded
    for field, file in (("--json", compilation.json), ("--hlo", compilation.hlo)):
        if file is not None and (field, file) != ("--json", "-"):
            check_file(file, field)
    report = compile_only(config, mesh, topology, compilation.hlo, compilation.quick)
    if compilation.json != "-":
        print(describe(report))
    if compilation.json is not None:
        text = json.dumps(report.to_dict(), indent=1)
        print(text) if compilation.json == "-" else prepare_file(compilation.json, "--json").write_text(text + "\n")
    return 0 if report.fits else 1


def compile_only(
    config: RunConfig, mesh: MeshConfig, topology: Topology, hlo: str | None = None, quick: bool = False
) -> Report:
    """Compiles the train step that `train.py` would run on a slice, for the longest stage of its data.

    Args:
      config: the run.
      mesh: sizes of the mesh; their product must be the number of devices.
      topology: the slice.
      hlo: file for the text of the program, or None.
      quick: skips code generation, see `early.optimised`; the process must then be left by `os._exit`.
    Raises:
      UserError: libtpu is not installed, or mesh, model and slice are incompatible.
    """
    prepare_numbers(config.model.precision)
    devices = compile_only_devices(topology)
    layout = Layout(make_mesh(mesh, devices), config=config)
    plan = make_plan(config, LanguageModel(config.model))
    state, batch = _arguments(plan, layout)
    started = time.monotonic()
    with layout.context():
        check_trainable(plan)
        lowered = jit_train_step(plan, layout).lower(state, batch)
        try:
            compiled = optimised(lowered.compile) if quick else lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return _does_not_fit(plan, layout, topology, str(error), started, quick)
    devices_of_mesh: Any = layout.mesh.devices
    slices = [getattr(device, "slice_index", None) or 0 for device in devices_of_mesh.flat]
    text = compiled.text if isinstance(compiled, Early) else compiled.as_text()
    if hlo is not None:
        prepare_file(hlo, "--hlo").write_text(text)
    costs = program_costs(parse(text), slices.__getitem__)
    temporaries = _temporaries(compiled, _device_bytes(state) + _device_bytes(batch))
    return _report(plan, layout, topology, temporaries, costs, started, quick=isinstance(compiled, Early))


def _single_device_flops(plan: Plan, layout: Layout) -> float:
    """Matrix operations of a step traced for a single device of this kind, where no work is done twice."""
    one: Any = layout.mesh.devices
    with Layout(make_mesh(MeshConfig(), list(one.flat[:1])), config=plan.config).context():
        return traced_flops(make_train_step(plan), plan.shapes, _batch_shapes(plan.config))


def _batch_shapes(config: RunConfig) -> Any:
    """Shapes of a batch of the longest stage."""
    return batch_shapes(config.data.rows, max(config.data.segments), config.model.segment_tokens)


def _temporaries(compiled: Any, arguments: int) -> dict[str, int]:
    """Bytes of a device in addition to those of the arguments (train state and batch)."""
    if isinstance(compiled, Early):
        return {"temporaries": compiled.hbm_bytes - arguments, "program": 0}
    memory: Any = compiled.memory_analysis()
    return {
        "temporaries": memory.temp_size_in_bytes + max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
        "program": memory.generated_code_size_in_bytes,
    }


def _arguments(plan: Plan, layout: Layout) -> tuple[Any, Any]:
    """Train state and batch of a step, as shapes with shardings."""
    batch = _batch_shapes(plan.config)
    rows = layout.shardings(jax.tree.map(lambda leaf: ("batch", *[None] * (leaf.ndim - 1)), batch), batch)
    return sharded_shapes(plan.shapes, plan.shardings(layout)), sharded_shapes(batch, rows)


def _report(
    plan: Plan,
    layout: Layout,
    topology: Topology,
    temporaries: dict[str, int],
    costs: Costs | None,
    started: float,
    quick: bool,
) -> Report:
    """The report; `costs` is None where the compiler gave up for lack of memory."""
    config, chip = plan.config, topology.chip
    state, batch = _arguments(plan, layout)
    sizes = {
        "parameters": _device_bytes(state.params),
        "optimizer": _device_bytes(state.opt_state),
        "state": _device_bytes(state.memory),
        "batch": _device_bytes(batch),
        **temporaries,
    }
    sizes["total"] = sum(sizes.values())
    hbm = chip.hbm_bytes // chip.devices
    fits = costs is not None and sizes["total"] <= hbm
    tokens = config.data.rows * max(config.data.segments) * config.model.segment_tokens
    flops = {
        "model": tokens * flops_per_token(config.model, plan.shapes.params),
        "traced": _single_device_flops(plan, layout),
    }
    times: dict[str, float] = {}
    if costs is not None:
        flops["compiled"] = costs.flops * topology.devices
        bound = roofline_bound(costs, chip)
        times = {**bound._asdict(), "seconds": bound.seconds}
    return Report(
        preset=config.name,
        topology=str(topology),
        chips=topology.chips,
        devices=topology.devices,
        mesh=dict(layout.mesh.shape),
        rows=config.data.rows,
        segments=max(config.data.segments),
        segment_tokens=config.model.segment_tokens,
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(plan.shapes.params)),
        bytes=sizes,
        hbm_bytes=hbm,
        fits=fits,
        advice="" if fits else _advice(config, sizes),
        flops=flops,
        collectives=_collectives(costs),
        floor=times,
        unknown_loops=0 if costs is None else costs.unknown_loops,
        compile_seconds=time.monotonic() - started,
        quick=quick,
    )


def _device_bytes(tree: Any) -> int:
    """Bytes on one device of a tree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _collectives(costs: Costs | None) -> list[dict[str, Any]]:
    rows = [] if costs is None else [key._asdict() | traffic._asdict() for key, traffic in costs.collectives.items()]
    return sorted(rows, key=lambda row: -(row["ici_bytes"] + row["dcn_bytes"]))


def _does_not_fit(plan: Plan, layout: Layout, topology: Topology, message: str, started: float, quick: bool) -> Report:
    """The report of a program for which the compiler found too little memory; any other failure is a `UserError`."""
    state, batch = _arguments(plan, layout)
    arguments = _device_bytes(state) + _device_bytes(batch)
    if used := re.search(r"Used ([\d.]+)([KMGT]?)i?B? of ([\d.]+)([KMGT]?)i?B? hbm", message):
        temporaries = int(float(used[1]) * _UNITS[used[2]]) - arguments
    elif used := re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)i?B?\) exceeds available HBM", message):
        temporaries = int(float(used[1]) * _UNITS[used[2]])
    else:
        raise UserError(f"XLA cannot compile {plan.config.name} for {topology}: {message.strip()}", status=1)
    return _report(plan, layout, topology, {"temporaries": temporaries, "program": 0}, None, started, quick)


def _advice(config: RunConfig, sizes: dict[str, int]) -> str:
    """What to change to make the largest part smaller."""
    train_state = sizes["parameters"] + sizes["optimizer"]
    if sizes["temporaries"] >= max(train_state, sizes["state"]):
        words = ["a larger optim.accumulate (fewer rows at once)", "a larger mesh.fsdp, mesh.model or mesh.slots"]
        words += [] if config.model.remat == "full" else ["model.remat=full"]
        words += [f"a loss.time_chunk below {config.loss.time_chunk}"]
    elif train_state >= sizes["state"]:
        words = ["a larger mesh.fsdp or mesh.model", "model.precision.moments=bfloat16"]
    else:
        words = ["a larger mesh.fsdp or mesh.slots", "model.precision.state=bfloat16", "fewer data.rows"]
    return "try " + ", or ".join(words)


def describe(report: Report) -> str:
    """The report as a table."""
    mesh = " ".join(f"{name}={report.mesh.get(name, 1)}" for name in AXES)
    gib = {name: size / 2**30 for name, size in report.bytes.items()}
    fits = "fits" if report.fits else f"DOES NOT FIT: {report.advice}"
    lines = [
        f"{report.preset} on {report.topology}: {report.chips} chips, {report.devices} devices, mesh {mesh}",
        f"{report.parameters:,} parameters; {report.rows} rows x {report.segments} segments x "
        f"{report.segment_tokens} tokens per step; compiled in {report.compile_seconds:.0f} s",
        "",
        "bytes per device (GiB)",
        *(f"  {name:<12}{size:8.3f}" for name, size in gib.items()),
        f"  {'of':<12}{report.hbm_bytes / 2**30:8.3f}  {fits}",
        *_quick_warning(report),
        "",
        "matrix operations per step, all devices",
        f"  model       {report.flops['model']:.4g}   6 N per token, causal attention",
        f"  traced      {report.flops['traced']:.4g}   with the memory and recomputation",
    ]
    if "compiled" not in report.flops:
        return "\n".join(lines)
    share = report.flops["compiled"] / report.flops["traced"]
    lines += [f"  compiled    {report.flops['compiled']:.4g}   {share:.3f} of the traced", ""]
    lines += ["collectives per device and step     group slices    count     ICI MB     DCN MB"]
    for row in report.collectives:
        lines.append(
            f"  {row['kind']:<32}{row['size']:7}{row['slices']:7}{row['count']:9}"
            f"{row['ici_bytes'] / 1e6:11.2f}{row['dcn_bytes'] / 1e6:11.2f}"
        )
    total = [sum(row[name] for row in report.collectives) / 1e6 for name in ("ici_bytes", "dcn_bytes")]
    lines += [f"  {'all':<55}{total[0]:11.2f}{total[1]:11.2f}", ""]
    parts = ", ".join(f"{name} {1e3 * report.floor[name]:.1f}" for name in ("compute", "memory", "ici", "dcn"))
    lines += [f"lower bound on a step: {1e3 * report.floor['seconds']:.1f} ms, the largest of (ms) {parts}"]
    if report.unknown_loops:
        lines += [f"{report.unknown_loops} loops of unknown trip count are counted once"]
    return "\n".join(lines)


def _quick_warning(report: Report) -> list[str]:
    """Lines about what `--quick` does not see."""
    if not report.quick or "compiled" not in report.flops:
        return []
    most = report.bytes["total"] * (1 + QUICK_MORE_BYTES)
    verdict = "fits then too" if most <= report.hbm_bytes else "may not fit then: compile without --quick to know"
    return [
        f"  --quick: libtpu's first attempt. The final program may need up to {QUICK_MORE_BYTES:.0%} more memory",
        f"  ({most / 2**30:.3f} GiB, {verdict}) and {QUICK_MORE_TRAFFIC:.0%} more memory traffic; see docs/tpu.md.",
    ]
