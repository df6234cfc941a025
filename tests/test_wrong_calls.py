"""Over a hundred wrong calls of the programs: one message each, its status, a suggestion, and no files left over."""

import importlib.util
import json
import pathlib

import pytest

from lm2_jax import cli, commands
from lm2_jax.commands import call
from lm2_jax.commands.eval import main as evaluate
from lm2_jax.commands.train import main as train
from lm2_jax.memory_file import main as read_file

# Arguments of train.py, exit status, words of the message; {tmp} is an empty folder, {files} one of other files.
TRAIN = [
    # presets
    ("", 2, ["expected a preset", "--list"]),
    ("lm2_tinny", 2, ["Did you mean 'lm2_tiny'", "tiny: lm2_tiny", "published: lm2_1p7b"]),
    ("nothing_like_it", 2, ["unknown preset 'nothing_like_it'", "quickstart: quickstart"]),
    ("lm2_tiny rmt_tiny", 2, ["expected one preset, got lm2_tiny rmt_tiny"]),
    ("--optim.steps 4", 2, ["expected a preset"]),
    # options
    ("lm2_tiny --optim.lr 1", 2, ["--optim.lr", "--optim.learning-rate"]),
    ("lm2_tiny --lr 1", 2, ["--optim.learning-rate"]),
    ("lm2_tiny --optim.learning-rat 1", 2, ["Did you mean --optim.learning-rate"]),
    ("lm2_tiny --steps 3", 2, ["--optim.steps"]),
    ("lm2_tiny --batch-size 3", 2, ["Did you mean --data.rows"]),
    ("lm2_tiny --data.batch-size 3", 2, ["Did you mean --data.rows"]),
    ("lm2_tiny --work-dir x", 2, ["Did you mean --workdir"]),
    ("lm2_tiny --model.memory.num-slot 3", 2, ["--model.memory.num-slots"]),
    ("lm2_tiny --model.memory.num-tokens 3", 2, ["field of 'associative', 'tokens'", "add --model.memory associative"]),
    ("lm2_tiny --zzz", 2, ["--zzz: no such option", "--help"]),
    ("lm2_tiny --model.decoder 3", 2, ["--model.decoder is a group", "--model.decoder.width"]),
    ("lm2_tiny --no-optim.steps", 2, ["no such option"]),
    # values
    ("lm2_tiny --optim.steps abc", 2, ["--optim.steps: expected a whole number, got 'abc'"]),
    ("lm2_tiny --optim.steps 1.5", 2, ["--optim.steps", "whole number", "1.5"]),
    ("lm2_tiny --optim.steps", 2, ["--optim.steps: expected one value, got none"]),
    ("lm2_tiny --optim.steps 1 2", 2, ["--optim.steps: expected one value, got 2"]),
    ("lm2_tiny --optim.steps 1000000000000", 2, ["optim.steps", "at most 1,000,000,000"]),
    ("lm2_tiny --optim.learning-rate fast", 2, ["--optim.learning-rate: expected a number, got 'fast'"]),
    ("lm2_tiny --optim.learning-rate nan", 2, ["learning", "got nan"]),
    ("lm2_tiny --optim.learning-rate -1", 2, ["learning", "must", "-1.0"]),
    ("lm2_tiny --model.decoder.norm-epsilon inf", 2, ["--model.decoder.norm-epsilon", "got inf"]),
    ("lm2_tiny --data.rows 0", 2, ["--data.rows must be at least 1, got 0"]),
    ("lm2_tiny --data.segments 2,x", 2, ["--data.segments: expected a whole number, got 'x'"]),
    ("lm2_tiny --data.segments 2 0", 2, ["--data.segments must be at least 1, got (2, 0)"]),
    ("lm2_tiny --model.remat ful", 2, ["--model.remat", "Did you mean 'full'"]),
    ("lm2_tiny --data.carry-state maybe", 2, ["--data.carry-state: expected True or False, got 'maybe'"]),
    ("lm2_tiny --model.decoder.num-layers 1000000000", 2, ["num-layers must be at most 10,000"]),
    ("lm2_tiny --model.vocab-size 1000000000000", 2, ["--model.vocab-size must be at most"]),
    ("lm2_tiny --model.vocab-size 100000000 --model.decoder.width 100000", 1, ["TiB", "model.vocab_size"]),
    ("lm2_tiny --model.memory.num-slots 1000000 --data.rows 1000000", 1, ["of recurrent state", "data.rows"]),
    # kinds
    ("lm2_tiny --model.memory rtm", 2, ["unknown kind 'rtm'", "Did you mean 'rmt'", "titans"]),
    ("lm2_tiny --model.memory", 2, ["expected one kind of", "gated_bank"]),
    ("lm2_tiny --model.memory titans", 2, ["does not go with join 'residual'", "--model.join", "context"]),
    ("lm2_tiny --model.join contxt", 2, ["Did you mean 'context'"]),
    ("lm2_tiny --model.join plain", 2, ["model.memory or model.join"]),
    ("lm2_tiny --data.source text", 2, ["set --data.source.path"]),
    ("lm2_tiny --data.source txt", 2, ["Did you mean 'text'"]),
    # fields that do not go together
    ("lm2_tiny --data.rows 8 --optim.accumulate 3", 2, ["data.rows=8", "optim.accumulate=3"]),
    ("lm2_tiny --data.carry-state", 2, ["data.carry_state", "babilong"]),
    ("lm2_tiny --model.decoder.num-heads 5", 2, ["decoder.width=32", "decoder.num_heads=5"]),
    ("lm2_tiny --optim.steps 2", 2, ["optim.warmup_steps=2", "optim.steps=2"]),
    ("lm2_tiny --data.segments 2 4", 2, ["data.stage_steps"]),
    ("lm2_tiny --data.segments 1", 2, ["no gradient", "data.segments"]),
    ("rmt_tiny --data.source text --data.source.path x", 2, ["packed", "data.source.packing='ordered'"]),
    # files
    ("lm2_tiny --workdir=", 2, ["--workdir ''", "expected a path"]),
    ("lm2_tiny --name ../x", 2, ["name='../x'", "slash"]),
    ("lm2_tiny --workdir {files}", 2, ["holds other files (a.txt, b.txt, deep.json and 4 more)"]),
    ("lm2_tiny --workdir {files}/a.txt", 2, ["this is a file"]),
    ("lm2_tiny --workdir foo://x/y", 2, ["foo://x/y", "unknown kind of storage"]),
    ("lm2_tiny --config {tmp}/none.json", 2, ["--config", "none.json", "cannot be read"]),
    ("--config {files}/partial.json", 2, ["sets only some", "name the preset"]),
    ("lm2_tiny --config {files}/a.txt", 1, ["a.txt", "damaged"]),
    ("lm2_tiny --config {files}/deep.json", 1, ["deep.json", "nested too deep"]),
    ("lm2_tiny --config {files}/wrong.json", 1, ["unknown 'stepz'", "Did you mean 'steps'"]),
    ("lm2_tiny --config {files}/new.json", 1, ["format 99", "formats 1 to"]),
    ("lm2_tiny --config {files}/digits.json", 1, ["learning_rate", "over 30 digits"]),
    # what else a call may ask for
    ("lm2_tiny --mesh.data 3 --workdir {tmp}/w", 2, ["mesh.data=3", "devices"]),
    ("lm2_tiny --topology v5e:4x4", 2, ["--compile-only"]),
    ("lm2_tiny --profile {tmp}/p --profile-after 50", 2, ["--profile-after 50", "20 steps"]),
    ("lm2_tiny --profile {tmp}/p --profile-steps 0", 2, ["profile_steps=0"]),
]
EVAL = [
    ("", 2, ["expected a suite", "babilong"]),
    ("babilon --workdir x", 2, ["Did you mean 'babilong'"]),
    ("babilong", 2, ["set --workdir"]),
    ("babilong --workdir x --mesh.data 2.5", 2, ["--mesh.data: expected a whole number"]),
    ("babilong --workdir x --sample 3", 2, ["Did you mean --samples"]),
    ("babilong --workdir x --samples many", 2, ["--samples: expected a whole number"]),
]
# Of the other programs, as `lm2` calls them.
OTHERS = [
    ("trian", 2, ["no program 'trian'", "Did you mean 'train'"]),
    ("generate", 2, ["either --workdir W of a run, or --model"]),
    ("generate --workdir w --promt x", 2, ["--promt: no such option", "'--prompt'"]),
    ("generate --workdir w --top-k many", 2, ["--top-k: expected a whole number, got 'many'"]),
    ("generate --workdir w --temperature", 2, ["--temperature: expected one argument"]),
    ("generate --workdir w --prompt a --question b", 2, ["--question", "not allowed with", "--prompt"]),
    ("generate --workdir {tmp}/w --read {tmp}/none.txt", 2, ["none.txt"]),
    ("generate --workdir {tmp}/w --prompt a", 2, ["w"]),
    ("generate --workdir {tmp}/w --read {files}/a.txt --save-memory {tmp}/new/m", 2, ["w"]),
    ("import", 2, ["expected SOURCE, as in `"]),
    ("import {files}/a.txt", 2, ["set --workdir"]),
    ("import {files}/a.txt --workdir w --segment-token 3", 2, ["Did you mean --segment-tokens"]),
    ("import {files}/a.txt --workdir w --segment-tokens few", 2, ["--segment-tokens: expected a whole number"]),
    ("import {files}/a.txt --workdir w --dtype float16", 2, ["--dtype: expected one of", "'bfloat16'"]),
    ("import {files}/a.txt --workdir w --memory lm2_tyny", 2, ["--memory", "lm2_tiny"]),
    ("import {files}/a.txt {files}/b.txt --workdir w", 2, ["SOURCE: expected one value, got 2"]),
    ("import {tmp}/none --workdir {tmp}/w", 2, ["none"]),
    ("export --workdir w", 2, ["set --out"]),
    ("export --workdir w --outt o", 2, ["--outt: no such option", "Did you mean --out"]),
    ("export w --out o", 2, ["expected options (--name VALUE), got 'w'"]),
    ("export --workdir w --out o --shard-bytes 0", 2, ["--shard-bytes 0: expected a positive number"]),
    ("export --workdir {tmp}/w --out {tmp}/o", 2, ["w"]),
    ("compare --out o", 2, ["expected PRESETS"]),
    ("compare lm2_tiny", 2, ["set --out"]),
    ("compare lm2_tiny none_tyny --out o", 2, ["Did you mean 'none_tiny'"]),
    ("compare lm2_tiny --seed 3 --out o", 2, ["Did you mean --seeds"]),
    ("compare lm2_tiny lm2_tiny --out o", 2, ["named twice"]),
    ("compare lm2_tiny --out o --learning-rates fast", 2, ["--learning-rates: expected a number, got 'fast'"]),
    ("compare lm2_tiny --out o -- --optim.step 4", 2, ["Did you mean --optim.steps"]),
    ("convert --text {files}/a.txt", 2, ["set --out"]),
    ("convert --txt x --out o", 2, ["Did you mean --text"]),
    ("convert --out {tmp}/o", 2, ["give either --text or --tfds"]),
    ("convert --text {tmp}/none.txt --out {tmp}/o", 2, ["none.txt"]),
    ("inspect --workdir w", 2, ["arguments are required: --text, --out"]),
    ("inspect --workdir w --text {files}/a.txt --out o --quest x", 2, ["--quest: no such option", "'--question'"]),
    ("inspect --workdir {tmp}/w --text {files}/a.txt --out {tmp}/o", 2, ["w"]),
    ("list lm2", 2, ["lm2: no such option"]),
    ("demo --token 3", 2, ["--token: no such option", "'--tokens'"]),
    ("demo --tokens 10", 2, ["--tokens 10: expected at least 1000"]),
    ("quickstart --shrt", 2, ["--shrt: no such option", "'--short'"]),
]
MEMORY_FILE = [
    ("", 2, ["command"]),
    ("look m", 2, ["expected one of ['inspect', 'diff', 'export', 'merge'], got 'look'"]),
    ("inspct m", 2, ["Did you mean 'inspect'"]),
    ("inspect {tmp}/none", 2, ["none"]),
    ("inspect {files}/a.txt", 1, ["a.txt"]),
    ("export {files}/a.txt --out {tmp}/new/a.npz", 1, ["a.txt"]),
    ("merge {files}/a.txt {files}/b.txt --workdir {tmp}/w --out {tmp}/new/m", 1, ["a.txt"]),
    ("export {files}/a.txt --outt o", 2, ["--outt: no such option", "'--out'"]),
]

PROGRAMS = {
    "train": (train, TRAIN), "eval": (evaluate, EVAL), "lm2": (call, OTHERS), "memory_file": (read_file, MEMORY_FILE)
}  # fmt: skip


@pytest.fixture
def folders(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An empty folder to work in, and one with files that are no run."""
    files = tmp_path / "files"
    files.mkdir()
    (files / "a.txt").write_text("no config")
    (files / "b.txt").write_text("")
    (files / "partial.json").write_text(json.dumps({"optim": {"steps": 7}}))
    (files / "wrong.json").write_text(json.dumps({"optim": {"stepz": 7}}))
    (files / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    (files / "new.json").write_text(json.dumps({"format": 99, "optim": {}}))
    (files / "digits.json").write_text('{"optim": {"learning_rate": ' + "9" * 400 + "}}")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return {"tmp": str(work), "files": str(files)}


def refuse(program, words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: program(words))
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


@pytest.mark.parametrize(
    ("program", "line", "status", "words"),
    [(program, *row) for program, table in PROGRAMS.values() for row in table],
    ids=[f"{name} {row[0]}" for name, (_, table) in PROGRAMS.items() for row in table],
)
def test_a_wrong_call_is_one_message(program, line, status, words, folders, capsys):
    before = sorted(pathlib.Path(folders["files"]).iterdir())
    code, out, err = refuse(program, line.format(**folders).split(), capsys)
    assert code == status, err
    assert err.startswith("error: ")
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    assert not out
    missing = [word for word in words if word not in err]
    assert not missing, err
    assert not list(pathlib.Path(folders["tmp"]).iterdir()), "a refused call leaves no files"
    assert sorted(pathlib.Path(folders["files"]).iterdir()) == before


@pytest.mark.parametrize(("scheme", "library"), [("gs", "gcsfs"), ("s3", "s3fs")])
@pytest.mark.parametrize("flag", ["--workdir", "--config", "--dump-config"])
def test_a_bucket_without_its_library_is_one_message(scheme, library, flag, folders, capsys):
    if importlib.util.find_spec(library):
        pytest.skip(f"{library} is installed")
    code, _, err = refuse(train, ["lm2_tiny", flag, f"{scheme}://bucket/run"], capsys)
    assert code == 2
    extra = {"gs": "etils[epath-gcs]", "s3": "etils[epath-s3]"}[scheme]
    assert err == f"error: {flag} {scheme}://bucket/run: needs a library; install it with `pip install '{extra}'`\n"


def test_a_bucket_that_cannot_be_reached_is_one_message(monkeypatch, folders, capsys):
    def fail(path):
        raise ConnectionError("Cannot connect to host storage\nmore lines")

    monkeypatch.setattr("etils.epath.Path", lambda path: type("Bucket", (), {"exists": fail})())
    code, _, err = refuse(train, ["lm2_tiny", "--workdir", "gs://bucket/run"], capsys)
    assert (code, err) == (
        1, "error: --workdir gs://bucket/run: cannot be reached: Cannot connect to host storage\n"
    )  # fmt: skip


def test_there_are_many():
    assert len(TRAIN) + len(EVAL) >= 60
    called = {row[0].split()[0] for row in OTHERS}
    assert {"train", "eval"} | called >= set(commands.PROGRAMS), "a program without a wrong call"
