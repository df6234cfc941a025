"""The loop: resume, signals, and everything that stops a run, or keeps it from starting."""

import collections
import dataclasses
import functools
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from etils import epath

from lm2_jax import load_run
from lm2_jax.checkpoint import Checkpoints
from lm2_jax.config import OptimConfig, to_dict
from lm2_jax.errors import UserError
from lm2_jax.training import workdir as workdirs
from lm2_jax.training.watch import Watch
from tests.e2e.tiny_run import arrays, tiny_config, train, write_documents

STEPS = 6


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("texts") / "documents")


def short(documents, **optim):
    """Six steps, a checkpoint behind every second one."""
    config = tiny_config(documents, every_steps=2)
    return dataclasses.replace(
        config, optim=OptimConfig(**{"steps": STEPS, "warmup_steps": 1, "accumulate": 2} | optim)
    )


def signal_behind(monkeypatch, number, step):
    """Sends this process a signal while a step is being read."""
    read = Watch.read

    def read_and_signal(self, at, *rest):
        read(self, at, *rest)
        if at == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Watch, "read", read_and_signal)


def steps_of(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def files_of(workdir):
    return {str(path.relative_to(workdir)): path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(documents, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, train(short(documents), workdir)


def test_a_run_leaves_what_the_contract_says(undisturbed):
    workdir, outcome = undisturbed
    assert (outcome.step, outcome.status, int(outcome.state.step)) == (STEPS, 0, STEPS)
    assert {"config.json", "tokenizer.json", "metrics.jsonl", "checkpoints", "tensorboard"} <= set(os.listdir(workdir))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert {"loss", "tokens_per_second", "learning_rate", "grad_norm", "text_loss"} <= lines[0].keys()
    assert any(name.startswith("memory/gate_forget/") for name in lines[0]), "diagnostics of the memory, layer by layer"
    assert {"eval_loss", "eval_text_loss"} <= lines[-1].keys()
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_load_run(undisturbed, documents):
    workdir, outcome = undisturbed
    run = load_run(workdir)
    assert run.step == STEPS
    assert run.config == short(documents)
    assert run.tokenizer.decode(run.tokenizer.encode("abc")) == "abc"
    for a, b in zip(jax.tree.leaves(run.params), jax.tree.leaves(outcome.state.params), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(undisturbed, documents, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        signal_behind(patch, signal.SIGTERM, 2)  # read while step 3 runs, so it stops behind that
        stopped = train(short(documents), tmp_path)
    assert (stopped.step, stopped.stopped_by, stopped.status) == (3, signal.SIGTERM, 0)
    assert (tmp_path / "checkpoints" / "3" / "memory").exists(), "saved though 3 is no step of the schedule"
    assert f"step 3/{STEPS}: Last good checkpoint: {tmp_path / 'checkpoints' / '3'}." in capsys.readouterr().out
    shutil.copytree(tmp_path, tmp_path / "forgetful")

    outcome, expected = arrays(train(short(documents), tmp_path)), arrays(undisturbed[1])
    assert outcome.keys() == expected.keys()
    assert [name for name in expected if outcome[name].tobytes() != expected[name].tobytes()] == []
    assert steps_of(tmp_path) == list(range(1, STEPS + 1))

    restore = Checkpoints.restore

    def forget(self, targets):
        restored = restore(self, targets)
        memory = jax.tree.map(lambda x: x if x.dtype == bool else 0 * x, restored.state.memory)
        return restored._replace(state=restored.state._replace(memory=memory))

    monkeypatch.setattr(Checkpoints, "restore", forget)
    forgetful = arrays(train(short(documents), tmp_path / "forgetful"))
    assert [name for name in expected if "params" in name and forgetful[name].tobytes() != expected[name].tobytes()], (
        "with an empty memory the comparison above must fail"
    )


@pytest.mark.slow
def test_ctrl_c_saves_and_leaves_with_130(documents, tmp_path, monkeypatch):
    signal_behind(monkeypatch, signal.SIGINT, 2)
    stopped = train(short(documents), tmp_path)
    assert (stopped.step, stopped.status) == (3, 130)
    assert (tmp_path / "checkpoints" / "3").exists()


def test_a_finished_run_stays_as_it_is(undisturbed, documents, tmp_path):
    workdir = shutil.copytree(undisturbed[0], tmp_path / "workdir")
    before = files_of(workdir / "checkpoints")
    assert train(short(documents), workdir).step == STEPS
    assert files_of(workdir / "checkpoints") == before
    assert steps_of(workdir) == list(range(1, STEPS + 1))


def test_lines_written_before_a_crash_do_not_appear_twice(undisturbed, documents, tmp_path):
    """Checkpoint 6 is lost, and the last line was cut short."""
    workdir = shutil.copytree(undisturbed[0], tmp_path / "workdir")
    shutil.rmtree(workdir / "checkpoints" / "6")
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    train(short(documents), workdir)
    assert steps_of(workdir) == list(range(1, STEPS + 1))


def poison(monkeypatch, step, **values):
    """Makes the report of one step say something else."""
    read = Watch.read

    def read_poisoned(self, at, report, *rest):
        if at == step:
            for name, value in values.items():
                fill = functools.partial(np.full_like, fill_value=value)
                report = report._replace(**{name: jax.tree.map(fill, jax.device_get(getattr(report, name)))})
        read(self, at, report, *rest)

    monkeypatch.setattr(Watch, "read", read_poisoned)


@pytest.mark.parametrize("values", [{"grad_norm": np.inf}, {"tally": np.nan}, {"aux": np.nan}])
def test_a_loss_that_is_not_finite_stops_the_run(documents, tmp_path, monkeypatch, values):
    poison(monkeypatch, 5, **values)
    with pytest.raises(UserError, match="at step 5 are not finite") as caught:
        train(short(documents), tmp_path)
    assert caught.value.status == 1
    assert f"Last good checkpoint: {tmp_path / 'checkpoints' / '4'}." in str(caught.value)
    assert steps_of(tmp_path) == [1, 2, 3, 4]


@pytest.mark.slow  # compiles a program of its own
def test_a_run_whose_numbers_overflow_stops_and_saves_no_nan(documents, tmp_path):
    """The real thing: a learning rate that throws the parameters out of the range of float32."""
    with pytest.raises(UserError, match=r"Training stopped: .* step [1-6]") as caught:
        train(short(documents, learning_rate=1e38, clip_norm=1e38), tmp_path)
    assert caught.value.status == 1
    for folder in (tmp_path / "checkpoints").iterdir():
        shutil.rmtree(folder / "opt_state")  # the parameters alone can be read
        run = load_run(tmp_path)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.params))


def test_a_diverging_run_stops(documents, tmp_path):
    config = short(documents)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, max_loss_ratio=0.5))
    with pytest.raises(UserError, match=r"diverged: loss .* at step 1 is more than train.max_loss_ratio=0.5 times"):
        train(config, tmp_path)


def test_another_config_is_refused_with_the_fields_that_differ(undisturbed, documents):
    workdir, _ = undisturbed
    before = files_of(workdir)
    other = short(documents, learning_rate=0.5)
    other = dataclasses.replace(other, data=dataclasses.replace(other.data, seed=7))
    with pytest.raises(UserError) as caught:
        train(other, workdir)
    message = str(caught.value)
    assert "data.seed: 0 there, 7 now" in message
    assert "optim.learning_rate: 0.002 there, 0.5 now" in message
    assert message.count(" there, ") == 2
    assert files_of(workdir) == before, "nothing was changed"


def test_fields_that_change_nothing_may_change(undisturbed, documents, tmp_path):
    workdir = shutil.copytree(undisturbed[0], tmp_path / "workdir")
    config = short(documents)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, prefetch=1),
        train=dataclasses.replace(config.train, log_every=3, eval_every=2),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=3, keep=1),
    )
    assert train(config, workdir).step == STEPS


def test_the_type_of_a_saved_memory_may_not_change(documents, tmp_path):
    """It is read back as it was written, and nothing else could."""
    config = short(documents)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    other = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, memory_dtype="bfloat16"))
    with pytest.raises(UserError, match=r"checkpoint\.memory_dtype: None there, 'bfloat16' now"):
        workdirs.check_owner(epath.Path(tmp_path), other)


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "x"}', '{"kind": ["x"]}'])
def test_a_damaged_config_is_one_message(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="config") as caught:
        load_run(tmp_path)
    assert caught.value.status == 1
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_workdir_that_cannot_be_written_is_refused_before_training(documents, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"cannot be written to .* training has not begun") as caught:
        train(short(documents), tmp_path / "file" / "workdir")
    assert caught.value.status == 1


def test_a_full_disk_is_refused_before_training(documents, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(workdirs.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError, match=r"0\.0 MiB free, but 3 checkpoints of .* training has not begun") as caught:
        train(short(documents), tmp_path / "workdir")
    assert caught.value.status == 1
    assert os.listdir(tmp_path / "workdir") == [], "nothing was left behind"


def test_a_source_without_held_out_documents_is_found_out_before_training(documents, tmp_path):
    config = short(documents)
    source = dataclasses.replace(config.data.source, held_out_fraction=0.0)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))
    with pytest.raises(UserError, match="held_out"):
        train(config, tmp_path / "workdir")
    assert not (tmp_path / "workdir" / "config.json").exists()
