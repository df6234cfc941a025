"""The loop: resume, signals, and everything that stops a run, or keeps it from starting."""

import collections
import dataclasses
import errno
import functools
import json
import os
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from etils import epath

from lm2_jax import formats, load_run, preset
from lm2_jax.checkpoint import Checkpoints, saved_steps
from lm2_jax.commands.files import check_workdir
from lm2_jax.config import OptimConfig, TrainConfig, to_dict
from lm2_jax.errors import UserError
from lm2_jax.formats import FORMAT
from lm2_jax.params import to_canonical
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from lm2_jax.training import workdir as workdirs
from lm2_jax.training.fit import fit
from lm2_jax.training.metrics import MetricsLog, read_lines
from lm2_jax.training.state import TrainState
from lm2_jax.training.watch import Watch
from lm2_jax.training.workdir import read_config
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


@pytest.mark.slow
def test_a_finished_run_stays_as_it_is_and_says_how_to_train_further(undisturbed, documents, tmp_path, capsys):
    workdir = shutil.copytree(undisturbed[0], tmp_path / "workdir")
    before = files_of(workdir / "checkpoints")
    result = train(short(documents), workdir)
    assert (result.step, result.status) == (STEPS, 0)
    assert files_of(workdir / "checkpoints") == before
    assert steps_of(workdir) == list(range(1, STEPS + 1))
    said = capsys.readouterr().out
    assert f"This run is finished: step {STEPS} is the last of optim.steps={STEPS}." in said
    assert "schedule is then computed again" in said
    (advice,) = re.findall(r"`--optim\.steps (\d+)`", said)
    more = train(short(documents, steps=int(advice)), workdir)
    assert more.step == int(advice)
    assert "This run is finished" not in capsys.readouterr().out
    rates = [line["learning_rate"] for line in read_lines(workdir)]
    assert rates[STEPS] > rates[STEPS - 1], "the schedule is that of the longer run"


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
    """The real thing: each step multiplies the weights by 1 - rate * decay, which leaves the range of float32."""
    with pytest.raises(UserError, match=r"Training stopped: .* step [1-6]") as caught:
        train(short(documents, learning_rate=1e3, weight_decay=1e4), tmp_path)
    assert caught.value.status == 1
    for folder in (tmp_path / "checkpoints").iterdir():
        shutil.rmtree(folder / "opt_state")  # the parameters alone can be read
        run = load_run(tmp_path)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.params))


def diverging(documents):
    """A step far too large raises the loss."""
    config = short(documents, learning_rate=1.0)
    unsaved = dataclasses.replace(config.checkpoint, every_steps=100)
    return dataclasses.replace(config, train=TrainConfig(max_loss_ratio=1.01, log_every=1), checkpoint=unsaved)


def test_a_diverging_run_stops(documents, tmp_path):
    with pytest.raises(UserError, match=r"diverged: loss .* at step \d is more than train.max_loss_ratio=1.01 times"):
        train(diverging(documents), tmp_path)


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
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
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
    with pytest.raises(UserError, match=r"--workdir=.*cannot write there") as caught:
        train(short(documents), tmp_path / "file" / "workdir")
    assert caught.value.status == 1


def test_a_full_disk_is_refused_before_training(documents, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(workdirs.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError, match=r"0\.0 MiB free, but 3 checkpoints of .* training has not begun") as caught:
        train(short(documents), tmp_path / "workdir")
    assert caught.value.status == 1
    assert os.listdir(tmp_path) == [], "a refused run leaves no folder"


@pytest.mark.parametrize(("free", "enough"), [(3 * 100 + 2 * 60, True), (3 * 100 + 2 * 60 - 1, False)])
def test_checkpoints_without_memory_are_counted_too(documents, tmp_path, monkeypatch, free, enough):
    """Of the newest two none may have memory; then two older ones are kept, and one is being written."""
    config = tiny_config(documents, memory_every=3)
    assert config.checkpoint.keep == 2
    byte = np.dtype(np.uint8)
    shapes = TrainState(*(jax.ShapeDtypeStruct((size,), byte) for size in (10, 20, 30, 40)))
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(workdirs.shutil, "disk_usage", lambda path: usage(10**9, 0, free))
    if enough:
        workdirs.check_space(epath.Path(tmp_path), config, shapes)
    else:
        with pytest.raises(UserError, match=r"3 checkpoints of .* and 2 without memory"):
            workdirs.check_space(epath.Path(tmp_path), config, shapes)


def test_a_source_without_held_out_documents_is_found_out_before_training(documents, tmp_path):
    config = short(documents)
    source = dataclasses.replace(config.data.source, held_out_fraction=0.0)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))
    with pytest.raises(UserError, match="held_out"):
        train(config, tmp_path / "workdir")
    assert os.listdir(tmp_path) == []


def with_optim(config, **fields):
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, **fields))


@pytest.mark.slow
def test_a_config_without_a_checkpoint_locks_nothing(documents, tmp_path):
    """A start that was killed, refused or diverged before its first save: another config takes its place."""
    with pytest.raises(UserError, match="diverged"):
        train(diverging(documents), tmp_path)
    assert (tmp_path / "config.json").exists()
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "tokenizer.model").write_bytes(b"of another config")
    (tmp_path / ".lm2-tmp-0123").write_bytes(b"half")
    config = short(documents, steps=2, learning_rate=1e-3)
    assert train(config, tmp_path).step == 2
    assert steps_of(tmp_path) == [1, 2]
    assert read_config(tmp_path) == config
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "config.json", "metrics.jsonl", "tensorboard",
                                            "tokenizer.json"]  # fmt: skip
    assert os.listdir(tmp_path / "checkpoints") == ["2"]


FOREIGN = {
    "one file": {"a.py": "x"},
    "a model of another program": {"config.json": '{"hidden_size": 64}', "tokenizer.json": "{}"},
    "a repository": {"a.py": "x", "b.txt": "x", "checkpoints": "x", "README.md": "x", "e": "x"},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_workdir_of_something_else_is_refused(documents, tmp_path, name):
    """By one rule and one message, whether the library or the program is called."""
    for file, content in FOREIGN[name].items():
        (tmp_path / file).write_text(content)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=r"holds other files \(.*\) and no run; choose a new folder") as caught:
        train(short(documents), tmp_path)
    assert files_of(tmp_path) == before
    with pytest.raises(UserError) as by_program:
        check_workdir(str(tmp_path))
    assert str(by_program.value) == str(caught.value)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer.json": "", "run.lock": "", "out.log": "", ".hidden": ""},  # of a start that was killed
        {"config.json": "", "metrics.jsonl": ""},
        {"config.json": '{"model": {}, "data": {}, "optim": {}, "train": {}}', "my_notes.txt": ""},
    ],
)
def test_a_workdir_of_a_run_is_taken(tmp_path, files):
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    workdirs.check_foreign(epath.Path(tmp_path))


@pytest.mark.slow
def test_the_number_of_steps_may_grow_and_not_shrink(undisturbed, documents, tmp_path):
    workdir = shutil.copytree(undisturbed[0], tmp_path / "workdir")
    before = (workdir / "tokenizer.json").stat()
    assert train(short(documents, steps=STEPS + 1), workdir).step == STEPS + 1
    assert steps_of(workdir) == list(range(1, STEPS + 2))
    after = (workdir / "tokenizer.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns), "a resume rewrote the tokenizer"
    with pytest.raises(UserError, match=r"optim\.steps: 7 there, 6 now\n.*only become larger"):
        train(short(documents), workdir)


def edit(workdir, **fields):
    plain = json.loads((workdir / "config.json").read_text())
    plain["model"]["decoder"] |= fields
    (workdir / "config.json").write_text(json.dumps(plain))


def test_a_config_that_the_checkpoint_was_not_trained_with_is_refused(undisturbed, documents, tmp_path):
    workdir = shutil.copytree(undisturbed[0], tmp_path / "workdir")
    edit(workdir, rope_theta=10.0)
    with pytest.raises(UserError, match=r"rope_theta: 10000\.0 in the checkpoint, 10\.0 in config\.json") as caught:
        load_run(workdir)
    assert caught.value.status == 1
    config = short(documents)
    decoder = dataclasses.replace(config.model.decoder, rope_theta=10.0)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder))
    with pytest.raises(UserError, match=r"Checkpoint .*6 is of another config .*\n.*rope_theta: 10000\.0 there"):
        train(config, workdir)
    edit(workdir, rope_theta=10_000.0)
    assert load_run(workdir).step == STEPS


def test_another_tokenizer_is_refused(undisturbed, documents, tmp_path):
    workdir = shutil.copytree(undisturbed[0], tmp_path / "workdir")
    text = (workdir / "tokenizer.json").read_text()
    (workdir / "tokenizer.json").write_text(text.replace('"a"', '"\u0416"'))
    for use in (lambda: load_run(workdir), lambda: train(short(documents), workdir)):
        with pytest.raises(UserError, match=r"another tokenizer than the workdir's tokenizer\.json") as caught:
            use()
        assert caught.value.status == 1


def test_a_newer_format_is_refused_with_both_versions(undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed[0], tmp_path / "workdir")
    plain = json.loads((workdir / "config.json").read_text())
    assert plain["format"] == formats.FORMAT
    (workdir / "config.json").write_text(json.dumps(plain | {"format": 99, "version": "7.5"}))
    expected = rf"format 99, written by lm2_jax 7\.5; this is lm2_jax .*formats 1 to {FORMAT}\."
    with pytest.raises(UserError, match=expected):
        load_run(workdir)


@pytest.mark.slow
def test_weights_of_another_run_start_a_new_one(undisturbed, documents, tmp_path, capsys):
    source, _ = undisturbed
    plain = preset("none_tiny").model
    config = dataclasses.replace(
        with_optim(short(documents), steps=2, learning_rate=1e-30, weight_decay=0.0),
        model=dataclasses.replace(plain, vocab_size=512),
        data=dataclasses.replace(short(documents).data, carry_state=False),
    )
    layout = Layout(make_mesh(MeshConfig(), jax.devices()[:1]))
    outcome = fit(config, tmp_path / "new", layout, init_from=source)
    assert "arrays taken from step 6 of" in (out := capsys.readouterr().out)
    assert "are not used" in out, "the memory's"
    there, here = to_canonical(load_run(source).params), to_canonical(outcome.state.params)
    assert set(here) < set(there)
    for name, array in here.items():
        np.testing.assert_allclose(array, there[name], atol=1e-12, err_msg=name)


def test_a_disk_that_fills_up_is_one_message(documents, tmp_path, monkeypatch, capfd):
    def full(self, step, values):
        if step == 5:
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "metrics.jsonl"))

    monkeypatch.setattr(MetricsLog, "write", full)
    with pytest.raises(UserError, match=r"writing failed: .*No space left.*metrics\.jsonl") as caught:
        train(short(documents), tmp_path)
    assert caught.value.status == 1
    assert f"Last good checkpoint: {tmp_path / 'checkpoints' / '4'}." in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


def test_a_workdir_that_is_removed_is_one_message(documents, tmp_path, monkeypatch):
    read = Watch.read

    def remove(self, at, *rest):
        read(self, at, *rest)
        if at == 3:  # a move is one call: deleting file by file races with the checkpoint that is being written
            (tmp_path / "workdir").rename(tmp_path / "elsewhere")

    monkeypatch.setattr(Watch, "read", remove)
    with pytest.raises(UserError, match=r"workdir.*There is no good checkpoint") as caught:
        train(short(documents), tmp_path / "workdir")
    assert caught.value.status == 1


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM),
                                     (signal.SIGINT, signal.SIGINT)])  # fmt: skip
def test_a_second_signal_while_the_last_checkpoint_is_saved_changes_nothing(documents, tmp_path, monkeypatch, numbers):
    signal_behind(monkeypatch, numbers[0], 2)
    finish = Checkpoints.finish

    def interrupted(self):
        os.kill(os.getpid(), numbers[1])
        return finish(self)

    monkeypatch.setattr(Checkpoints, "finish", interrupted)
    stopped = train(short(documents), tmp_path)
    assert (stopped.step, stopped.status) == (3, 130 if numbers[0] == signal.SIGINT else 0)
    assert saved_steps(tmp_path) == [2, 3]


@pytest.mark.slow
def test_a_signal_before_the_first_step_saves_nothing_and_is_no_error(documents, tmp_path, monkeypatch, capsys):
    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return claim(*args)

    claim = workdirs.claim
    monkeypatch.setattr(workdirs, "claim", signalled)
    stopped = train(short(documents), tmp_path)
    assert (stopped.step, stopped.status, stopped.stopped_by) == (0, 0, signal.SIGTERM)
    assert "There is no good checkpoint" in capsys.readouterr().out
    monkeypatch.undo()
    assert train(short(documents, steps=2), tmp_path).step == 2
