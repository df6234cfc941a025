"""An imported model is a run: it is resumed, evaluated, exported, and never half there."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import lm2_jax
from lm2_jax.commands import import_hf
from lm2_jax.config import RunConfig
from lm2_jax.data.own_text import own_text
from lm2_jax.errors import UserError
from lm2_jax.interop import export_hf
from lm2_jax.interop.export import export_workdir
from lm2_jax.interop.open_source import open_source
from lm2_jax.interop.pretrained import from_pretrained
from lm2_jax.interop.workdir import import_source
from lm2_jax.presets import PRESETS
from lm2_jax.runs import load_run
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from lm2_jax.training.fit import fit
from tests.interop.folders import TINY, hf_folder

ROOT = Path(__file__).parents[2]


def layout() -> Layout:
    return Layout(make_mesh(MeshConfig(), jax.devices()[:1]))


def equal(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A plain decoder and one with a memory."""
    folder = tmp_path_factory.mktemp("imported")
    source = open_source(hf_folder(folder / "hf"))
    import_source(source, folder / "plain", layout(), PRESETS["none_tiny"], segment_tokens=32)
    import_source(source, folder / "lm2", layout(), PRESETS["lm2_tiny"], PRESETS["lm2_tiny"], segment_tokens=32)
    return folder


def test_the_weights_of_the_run_are_those_of_the_checkpoint(imported):
    run = load_run(imported / "plain")
    assert run.step == 0
    equal(run.params, from_pretrained(imported / "hf").params)
    assert run.tokenizer.decode(run.tokenizer.encode("Ein Text.")) == "Ein Text."
    assert "messages" in (imported / "plain" / "tokenizer_config.json").read_text()


def test_a_plain_run_comes_back_bit_for_bit_from_an_export(imported, tmp_path):
    export_workdir(imported / "plain", tmp_path / "out", shard_bytes=20_000)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    equal(from_pretrained(tmp_path / "out").params, load_run(imported / "plain").params)
    first, again = (json.loads((folder / "config.json").read_text()) for folder in (imported / "hf", tmp_path / "out"))
    assert {name: again[name] for name in TINY} == first
    assert "transformers" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "tokenizer_config.json").exists()


def test_a_run_with_memory_comes_back_bit_for_bit(imported, tmp_path):
    export_workdir(imported / "lm2", tmp_path / "out")
    pretrained, run = from_pretrained(tmp_path / "out"), load_run(imported / "lm2")
    equal(pretrained.params, run.params)
    assert pretrained.config == run.config
    assert pretrained.step == run.step
    assert pretrained.tokenizer.fingerprint == run.tokenizer.fingerprint
    with pytest.raises(UserError, match="leave segment_tokens out"):
        from_pretrained(tmp_path / "out", segment_tokens=8)
    with pytest.raises(UserError, match="there is something already"):
        export_workdir(imported / "lm2", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "gated_bank" in card
    assert str(imported / "hf") in card


def test_a_workdir_is_read_as_load_run_does(imported):
    run, again = load_run(imported / "lm2"), lm2_jax.from_pretrained(imported / "lm2")
    assert (again.config, again.step) == (run.config, run.step)
    with pytest.raises(UserError, match="leave segment_tokens, dtype and tokenizer out"):
        from_pretrained(imported / "lm2", dtype="bfloat16")


@pytest.mark.slow
def test_a_pretrained_model_is_used_as_a_run_is(imported):
    """Texts in and out, and a memory in between."""
    run = lm2_jax.from_pretrained(imported / "hf", segment_tokens=16)
    assert isinstance(run, lm2_jax.Run)
    memory = run.read("A text of more than one segment.")
    (answer,) = run.generate(["More"], memory, max_new_tokens=3)
    assert isinstance(answer, str)
    (score,) = run.score(["More"], memory)
    assert score < 0


def short_run(folder: Path) -> RunConfig:
    """Two steps of a memory on a text."""
    (folder / "text.txt").write_text("".join(f"House {i} is on hill {i * i}.\n\n" for i in range(400)))
    run = own_text(PRESETS["lm2_tiny"], folder / "text.txt")
    return dataclasses.replace(
        run,
        optim=dataclasses.replace(run.optim, steps=2, warmup_steps=1),
        train=dataclasses.replace(run.train, eval_batches=0),
    )


def drift(a, b) -> float:
    return float(np.abs(np.asarray(a.params["embed"]["table"]) - np.asarray(b.params["embed"]["table"])).max())


@pytest.mark.slow
def test_an_imported_run_is_resumed_and_starts_others(tmp_path):
    """Training begins with the checkpoint's weights, in place and on another text, as the command advises."""
    source, run = open_source(hf_folder(tmp_path / "hf")), short_run(tmp_path)
    imported = import_source(source, tmp_path / "w", layout(), run, run, segment_tokens=32)
    assert not imported.refusal
    before = load_run(tmp_path / "w")
    other = own_text(imported.config, tmp_path / "text.txt")
    assert other.data.tokenizer == imported.config.data.tokenizer
    fit(other, tmp_path / "other", layout(), init_from=tmp_path / "w")
    outcome = fit(imported.config, tmp_path / "w", layout())
    after = load_run(tmp_path / "w")
    assert (outcome.step, before.step, after.step) == (2, 0, 2)
    assert 0 < drift(before, after) < 0.05  # two small steps away from the imported weights
    assert 0 < drift(before, load_run(tmp_path / "other")) < 0.05


def test_data_that_does_not_fit_the_tokenizer_is_reported(imported, tmp_path, capsys):
    """Here answers have several tokens each."""
    source = open_source(imported / "hf")
    result = import_source(source, tmp_path / "w", layout(), PRESETS["none_tiny"], segment_tokens=32)
    assert "one token each" in result.refusal
    lines = import_hf.report(result, str(tmp_path / "w"), 1.0)
    assert "--text PATH --workdir NEW --init.from" in lines
    assert "train:    " not in lines


def test_the_commands(tmp_path, monkeypatch, capsys):
    hf_folder(tmp_path / "hf")
    words = [str(tmp_path / "hf"), "--workdir", str(tmp_path / "w"), "--memory", "lm2_tiny"]
    monkeypatch.setattr(sys, "argv", ["import_hf", *words, "--layers", "1", "--segment-tokens", "16"])
    import_hf.main()
    assert "the first logits are the decoder's" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["export_hf", "--workdir", str(tmp_path / "w"), "--out", str(tmp_path / "out")])
    export_hf.main()
    assert "from_pretrained" in capsys.readouterr().out
    assert from_pretrained(tmp_path / "out").config.model.join.layers == (1,)
    monkeypatch.setattr(sys, "argv", ["import_hf", *words])
    with pytest.raises(UserError, match="there is something already"):
        import_hf.main()
    monkeypatch.setattr(sys, "argv", ["import_hf", *words[:3], "--memory", "lm2_tinny"])
    with pytest.raises(UserError, match="Did you mean 'lm2_tiny'"):
        import_hf.main()


def test_a_checkpoint_without_tokenizer_asks_for_one(tmp_path):
    source = open_source(hf_folder(tmp_path / "hf", tokenizer=False))
    with pytest.raises(UserError, match="--tokenizer"):
        import_source(source, tmp_path / "w", layout())
    assert not (tmp_path / "w").exists()


def test_an_import_that_fails_leaves_nothing(tmp_path, monkeypatch):
    source = open_source(hf_folder(tmp_path / "hf"))
    reads = iter(range(5))

    def read(name, inner=source.read):
        if next(reads, None) is None:
            raise UserError("the disk is gone", status=1)
        return inner(name)

    monkeypatch.setattr(source, "read", read)
    with pytest.raises(UserError, match="the disk is gone"):
        import_source(source, tmp_path / "w", layout())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def killed(arguments: list[str], folder: Path, seconds: float) -> None:
    """Runs a command and kills it so long after something new appeared in `folder`."""
    before = set(folder.iterdir())
    command = [sys.executable, "-m", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while set(folder.iterdir()) == before and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (-signal.SIGKILL, 0), "it failed by itself"
    assert set(folder.iterdir()) != before, "it was killed before it wrote anything"


def temporaries(folder: Path, *known: str) -> bool:
    """Whether all else in a folder has the names of half-written files."""
    return all(path.name in known or path.name.startswith(".lm2-tmp-") for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_a_killed_import_is_never_taken_for_complete(seconds, tmp_path):
    """There is no workdir, or one that can be used."""
    hf, workdir = hf_folder(tmp_path / "hf"), tmp_path / "w"
    killed(["lm2_jax.interop.import_hf", str(hf), "--workdir", str(workdir)], tmp_path, seconds)
    assert temporaries(tmp_path, "hf", "w")
    if workdir.exists():
        equal(load_run(workdir).params, from_pretrained(hf).params)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.03])
def test_a_killed_export_is_never_taken_for_complete(seconds, imported, tmp_path):
    out = tmp_path / "out"
    words = ["--workdir", str(imported / "plain"), "--out", str(out), "--shard-bytes", "1000"]
    killed(["lm2_jax.interop.export_hf", *words], tmp_path, seconds)
    assert temporaries(tmp_path, "out")
    if out.exists():
        equal(from_pretrained(out).params, load_run(imported / "plain").params)


def test_an_export_that_fails_leaves_nothing(imported, tmp_path, monkeypatch):
    """The last file that is written is the model card."""

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lm2_jax.interop.export.model_card", fail)
    with pytest.raises(UserError, match=r"out: writing failed: .*No space left on device"):
        export_workdir(imported / "plain", tmp_path / "out")
    assert not list(tmp_path.iterdir())
