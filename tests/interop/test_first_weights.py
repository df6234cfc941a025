"""`train.py PRESET --init.from SOURCE` with a checkpoint of another project."""

import dataclasses
import re
import shlex
import sys

import jax
import numpy as np
import pytest

from lm2_jax.blocks.residual import ResidualJoin
from lm2_jax.commands import import_hf, train
from lm2_jax.config import DataConfig, RunConfig
from lm2_jax.data.text_source import TextFiles
from lm2_jax.data.tokenizers import TokenizerConfig
from lm2_jax.errors import UserError
from lm2_jax.interop.first_weights import check_first_weights
from lm2_jax.interop.open_source import open_source
from lm2_jax.interop.pretrained import from_pretrained
from lm2_jax.interop.workdir import decoder_model
from lm2_jax.memory.gated_bank import GatedBankConfig
from lm2_jax.presets import PRESETS
from lm2_jax.runs import load_run
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from lm2_jax.training.fit import fit
from tests.interop.folders import hf_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hf_folder(tmp_path_factory.mktemp("llama") / "hf")


def fitting(folder) -> RunConfig:
    """A run with a memory whose decoder and tokenizer are the checkpoint's."""
    text = folder.parent / "text.txt"
    text.write_text("".join(f"House {i} is on hill {i * i}.\n\n" for i in range(400)))
    run = PRESETS["lm2_tiny"]
    source = TextFiles(path=str(text), packing="ordered", document_characters=400)
    tokenizer = TokenizerConfig(kind="json", path=str(folder / "tokenizer.json"))
    model = decoder_model(open_source(folder), 32)
    return dataclasses.replace(
        run,
        model=dataclasses.replace(model, memory=GatedBankConfig(num_slots=6), join=ResidualJoin()),
        data=DataConfig(source=source, tokenizer=tokenizer, rows=2, segments=(2,), carry_state=True),
        loss=dataclasses.replace(run.loss, text_weight=1.0),
        optim=dataclasses.replace(run.optim, steps=1, warmup_steps=0, learning_rate=1e-30, weight_decay=0.0),
        train=dataclasses.replace(run.train, eval_batches=0),
    )


@pytest.mark.slow
def test_the_weights_are_the_checkpoints(folder, tmp_path, capsys):
    run = fitting(folder)
    check_first_weights(folder, run)
    fit(run, tmp_path / "w", Layout(make_mesh(MeshConfig(), jax.devices()[:1])), init_from=folder)
    assert "arrays taken from step 0 of" in capsys.readouterr().out
    there, here = from_pretrained(folder).params, load_run(tmp_path / "w").params
    np.testing.assert_allclose(here["embed"]["table"], there["embed"]["table"], atol=1e-12)
    np.testing.assert_allclose(
        here["blocks_0"]["attention"]["q_proj"]["w"], there["blocks_0"]["attention"]["q_proj"]["w"], atol=1e-12
    )


def test_a_run_that_does_not_fit_is_told_what_does(folder, tmp_path, monkeypatch):
    words = ["lm2_tiny", "--workdir", str(tmp_path / "w"), "--mesh.data", "8", "--init.from", str(folder)]
    with pytest.raises(UserError) as caught:
        train.main(words)
    message = str(caught.value)
    for line in (
        "model.decoder.mlp_width: 40 there, 64 in the run",
        "model.vocab_size: 300 there, 512 in the run",
        "data.tokenizer: its tokenizer.json there, kind 'bpe' in the run",
    ):
        assert line in message
    assert "model.decoder.width" not in message
    assert "head_width" not in message
    assert not (tmp_path / "w").exists()
    # The command that the message gives.
    command = re.search(r"python -m (lm2_jax\S+) (.*)", message)
    assert command is not None
    assert command[1] == "lm2_jax.interop.import_hf"
    monkeypatch.setattr(sys, "argv", ["import_hf", *shlex.split(command[2].replace("NEW", str(tmp_path / "new")))])
    import_hf.main()
    assert (tmp_path / "new" / "checkpoints" / "0").exists()


def test_the_same_shapes_do_not_suffice(folder):
    """RoPE and epsilon change no shape."""
    run = fitting(folder)
    decoder = dataclasses.replace(run.model.decoder, rope_theta=5e5, norm_epsilon=1e-6)
    wrong = dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=decoder))
    with pytest.raises(UserError, match=r"rope_theta: 10000.0 there(.|\n)*norm_epsilon: 1e-05 there"):
        check_first_weights(folder, wrong)
    other = dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer=TokenizerConfig(kind="bytes")))
    with pytest.raises(UserError, match=r"data.tokenizer: its tokenizer.json there, kind 'bytes'"):
        check_first_weights(folder, other)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        train.main(["lm2_tiny", "--workdir", str(tmp_path / "w"), "--mesh.data", "8", "--init.from", "/no/such/model"])
    assert not (tmp_path / "w").exists()


def test_a_resumed_run_ignores_it(folder, tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)

    def stop(*_, **__):
        raise UserError("it was called")

    monkeypatch.setattr(train, "fit", stop)
    with pytest.raises(UserError, match="it was called"):
        train.main(["lm2_tiny", "--workdir", str(tmp_path), "--mesh.data", "8", "--init.from", str(folder)])
