"""The run and the options that a command line of train.py makes; tests/e2e calls the program itself."""

import dataclasses
import itertools
import json
import pathlib
import sys

import pytest
from etils import epath

import lm2_jax
from lm2_jax.blocks.context import ContextJoin
from lm2_jax.blocks.tokens import TokensJoin
from lm2_jax.commands import eval as evaluate
from lm2_jax.commands import files, train
from lm2_jax.commands.usage import field_docs
from lm2_jax.config import RunConfig, from_dict, to_dict
from lm2_jax.decoder import DecoderConfig
from lm2_jax.errors import UserError
from lm2_jax.fields import config_classes, hints
from lm2_jax.memory.titans import TitansConfig
from lm2_jax.memory.tokens import TokensConfig
from lm2_jax.presets import mesh_for
from lm2_jax.rope import Llama3Scaling, YarnScaling
from lm2_jax.sharding import MeshConfig


def run_of(line: str) -> RunConfig:
    command = train.parse(line.split())
    assert command is not None
    return command.run


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], mesh_for("lm2_1p7b", 16)),
        (["--mesh.data", "-1"], MeshConfig()),
        (["--mesh.fsdp=4"], MeshConfig(fsdp=4)),
    ],
)
def test_the_mesh_of_a_preset_is_taken_where_none_is_asked_for(monkeypatch, words, expected):
    """Even where the one that is asked for is the default."""
    meshes = []

    def tell(run, mesh, compilation):
        meshes.append(mesh(16))
        return 0

    monkeypatch.setattr(train, "compile_and_report", tell)
    monkeypatch.setattr(train.os, "_exit", sys.exit)
    arguments = ["lm2_1p7b", *words, "--compile-only", "--topology", "v5e:4x4"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit):
        train.main()
    assert meshes == [expected]
    assert mesh_for("lm2_1p7b", 16) != MeshConfig()


def test_fields_are_set_by_their_flags():
    run = run_of(
        "lm2_tiny --optim.learning-rate 1e-3 --optim.clip_norm inf --data.segments 2 4 --data.stage-steps 5 "
        "--data.vary-segments --model.decoder.no-tie-head --model.join.layers 1 --model.memory.top-k=2 --name a"
    )
    assert (run.optim.learning_rate, run.optim.clip_norm) == (1e-3, float("inf"))
    assert (run.data.segments, run.data.stage_steps, run.data.vary_segments) == ((2, 4), (5,), True)
    assert not run.model.decoder.tie_head
    assert (run.model.join.layers, run.model.memory.top_k, run.name) == ((1,), 2, "a")  # pyright: ignore[reportAttributeAccessIssue]


def test_the_last_of_two_equal_flags_counts():
    assert run_of("lm2_tiny --optim.steps 7 --optim.steps 9").optim.steps == 9


@pytest.mark.parametrize("word", ["False", "false"])
def test_a_flag_is_switched_off(word):
    assert not run_of(f"quickstart --model.decoder.tie-head {word}").model.decoder.tie_head


def test_none_and_groups_that_may_be_none():
    assert run_of("lm2_tiny --train.bptt-segments None").train.bptt_segments is None
    scaling = run_of("lm2_tiny --model.decoder.rope-scaling.factor 4").model.decoder.rope_scaling
    assert scaling == Llama3Scaling(factor=4.0)
    assert run_of("lm2_1p7b --model.decoder.rope-scaling None").model.decoder.rope_scaling is None
    yarn = run_of("lm2_tiny --model.decoder.rope-scaling yarn --model.decoder.rope-scaling.beta-fast 8").model
    assert yarn.decoder.rope_scaling == YarnScaling(beta_fast=8.0)
    with pytest.raises(UserError, match=r"field of 'yarn', but --model.decoder.rope-scaling is 'None'; add --model"):
        run_of("lm2_tiny --model.decoder.rope-scaling.beta-fast 8")


def test_parts_are_set_by_number():
    join = run_of("hybrid_tiny --model.join.parts.0.memory.num-slots 3").model.join
    assert join.parts[0].memory.num_slots == 3  # pyright: ignore[reportAttributeAccessIssue]


def test_a_kind_by_flag_keeps_the_fields_that_both_have(capsys):
    run = run_of("lm2_tiny --model.memory.num-heads 2 --model.memory titans --model.join context")
    assert run.model.memory == TitansConfig(num_heads=2)
    assert run.model.join == ContextJoin()


@pytest.mark.parametrize("name", ["rmt", "tokens"])
def test_the_only_join_of_a_memory_comes_with_it(name, capsys):
    run = run_of(f"lm2_tiny --model.memory {name} --model.memory.num-tokens 3")
    assert (run.model.memory, run.model.join) == (TokensConfig(num_tokens=3), TokensJoin())
    assert "--model.join tokens" in capsys.readouterr().err


def test_a_join_that_fits_stays():
    line = "titans_residual_tiny --model.memory gated_bank"
    assert run_of(line).model.join == lm2_jax.preset("titans_residual_tiny").model.join


def test_the_order_of_flags_does_not_matter():
    """Kinds decide which fields there are, and are chosen first, the outer ones before the inner ones."""
    words = ["--model.memory gated_bank", "--model.memory.write slots", "--model.memory.num-slots 3"]
    runs = [run_of(f"titans_residual_tiny {' '.join(order)}") for order in itertools.permutations(words)]
    assert all(run == runs[0] for run in runs)
    assert (runs[0].model.memory.num_slots, runs[0].model.memory.write.kind) == (3, "slots")  # pyright: ignore[reportAttributeAccessIssue]


def test_other_kinds_by_flag(tmp_path):
    run = run_of("lm2_tiny --data.source text --data.source.path x --data.tokenizer bytes --model.memory.write slots")
    assert (run.data.source.kind, run.data.source.path) == ("text", "x")  # pyright: ignore[reportAttributeAccessIssue]
    assert run.data.tokenizer.kind == "bytes"
    assert run.model.memory.write.kind == "slots"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", sorted(lm2_jax.PRESETS))
def test_a_preset_without_flags_is_itself(name):
    assert run_of(name) == lm2_jax.preset(name)


def test_a_dumped_config_is_an_equal_run_elsewhere(tmp_path, capsys):
    line = "titans_mac_tiny --optim.steps 7 --model.memory.step.maximum 0.2"
    train.main([*line.split(), "--dump-config", f"{tmp_path}/a.json"])
    assert run_of(f"--config {tmp_path}/a.json") == run_of(line)
    train.main([*line.split(), "--dump-config"])
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "a.json").read_text())


def test_a_config_file_may_be_partial_and_flags_come_after_it(tmp_path):
    (tmp_path / "part.yaml").write_text(
        "model:\n  memory: {kind: titans, step: {maximum: 2e-1}}\n  join: {kind: context}\noptim: {steps: 9}\n"
    )
    run = run_of(f"lm2_tiny --config {tmp_path}/part.yaml --optim.steps 11")
    assert run.model.memory == run_of("lm2_tiny --model.memory titans --model.join context "
                                      "--model.memory.step.maximum 0.2").model.memory  # fmt: skip
    assert run.optim.steps == 11
    (tmp_path / "named.json").write_text(json.dumps({"name": "rmt_tiny", "optim": {"steps": 5}}))
    assert run_of(f"--config {tmp_path}/named.json").model == lm2_jax.preset("rmt_tiny").model


def test_a_config_of_an_older_version_starts_a_run():
    path = pathlib.Path(__file__).parent / "golden" / "config_format1" / "rmt_tiny.json"
    assert run_of(f"--config {path}") == lm2_jax.preset("rmt_tiny")


def test_own_text_comes_before_other_flags(monkeypatch):
    from lm2_jax.commands import train as program

    def text_run(run, path):
        return dataclasses.replace(run, name=f"{run.name}_{path}", data=dataclasses.replace(run.data, rows=2))

    monkeypatch.setattr(program, "own_text", lambda: text_run)
    run = run_of("lm2_tiny --text books --data.rows 4")
    assert (run.name, run.data.rows) == ("lm2_tiny_books", 4)


def test_help_shows_each_option_once_and_the_most_used_first(capsys):
    assert train.parse(["hybrid_tiny", "--help"]) is None
    shown = capsys.readouterr().out
    first, _, rest = shown.partition("this call:")
    assert first.count("--") == 11  # ten, and the usage
    for flag in ("--model.join.parts.1.memory.step.maximum", "--mesh.fsdp", "--init.from", "--profile-after"):
        assert rest.count(f"{flag} ") == 1, flag


def test_help_shows_the_fields_of_the_kinds_that_are_chosen(capsys):
    assert train.parse("lm2_tiny --model.memory titans --data.source text --optim.steps 7 --help".split()) is None
    shown = capsys.readouterr().out
    assert "--model.memory.step.maximum FLOAT" in shown
    assert "--model.memory.num-slots" not in shown
    assert "--data.source.path" in shown
    assert shown.count("--optim.steps INT  (now 7)") == 2  # among the most used, too


def test_help_shows_the_join_that_comes_with_a_memory(capsys):
    assert train.parse("lm2_tiny --help --model.memory tokens".split()) is None
    assert "(now tokens)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "flag", "messages"),
    [
        ("--model.memory titans --model.memory.num-hedas 2", "--model.memory.step.maximum",
         ["--model.memory.num-hedas: no such option. Did you mean --model.memory.num-heads"]),
        ("--model.memroy titans --optim.lr 1", "--model.memory.num-slots",
         ["--model.memroy: no such option. Did you mean --model.memory?", "Did you mean --optim.learning-rate"]),
        ("--model.memory:titans", "--model.memory.num-slots", ["Did you mean --model.memory titans?"]),
        ("--model.memory titan", "--model.memory.num-slots", ["unknown kind 'titan'"]),
    ],
)  # fmt: skip
def test_help_with_wrong_flags_is_shown_and_names_them_at_its_end(capsys, line, flag, messages):
    with pytest.raises(UserError) as caught:
        train.parse(["lm2_tiny", *line.split(), "--help"])
    assert f"  {flag} " in capsys.readouterr().out
    assert caught.value.status == 2
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_without_a_preset_lists_all(word, capsys):
    assert train.parse([word]) is None
    shown = capsys.readouterr().out
    assert all(name in shown for name in lm2_jax.PRESETS)
    assert "--config" in shown


def test_every_option_has_a_docstring():
    ours = [cls for cls in config_classes() if cls.__module__.startswith("lm2_jax.")]  # other tests define kinds, too
    classes = [*ours, train.TrainOptions, train.InitConfig, train.CompileConfig, train.ProfileConfig]
    missing = [f"{cls.__name__}.{name}" for cls in classes for name in hints(cls) if not field_docs(cls).get(name)]
    assert not missing


def test_the_list_has_every_preset(capsys):
    assert train.parse(["--list"]) is None
    lines = capsys.readouterr().out.splitlines()
    for name in lm2_jax.PRESETS:
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert len(line) < 130


# Advice of messages: a call that is refused, and what the message says to add.
ADVICE = [
    ("lm2_tiny --model.memory titans", "--model.join context"),
    ("lm2_tiny --model.memory.num-tokens 3", "--model.memory tokens"),
    ("lm2_tiny --data.source text", "--data.source.path x"),
    ("rmt_tiny --data.source text --data.source.path x", "--data.source.packing ordered"),
    ("lm2_tiny --data.source text --data.source.path x --data.carry-state", "--data.source.packing ordered"),
    ("lm2_tiny --data.segments 2 4", "--data.stage-steps 5"),
    ("lm2_tiny --data.segments 1", "--data.segments 2"),
    ("lm2_tiny --model.decoder.num-heads 6 --model.decoder.num-kv-heads 3", "--model.decoder.head-width 8"),
    ("lm2_tiny --model.join plain", "--model.memory none"),
    ("lm2_tiny --data.source text --data.source.path x --data.source.packing ordered --data.fill-rows",
     "--data.no-fill-rows"),
    ("lm2_tiny --optim.steps 2", "--optim.warmup-steps 1"),
    ("lm2_tiny --data.rows 8 --optim.accumulate 3", "--data.rows 9"),
    ("lm2_tiny --optim.clip-norm 0", "--optim.clip-norm inf"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "advice"), ADVICE)
def test_advice_in_messages_works(line, advice, capsys):
    with pytest.raises(UserError) as caught:
        run_of(line)
    message = str(caught.value).replace("_", "-")
    for word in advice.split()[::2]:
        last = word.removeprefix("--").removeprefix("data.no-").rpartition(".")[2]
        assert last in message, "the message names the field to change"
    run_of(f"{line} {advice}")


def saved_run(folder: pathlib.Path) -> pathlib.Path:
    workdir = folder / "w"
    (workdir / "checkpoints" / "20").mkdir(parents=True)
    (workdir / "config.json").write_text('{"model": {}, "data": {}, "optim": {}, "train": {}}')
    return workdir


def test_overwrite_asks(tmp_path, monkeypatch):
    workdir = files.check_workdir(str(saved_run(tmp_path)))
    files.confirm_overwrite(workdir, yes=True, distributed=False)
    files.confirm_overwrite(files.check_workdir(str(tmp_path / "new")), yes=False, distributed=False)
    with pytest.raises(UserError, match="add --yes"):
        files.confirm_overwrite(workdir, yes=False, distributed=False)
    with pytest.raises(UserError, match="on one host"):
        files.confirm_overwrite(workdir, yes=True, distributed=True)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    with pytest.raises(UserError, match="not confirmed"):
        files.confirm_overwrite(workdir, yes=False, distributed=False)
    assert (workdir / "checkpoints" / "20").exists()


def test_init_from_is_passed_on(monkeypatch, tmp_path):
    given = {}

    def record(run, workdir, layout, profiling, init_from, overwrite):
        given.update(init_from=init_from, overwrite=overwrite)
        raise UserError("stop")

    monkeypatch.setattr(train, "fit", record)
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    other = str(tmp_path / "a")
    for words, expected in (
        (["--init.from", other], {"init_from": other, "overwrite": False}),
        (["--overwrite"], {"init_from": None, "overwrite": True}),
    ):
        with pytest.raises(UserError, match="stop"):
            train.main(["lm2_tiny", "--workdir", str(tmp_path / "w"), "--mesh.data", "8", *words])
        assert given == expected


def test_a_picture_that_cannot_be_written_is_reported_and_no_more(tmp_path, capsys):
    """The run is saved before its curves are drawn."""
    run = lm2_jax.preset("lm2_tiny")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    train._draw(epath.Path(tmp_path), run)
    assert capsys.readouterr().out == f"Curves of the training: {tmp_path / 'curves.png'}\n"
    (tmp_path / "curves.png").unlink()
    (tmp_path / "curves.png").mkdir()
    train._draw(epath.Path(tmp_path), run)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("curves.png: writing failed: ")


def test_an_absurd_size_is_refused_before_anything_is_made():
    from lm2_jax.footprint import lower_bound

    model = dataclasses.replace(lm2_jax.preset("lm2_tiny").model, decoder=DecoderConfig(num_layers=10_000))
    needs = lower_bound(dataclasses.replace(lm2_jax.preset("lm2_tiny"), model=model))
    parameters = next(value for name, value in needs.items() if name.startswith("parameters"))
    assert parameters > 10_000 * 4 * 64 * 64 * 16


def test_the_lower_bound_is_one():
    """It is at most what the preset's own plan has in parameters."""
    from lm2_jax.commands.overview import count_parameters
    from lm2_jax.footprint import lower_bound

    for name in ("lm2_tiny", "titans_mac_tiny"):
        run = lm2_jax.preset(name)
        first = next(iter(lower_bound(run).values()))
        assert first <= 16 * count_parameters(run.model) < 4 * first


def test_an_evaluation_that_cannot_fit_is_refused_before_anything_is_read(tmp_path):
    run = lm2_jax.preset("lm2_tiny")
    huge = dataclasses.replace(run.model.decoder, num_layers=100, mlp_width=2**20, width=2**14)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=huge))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(run)))
    with pytest.raises(UserError, match=r"evaluating lm2_tiny needs at least .*TiB.*--mesh") as caught:
        evaluate.main(["recall", "--workdirs", str(tmp_path)])
    assert caught.value.status == 1


def test_a_dictionary_is_not_changed_by_reading_it():
    plain = to_dict(lm2_jax.preset("lm2_tiny"))
    before = json.dumps(plain)
    from_dict(RunConfig, plain)
    assert json.dumps(plain) == before
