"""`train.py --compile-only`: what it refuses, its report, and real compilation if libtpu is installed."""

import dataclasses
import importlib.util
import json
import re

import jax
import pytest

import lm2_jax
from lm2_jax.aot import compile_only
from lm2_jax.aot.compile_only import CompileConfig, Report, compile_and_report, describe
from lm2_jax.aot.topology import parse_topology
from lm2_jax.errors import UserError
from lm2_jax.memory.tokens import TokensConfig
from lm2_jax.sharding import MeshConfig, make_mesh

RUN = lm2_jax.preset("lm2_tiny")
REPORT = Report(
    preset="lm2_tiny",
    topology="2xv5e:2x2",
    chips=8,
    devices=8,
    mesh={"data": 8, "fsdp": 1, "model": 1, "slots": 1},
    rows=8,
    segments=2,
    segment_tokens=32,
    parameters=12345,
    bytes={"parameters": 2**30, "temporaries": 2**31, "total": 3 * 2**30},
    hbm_bytes=2**34,
    fits=True,
    advice="",
    flops={"model": 1e12, "traced": 2e12, "compiled": 2.2e12},
    collectives=[{"kind": "all-reduce", "size": 8, "slices": 2, "count": 3, "ici_bytes": 5e6, "dcn_bytes": 7e6}],
    floor={"compute": 0.01, "memory": 0.02, "ici": 0.03, "dcn": 0.04, "seconds": 0.04},
    unknown_loops=0,
    compile_seconds=12.0,
)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CompileConfig(compile_only=True), "--compile-only needs --topology"),
        (CompileConfig(topology="v5e:2x2"), "need --compile-only"),
        (CompileConfig(json="x"), "need --compile-only"),
        (CompileConfig(quick=True), "need --compile-only"),
    ],
)
def test_options_that_do_not_go_together(config, words):
    with pytest.raises(UserError, match=words):
        config.is_requested()
    assert CompileConfig(compile_only=True, topology="v5e:2x2").is_requested()
    assert not CompileConfig().is_requested()


@pytest.mark.parametrize(
    ("topology", "mesh", "words"),
    [
        ("v5e:3x3", MeshConfig(), "there is no slice 'v5e:3x3'"),
        ("v5e:2x2", MeshConfig(data=3), "multiply to 3, but there are 4 devices"),
        ("tpu7x:2x2x1", MeshConfig(data=4), "multiply to 4, but there are 8 devices"),
    ],
)
def test_a_mesh_or_slice_that_cannot_be_is_refused_before_libtpu_is_asked(monkeypatch, topology, mesh, words):
    monkeypatch.setattr(compile_only, "compile_only_devices", None)
    with pytest.raises(UserError, match=words) as caught:
        compile_and_report(RUN, lambda devices: mesh, CompileConfig(compile_only=True, topology=topology))
    assert caught.value.status == 2


@pytest.mark.parametrize("field", ["json", "hlo"])
def test_a_file_that_cannot_be_written_is_found_out_before_compiling(monkeypatch, tmp_path, field):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(compile_only, "compile_only", None)
    config = CompileConfig(compile_only=True, topology="v5e:2x2", **{field: str(tmp_path / "file" / "x")})
    with pytest.raises(UserError, match=f"--{field}=.*cannot write there"):
        compile_and_report(RUN, lambda devices: MeshConfig(), config)


def test_what_training_refuses_is_refused_before_compiling(monkeypatch):
    monkeypatch.setattr(compile_only, "compile_only_devices", lambda topology: jax.devices()[:4])
    run = lm2_jax.preset("rmt_tiny")
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, memory=TokensConfig(num_tokens=4)))
    with pytest.raises(UserError, match=r"join 'tokens' adds memory tokens to a segment.*mesh\.slots to 1"):
        compile_only.compile_only(run, MeshConfig(data=2, slots=2), parse_topology("v5e:2x2"))


def test_the_table_names_every_number():
    text = describe(REPORT)
    for words in (
        "lm2_tiny on 2xv5e:2x2: 8 chips",
        "mesh data=8 fsdp=1 model=1 slots=1",
        "3.000",
        "16.000  fits",
        "1.100 of the traced",
        "lower bound on a step: 40.0 ms",
    ):
        assert words in text
    row = next(line for line in text.splitlines() if "all-reduce" in line)
    assert row.split() == ["all-reduce", "8", "2", "3", "5.00", "7.00"]
    large = dataclasses.replace(REPORT, fits=False, advice="try less", flops={"model": 1.0, "traced": 1.0})
    assert "DOES NOT FIT: try less" in describe(large)


@pytest.mark.parametrize(
    ("gib", "words"), [(12, "fits then too"), (13, "may not fit then: compile without --quick to know")]
)
def test_a_quick_report_says_that_it_is_a_first_attempt(gib, words):
    assert "--quick" not in describe(REPORT)
    quick = dataclasses.replace(REPORT, quick=True, bytes={"total": gib * 2**30})
    text = describe(quick)
    assert "first attempt. The final program may need up to 31% more memory" in text
    assert f"({gib * 1.31:.3f} GiB, {words})" in text
    assert "34% more memory traffic" in text


@pytest.mark.parametrize(("fits", "status"), [(True, 0), (False, 1)])
def test_json_and_exit_status(monkeypatch, capsys, tmp_path, fits, status):
    monkeypatch.setattr(compile_only, "compile_only", lambda *_: dataclasses.replace(REPORT, fits=fits))
    file = tmp_path / "new" / "costs.json"
    config = CompileConfig(compile_only=True, topology="v5e:2x2", json=str(file))
    assert compile_and_report(RUN, lambda devices: MeshConfig(), config) == status
    assert "lower bound" in capsys.readouterr().out
    assert json.loads(file.read_text())["bytes"]["temporaries"] == 2**31
    assert compile_and_report(RUN, lambda devices: MeshConfig(), dataclasses.replace(config, json="-")) == status
    assert json.loads(capsys.readouterr().out)["fits"] is fits


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"parameters": 1, "optimizer": 1, "state": 1, "temporaries": 9}, "optim.accumulate.*model.remat=full"),
        ({"parameters": 3, "optimizer": 6, "state": 1, "temporaries": 2}, "mesh.fsdp.*moments"),
        ({"parameters": 1, "optimizer": 2, "state": 9, "temporaries": 2}, "mesh.slots.*precision.state"),
    ],
)
def test_advice_is_about_what_is_largest(sizes, words):
    assert re.search(words, compile_only._advice(RUN, sizes))


@pytest.fixture
def libtpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install -r requirements-tpu.txt")


@pytest.mark.tpu_backend
@pytest.mark.parametrize(
    ("preset", "topology", "mesh"),
    [
        ("lm2_paper_tiny", "v5e:2x2", MeshConfig(data=2, fsdp=2)),
        ("lm2_tiny", "v5e:4x4", MeshConfig(data=2, fsdp=2, model=2, slots=2)),
        ("rmt_tiny", "v5e:1x1", MeshConfig()),
        ("none_tiny", "2xv5e:2x2", MeshConfig(data=2, fsdp=4)),
        ("none_tiny", "tpu7x:2x2x1", MeshConfig()),
    ],
)
def test_a_tiny_preset_compiles(libtpu, preset, topology, mesh):
    topology = parse_topology(topology)
    report = compile_only.compile_only(lm2_jax.preset(preset), mesh, topology)
    assert report.fits
    assert report.unknown_loops == 0
    assert 0.8 < report.flops["compiled"] / report.flops["traced"] < 1.1
    devices = {row["size"] for row in report.collectives}
    assert devices <= set(range(1, topology.devices + 1))
    assert bool(report.collectives) == (topology.devices > 1)
    assert (sum(row["dcn_bytes"] for row in report.collectives) > 0) == (topology.slices > 1)


@pytest.mark.tpu_backend
@pytest.mark.parametrize(
    ("topology", "mesh"),
    [("v5p:4x8x8", MeshConfig(data=16, fsdp=16)), ("v5e:16x16", MeshConfig(data=1, fsdp=64, slots=4))],
)
def test_a_mesh_may_split_the_axes_of_a_torus(libtpu, topology, mesh):
    devices = compile_only.compile_only_devices(parse_topology(topology))
    placed = make_mesh(mesh, devices).devices
    assert placed.shape == (mesh.data, mesh.fsdp, mesh.model, mesh.slots)
    assert len({device.id for device in placed.flat}) == len(devices)


@pytest.mark.tpu_backend
def test_attention_takes_the_kernel_and_its_operations_count(libtpu):
    run = lm2_jax.preset("none_tiny")
    decoder = dataclasses.replace(run.model.decoder, attention_kernel="splash")
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=decoder, segment_tokens=256))
    report = compile_only.compile_only(run, MeshConfig(data=2, model=2), parse_topology("v5e:2x2"))
    plain = dataclasses.replace(decoder, attention_kernel="plain")
    plain = dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=plain))
    expected = compile_only.compile_only(plain, MeshConfig(data=2, model=2), parse_topology("v5e:2x2"))
    assert 0.9 < report.flops["compiled"] / report.flops["traced"] < 1.1
    # Forward and backward are 2 + 3 + 4 products of T x T where the plain form has 2 + 4.
    assert 1.0 < report.flops["compiled"] / expected.flops["compiled"] < 9 / 6


@pytest.mark.tpu_backend
def test_a_program_without_code_costs_the_same(libtpu):
    run, mesh, topology = lm2_jax.preset("lm2_paper_tiny"), MeshConfig(data=1, fsdp=4), parse_topology("v5e:2x2")
    complete, quick = (compile_only.compile_only(run, mesh, topology, quick=quick) for quick in (False, True))
    assert quick.flops == complete.flops
    assert quick.collectives == complete.collectives
    assert quick.bytes["program"] == 0 < complete.bytes["program"]
    arguments = sum(complete.bytes[name] for name in ("parameters", "optimizer", "state", "batch"))
    assert arguments < quick.bytes["total"] < complete.bytes["total"]


@pytest.mark.tpu_backend
def test_copies_of_the_model_add_little_to_what_a_chip_sends(libtpu):
    sent = []
    for data, topology in ((1, "v5p:2x2x4"), (4, "v5p:4x4x4")):
        run = lm2_jax.preset("lm2_paper_tiny")
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, rows=16 * data))
        report = compile_only.compile_only(run, MeshConfig(data=data, fsdp=16), parse_topology(topology))
        sent.append(sum(row["ici_bytes"] for row in report.collectives))
    assert 1.0 <= sent[1] / sent[0] <= 1.08


@pytest.mark.tpu_backend
def test_what_does_not_fit_is_reported_with_advice(libtpu):
    run = dataclasses.replace(RUN, data=dataclasses.replace(RUN.data, rows=2**16, segments=(8,)))
    report = compile_only.compile_only(run, MeshConfig(), parse_topology("v5e:1x1"))
    assert not report.fits
    assert report.bytes["total"] > report.hbm_bytes
    assert "optim.accumulate" in report.advice
