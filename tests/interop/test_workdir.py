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

from lm2_jax.errors import UserError
from lm2_jax.interop import export_hf, import_hf
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
    return Layout(make_mesh(MeshConfig(data=8)))


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
    assert pretrained.tokenizer is not None
    with pytest.raises(UserError, match="leave segment_tokens out"):
        from_pretrained(tmp_path / "out", segment_tokens=8)
    with pytest.raises(UserError, match="there is something already"):
        export_workdir(imported / "lm2", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "gated_bank" in card
    assert str(imported / "hf") in card


def test_a_workdir_is_not_a_pretrained_folder(imported):
    with pytest.raises(UserError, match="load_run"):
        from_pretrained(imported / "lm2")


def test_an_imported_run_is_resumed(tmp_path):
    """The first loss is the checkpoint's, not that of random weights, and training changes the weights."""
    run = PRESETS["lm2_tiny"]
    short = dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, rows=8),
        optim=dataclasses.replace(run.optim, steps=2, warmup_steps=1),
        train=dataclasses.replace(run.train, eval_batches=0),
    )
    source = open_source(hf_folder(tmp_path / "hf"))
    imported = import_source(source, tmp_path / "w", layout(), short, short, segment_tokens=32)
    before = load_run(tmp_path / "w")
    outcome = fit(imported.config, tmp_path / "w", layout())
    after = load_run(tmp_path / "w")
    assert (outcome.step, before.step, after.step) == (2, 0, 2)
    drift = np.abs(np.asarray(after.params["embed"]["table"]) - np.asarray(before.params["embed"]["table"])).max()
    assert 0 < drift < 0.05  # two small steps away from the imported weights


def test_the_commands(tmp_path, monkeypatch, capsys):
    hf_folder(tmp_path / "hf")
    words = [str(tmp_path / "hf"), "--workdir", str(tmp_path / "w"), "--memory", "titans_mal_tiny"]
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


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.5, 2.0])
def test_a_killed_import_is_never_taken_for_complete(seconds, tmp_path):
    """Killed so long after its temporary folder appeared: there is no workdir, or one that can be used."""
    hf_folder(tmp_path / "hf")
    command = [
        sys.executable,
        "-m",
        "lm2_jax.interop.import_hf",
        str(tmp_path / "hf"),
        "--workdir",
        str(tmp_path / "w"),
    ]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) == 1 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (tmp_path / "w").exists():
        equal(load_run(tmp_path / "w").params, from_pretrained(tmp_path / "hf").params)
