"""Compiles a run's train step for TPU slices on a machine without TPUs, and tells what it costs."""

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from lm2_jax.config import RunConfig
from lm2_jax.errors import UserError
from lm2_jax.folders import prepare_file
from lm2_jax.model import LanguageModel
from lm2_jax.precision import prepare_numbers
from lm2_jax.sharding.costs import Costs, floor, program_costs
from lm2_jax.sharding.early import Early, optimised
from lm2_jax.sharding.hlo import parse
from lm2_jax.sharding.layout import Layout
from lm2_jax.sharding.mesh import AXES, MeshConfig, make_mesh
from lm2_jax.sharding.topology import Topology, compile_only_devices, parse_topology
from lm2_jax.training.fit import check_trainable
from lm2_jax.training.flops import traced_flops
from lm2_jax.training.objective import batch_shapes
from lm2_jax.training.progress import flops_per_token
from lm2_jax.training.state import Plan, make_plan
from lm2_jax.training.step import jit_train_step, make_train_step

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """What train.py compiles instead of training."""

    compile_only: bool = False
    """Compiles the train step for --topology, tells what it costs, and trains nothing; needs libtpu, but no TPU."""
    topology: str | None = None
    """TPU slice for --compile-only: v5e:16x16, v5p:8x8x8, v6e:4x4, tpu7x:4x4x4; several slices: 2xv5e:16x16."""
    json: str | None = None
    """File for what --compile-only tells, as JSON; -: the standard output, in place of the table."""
    hlo: str | None = None
    """File for the compiled program's text, which tells where each collective comes from."""
    quick: bool = False
    """Stops before machine code is written, which takes nearly all the time. Operations and collectives are those of
    the whole compilation, memory is that of libtpu's first attempt: docs/tpu.md."""

    def asked(self) -> bool:
        """Whether costs are wanted, not training."""
        if self.compile_only and self.topology is None:
            raise UserError("--compile-only needs --topology: which TPU slice to compile for, such as v5e:16x16")
        if not self.compile_only and (self.topology or self.json or self.hlo or self.quick):
            raise UserError("--topology, --json, --hlo and --quick go with --compile-only")
        return self.compile_only


@dataclasses.dataclass(frozen=True)
class Report:
    """What one call of the compiled train step costs; bytes and times are those of one device."""

    preset: str
    topology: str
    chips: int
    devices: int
    mesh: dict[str, int]
    rows: int
    segments: int
    segment_tokens: int
    parameters: int
    """In the model, on all devices together."""
    bytes: dict[str, int]
    """parameters, optimizer, state (carried memory), batch, temporaries, program; their sum is `total`."""
    hbm_bytes: int
    """Memory of one device."""
    fits: bool
    advice: str
    """What to change where it does not fit, else empty."""
    flops: dict[str, float]
    """Per step on all devices: `model` (6 N a token and causal attention), `traced` (all matrix products that the step
    asks for, recomputation included), `compiled` (what the devices do)."""
    collectives: list[dict[str, Any]]
    """By kind, size of the group and number of slices it spans: how many, bytes that a device sends."""
    floor: dict[str, float]
    """Seconds at least: compute, memory, ici, dcn, and the largest as `seconds`."""
    unknown_loops: int
    """Loops whose trip count could not be read; their bodies are counted once."""
    compile_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return dataclasses.asdict(self)


def compile_and_tell(config: RunConfig, mesh_for: Callable[[int], MeshConfig], compilation: CompileConfig) -> int:
    """`train.py --compile-only`.

    Args:
      config: of the run.
      mesh_for: the mesh for a number of devices.
      compilation: for what, and where to tell it.
    Returns:
      Exit status: 0, or 1 where the step does not fit into the slice's memory.
    """
    topology = parse_topology(compilation.topology or "")
    mesh = mesh_for(topology.devices)
    mesh.sizes(topology.devices)  # says what does not fit before anything is loaded
    for field, file in (("--json", compilation.json), ("--hlo", compilation.hlo)):
        if file is not None and (field, file) != ("--json", "-"):
            prepare_file(file, field)
    report = compile_only(config, mesh, topology, compilation.hlo, compilation.quick)
    if compilation.json != "-":
        print(describe(report))
    if compilation.json is not None:
        text = json.dumps(report.to_dict(), indent=1)
        print(text) if compilation.json == "-" else epath.Path(compilation.json).write_text(text + "\n")
    return 0 if report.fits else 1


def compile_only(
    config: RunConfig, mesh: MeshConfig, topology: Topology, hlo: str | None = None, quick: bool = False
) -> Report:
    """Compiles the train step that `train.py` would run on this slice, for the longest stage of its data.

    Args:
      config: of the run.
      mesh: sizes; must multiply to the number of devices.
      topology: what to compile for.
      hlo: file for the program's text, if wanted.
      quick: without code generation, see `early.optimised`; leave the process by `os._exit` then.
    Raises:
      UserError: libtpu is absent, or mesh, model and slice do not go together.
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
            return _too_large(plan, layout, topology, str(error), started)
    placed: Any = layout.mesh.devices
    slices = [getattr(device, "slice_index", None) or 0 for device in placed.flat]
    text = compiled.text if isinstance(compiled, Early) else compiled.as_text()
    if hlo is not None:
        epath.Path(hlo).write_text(text)
    costs = program_costs(parse(text), slices.__getitem__)
    extra = _besides(compiled, _device_bytes(state) + _device_bytes(batch))
    return _report(plan, layout, topology, extra, costs, started)


def _asked_flops(plan: Plan, layout: Layout) -> float:
    """Operations of a step as one device of this kind would be asked for them, so that nothing counts twice."""
    one: Any = layout.mesh.devices
    with Layout(make_mesh(MeshConfig(), one.flat[:1]), config=plan.config).context():
        return traced_flops(make_train_step(plan), plan.shapes, _batch_shapes(plan.config))


def _batch_shapes(config: RunConfig) -> Any:
    """A batch of the longest stage."""
    return batch_shapes(config.data.rows, max(config.data.segments), config.model.segment_tokens)


def _besides(compiled: Any, kept: int) -> dict[str, int]:
    """Bytes of a device that are not state or batch, of which it keeps `kept`."""
    if isinstance(compiled, Early):
        return {"temporaries": compiled.hbm_bytes - kept, "program": 0}
    memory: Any = compiled.memory_analysis()
    return {
        "temporaries": memory.temp_size_in_bytes + max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
        "program": memory.generated_code_size_in_bytes,
    }


def _arguments(plan: Plan, layout: Layout) -> tuple[Any, Any]:
    """State and batch of a step, as shapes that know where they lie."""

    def placed(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    batch = _batch_shapes(plan.config)
    rows = layout.shardings(jax.tree.map(lambda leaf: ("batch", *[None] * (leaf.ndim - 1)), batch), batch)
    return jax.tree.map(placed, plan.shapes, plan.shardings(layout)), jax.tree.map(placed, batch, rows)


def _report(
    plan: Plan,
    layout: Layout,
    topology: Topology,
    extra: dict[str, int],
    costs: Costs | None,
    started: float,
) -> Report:
    config, chip = plan.config, topology.chip
    state, batch = _arguments(plan, layout)
    sizes = {
        "parameters": _device_bytes(state.params),
        "optimizer": _device_bytes(state.opt_state),
        "state": _device_bytes(state.memory),
        "batch": _device_bytes(batch),
        **extra,
    }
    sizes["total"] = sum(sizes.values())
    hbm = chip.hbm_bytes // chip.devices
    tokens = config.data.rows * max(config.data.segments) * config.model.segment_tokens
    flops = {"model": tokens * flops_per_token(config.model, plan.shapes.params), "traced": _asked_flops(plan, layout)}
    times: dict[str, float] = {}
    if costs is not None:
        flops["compiled"] = costs.flops * topology.devices
        least = floor(costs, chip)
        times = {**least._asdict(), "seconds": least.seconds}
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
        fits=costs is not None and sizes["total"] <= hbm,
        advice="" if costs is not None and sizes["total"] <= hbm else _advice(config, sizes),
        flops=flops,
        collectives=_collectives(costs),
        floor=times,
        unknown_loops=0 if costs is None else costs.unknown_loops,
        compile_seconds=time.monotonic() - started,
    )


def _device_bytes(tree: Any) -> int:
    """On one device, of arrays that know where they lie."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _collectives(costs: Costs | None) -> list[dict[str, Any]]:
    rows = [] if costs is None else [key._asdict() | moved._asdict() for key, moved in costs.collectives.items()]
    return sorted(rows, key=lambda row: -(row["ici_bytes"] + row["dcn_bytes"]))


def _too_large(plan: Plan, layout: Layout, topology: Topology, message: str, started: float) -> Report:
    """The report where the compiler gives up for want of memory; any other failure is passed on in one line."""
    state, batch = _arguments(plan, layout)
    kept = _device_bytes(state) + _device_bytes(batch)
    if used := re.search(r"Used ([\d.]+)([KMGT]?)i?B? of ([\d.]+)([KMGT]?)i?B? hbm", message):
        temporaries = int(float(used[1]) * _UNITS[used[2]]) - kept
    elif used := re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)i?B?\) exceeds available HBM", message):
        temporaries = int(float(used[1]) * _UNITS[used[2]])
    else:
        raise UserError(f"XLA cannot compile {plan.config.name} for {topology}: {message.strip()}", status=1)
    extra = {"temporaries": temporaries, "program": 0}
    return _report(plan, layout, topology, extra, None, started)


def _advice(config: RunConfig, sizes: dict[str, int]) -> str:
    """What to change, for the largest part of what does not fit."""
    train_state = sizes["parameters"] + sizes["optimizer"]
    if sizes["temporaries"] >= max(train_state, sizes["state"]):
        words = ["a larger optim.accumulate (fewer rows at once)", "more mesh.fsdp, mesh.model or mesh.slots"]
        words += [] if config.model.remat == "full" else ["model.remat=full"]
        words += [f"a loss.time_chunk below {config.loss.time_chunk}"]
    elif train_state >= sizes["state"]:
        words = ["a larger mesh.fsdp or mesh.model", "model.precision.moments=bfloat16"]
    else:
        words = ["a larger mesh.fsdp or mesh.slots", "model.precision.state=bfloat16", "fewer data.rows"]
    return "try " + ", or ".join(words)


def describe(report: Report) -> str:
    """The report as a page of text."""
    mesh = " ".join(f"{name}={report.mesh.get(name, 1)}" for name in AXES)
    gib = {name: size / 2**30 for name, size in report.bytes.items()}
    fits = "fits" if report.fits else f"DOES NOT FIT: {report.advice}"
    lines = [
        f"{report.preset} on {report.topology}: {report.chips} chips, {report.devices} devices, mesh {mesh}",
        f"{report.parameters:,} parameters; {report.rows} rows x {report.segments} segments x "
        f"{report.segment_tokens} tokens a step; compiled in {report.compile_seconds:.0f} s",
        "",
        "bytes per device (GiB)",
        *(f"  {name:<12}{size:8.3f}" for name, size in gib.items()),
        f"  {'of':<12}{report.hbm_bytes / 2**30:8.3f}  {fits}",
        "",
        "matrix operations per step, all devices",
        f"  model       {report.flops['model']:.4g}   6 N a token, causal attention",
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
    lines += [f"least time of a step: {1e3 * report.floor['seconds']:.1f} ms, the largest of (ms) {parts}"]
    if report.unknown_loops:
        lines += [f"{report.unknown_loops} loops of unknown length are counted once"]
    return "\n".join(lines)
