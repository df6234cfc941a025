"""Checkpoints: complete, proved, and never worse off after a failure."""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from lm2_jax import checkpoint_files, load_run
from lm2_jax.checkpoint import Checkpoints, folder_of
from lm2_jax.checkpoint_storage import half_written
from lm2_jax.config import to_dict
from lm2_jax.errors import UserError
from lm2_jax.formats import FORMAT
from lm2_jax.model import LanguageModel
from lm2_jax.params import nest
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from lm2_jax.training.fit import begin
from lm2_jax.training.state import make_plan
from lm2_jax.training.workdir import read_config
from tests.e2e.tiny_run import ROWS, tiny_config, write_documents


def one_device() -> Layout:
    return Layout(make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("texts") / "documents")


@pytest.fixture(scope="module")
def plan(documents):
    config = tiny_config(documents)
    return make_plan(config, LanguageModel(config.model))


@pytest.fixture(scope="module")
def state(plan):
    """A train state of distinct values, as if trained."""
    layout = one_device()
    with layout.context():
        first = plan.init(layout)
    draw = np.random.default_rng(0)

    def shake(x):
        return x + draw.standard_normal(x.shape).astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(shake, first)


@pytest.fixture(scope="module")
def saved(plan, state, tmp_path_factory):
    """A workdir with complete checkpoints of steps 4 and 8."""
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpoints(workdir, plan.config) as checkpoints:
        for step in (4, 8):
            checkpoints.save(step, at(state, step), 3.5)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "workdir")


def at(state, step):
    return state._replace(step=jnp.int32(step))


def restore(plan, workdir, layout=None):
    layout = layout or one_device()
    with layout.context(), Checkpoints(workdir, plan.config) as checkpoints:
        return begin(plan, layout, checkpoints)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def test_everything_comes_back_bit_for_bit(plan, state, workdir):
    restored, step, first_loss = restore(plan, workdir)
    assert (step, first_loss) == (8, 3.5)
    assert_equal(restored, at(state, 8))
    position = json.loads((workdir / "checkpoints" / "8" / "position" / "data.json").read_text())
    assert (position["step"], position["rows"]) == (8, ROWS)


def test_a_workdir_may_be_relative(plan, state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("here", plan.config) as checkpoints:
        checkpoints.save(4, at(state, 4), 3.5)
    assert (tmp_path / "here" / "checkpoints" / "4").is_dir()
    assert restore(plan, "here")[1] == 4
    assert str(folder_of("gs://bucket/run")) == "gs://bucket/run/checkpoints"


def test_a_checkpoint_lies_on_the_mesh_it_is_restored_to(plan, state, workdir):
    layout = Layout(make_mesh(MeshConfig(data=2, fsdp=2, model=2)))
    restored, _, _ = restore(plan, workdir, layout)
    table = restored.params["embed"]["table"]
    assert np.prod(table.sharding.shard_shape(table.shape)) < table.size, "the embedding is not split"
    assert_equal(restored, at(state, 8))


def arrays_of(folder):
    """Files that hold arrays, the biggest first."""
    files = [path for item in ("params", "opt_state", "memory") for path in (folder / item).rglob("d/*")]
    return sorted((path for path in files if path.is_file()), key=lambda path: -path.stat().st_size)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 16] = bytes(byte ^ 0x5A for byte in content[middle : middle + 16])
    path.write_bytes(bytes(content))


DAMAGES = {
    "an array file cut in half": lambda folder: truncate(arrays_of(folder)[0]),
    "an array file emptied": lambda folder: arrays_of(folder)[0].write_bytes(b""),
    "an array file gone": lambda folder: arrays_of(folder)[0].unlink(),
    "an array file garbled": lambda folder: garble(arrays_of(folder)[0]),
    "all array files garbled": lambda folder: [garble(path) for path in arrays_of(folder)],
    "the parameters gone": lambda folder: shutil.rmtree(folder / "params"),
    "the optimizer state gone": lambda folder: shutil.rmtree(folder / "opt_state"),
    "the memory gone": lambda folder: shutil.rmtree(folder / "memory"),
    "the position gone": lambda folder: shutil.rmtree(folder / "position"),
    "the position cut": lambda folder: truncate(folder / "position" / "data.json"),
    "the position of other arrays": lambda folder: (folder / "position" / "data.json").write_text(
        (folder / "position" / "data.json").read_text().replace('"final_norm/scale": ', '"final_norm/scale": 1')
    ),
    "the first loss changed": lambda folder: (folder / "position" / "data.json").write_text(
        (folder / "position" / "data.json").read_text().replace('"first_loss": 3.5', '"first_loss": 4.5')
    ),
    "the config changed": lambda folder: (folder / "config" / "data.json").write_text(
        (folder / "config" / "data.json").read_text().replace('"learning_rate": ', '"learning_rate": 1')
    ),
    "another step's folder": lambda folder: [shutil.rmtree(folder), shutil.copytree(folder.parent / "4", folder)],
    "an index gone": lambda folder: (folder / "params" / "manifest.ocdbt").unlink(),
    "an index garbled": lambda folder: garble(folder / "params" / "manifest.ocdbt"),
    "metadata garbled": lambda folder: [garble(path) for path in folder.rglob("_METADATA")],
    "everything gone": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_skipped_and_the_one_before_is_used(plan, state, workdir, capsys, damage):
    newest = workdir / "checkpoints" / "8"
    DAMAGES[damage](newest)
    restored, step, _ = restore(plan, workdir)
    assert step == 4
    assert_equal(restored, at(state, 4))
    assert f"{newest}" in capsys.readouterr().err, "the warning names the checkpoint"


def test_a_half_written_checkpoint_is_skipped_with_a_warning(plan, workdir, capsys):
    folder = workdir / "checkpoints"
    (folder / "8").rename(folder / "8.orbax-checkpoint-tmp")
    assert half_written(folder) == ["8.orbax-checkpoint-tmp"]
    assert restore(plan, workdir)[1] == 4
    assert str(folder / "8.orbax-checkpoint-tmp") in capsys.readouterr().err


def test_without_a_usable_checkpoint_nothing_begins_anew_in_silence(plan, workdir):
    for step in ("4", "8"):
        truncate(arrays_of(workdir / "checkpoints" / step)[0])
    before = sorted(path for path in workdir.rglob("*"))
    with pytest.raises(UserError, match=r"none of the checkpoints \[4, 8\] can be used") as caught:
        restore(plan, workdir)
    assert caught.value.status == 1
    assert sorted(path for path in workdir.rglob("*")) == before


def test_a_run_that_comes_back_to_a_damaged_step_replaces_it(plan, state, workdir):
    truncate(arrays_of(workdir / "checkpoints" / "8")[0])
    layout = one_device()
    with layout.context(), Checkpoints(workdir, plan.config) as checkpoints:
        assert begin(plan, layout, checkpoints)[1] == 4
        assert checkpoints.last_good() == f"Last good checkpoint: {workdir / 'checkpoints' / '4'}."
        checkpoints.save(8, at(state, 8), 3.5)
    assert restore(plan, workdir)[1] == 8


def test_a_resume_starts_where_the_memory_was_saved(plan, state, tmp_path, capsys):
    with Checkpoints(tmp_path, plan.config) as checkpoints:
        for step in (4, 8, 12, 16):
            checkpoints.save(step, at(state, step), 3.5, with_memory=step == 4)
    there = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert there == {"4", "12", "16"}, "keep=2, and the only one with memory"
    assert restore(plan, tmp_path)[1] == 4
    assert "holds no memory" in capsys.readouterr().err


def test_the_last_good_checkpoint_is_one_to_resume_from(plan, state, tmp_path):
    with Checkpoints(tmp_path, plan.config) as checkpoints:
        for step in (4, 8):
            checkpoints.save(step, at(state, step), 3.5, with_memory=step == 4)
        assert checkpoints.last_good() == f"Last good checkpoint: {tmp_path / 'checkpoints' / '4'}."
    assert restore(plan, tmp_path)[1] == 4


def test_the_first_checkpoint_always_has_memory(plan, state, tmp_path):
    """Else a run killed after it could neither resume nor start again."""
    with Checkpoints(tmp_path, plan.config) as checkpoints:
        for step in (4, 8):
            checkpoints.save(step, at(state, step), 3.5, with_memory=False)
    assert (tmp_path / "checkpoints" / "4" / "memory").exists()
    assert not (tmp_path / "checkpoints" / "8" / "memory").exists()
    assert restore(plan, tmp_path)[1] == 4


def test_what_one_process_finds_damaged_decides_nothing(plan, workdir, monkeypatch):
    """The processes of a job must agree on what is kept, and only some may see the damage."""
    truncate(workdir / "checkpoints" / "8" / "position" / "data.json")
    with Checkpoints(workdir, plan.config) as checkpoints:
        monkeypatch.setattr(jax, "process_index", lambda: 1)  # any process says the truth
        assert checkpoints.last_good() == f"Last good checkpoint: {workdir / 'checkpoints' / '4'}."
        monkeypatch.undo()
        assert not checkpoints.damaged(8)
        assert checkpoints.complete(8)


@pytest.mark.parametrize("item", ["params", "opt_state", "memory", "position"])
def test_a_last_checkpoint_that_cannot_be_read_back_is_an_error(plan, state, tmp_path, item):
    with Checkpoints(tmp_path, plan.config) as checkpoints:
        checkpoints.save(4, at(state, 4), 3.5)
        checkpoints.save(8, at(state, 8), 3.5)
        checkpoints._wait()
        shutil.rmtree(tmp_path / "checkpoints" / "8" / item)
        with pytest.raises(UserError, match=r"8 was written, but cannot be read back.*Last good.*/4\. Run") as caught:
            checkpoints.finish()
    assert caught.value.status == 1


def test_old_checkpoints_go(plan, state, tmp_path):
    config = dataclasses.replace(plan.config, data=dataclasses.replace(plan.config.data, carry_state=False))
    with Checkpoints(tmp_path, config) as checkpoints:
        for step in (4, 8, 12, 16):
            checkpoints.save(step, at(state, step)._replace(memory=None), 3.5)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"12", "16"}


def test_as_many_checkpoints_with_memory_are_kept_as_asked_for(plan, state, tmp_path):
    with Checkpoints(tmp_path, plan.config) as checkpoints:
        for step in (4, 8, 12, 16):
            checkpoints.save(step, at(state, step), 3.5)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"12", "16"}, "keep=2"


def test_memory_can_be_saved_in_another_type(plan, state, tmp_path, documents):
    config = tiny_config(documents, memory_dtype="bfloat16")
    narrow = dataclasses.replace(plan, config=config)
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(4, at(state, 4), 3.5)
    restored, _, _ = restore(narrow, tmp_path)
    rounded = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16).astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state.memory
    )
    assert_equal(restored.memory, rounded)
    assert_equal(restored.params, state.params)


@pytest.mark.parametrize("part", ["params", "memory"])
def test_what_is_not_finite_is_never_saved(plan, state, workdir, part):
    broken = jax.tree.map(
        lambda x: x.at[(0,) * x.ndim].set(jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x, getattr(state, part)
    )
    with Checkpoints(workdir, plan.config) as checkpoints, pytest.raises(UserError, match="step 12") as caught:
        checkpoints.save(12, at(state, 12)._replace(**{part: broken}), 3.5)
    assert caught.value.status == 1
    assert str(workdir / "checkpoints" / "8") in str(caught.value), "the last good checkpoint is named"
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"4", "8"}


def test_a_save_that_the_disk_refuses_is_one_message(plan, state, workdir):
    with Checkpoints(workdir, plan.config) as checkpoints:
        shutil.rmtree(workdir / "checkpoints")
        (workdir / "checkpoints").write_text("a file where a folder should be")
        with pytest.raises(UserError, match="saving a checkpoint failed") as caught:
            checkpoints.save(12, at(state, 12), 3.5)
    assert caught.value.status == 1


def save_and_finish(checkpoints, state, step):
    checkpoints.save(step, state, 3.5)
    checkpoints.finish()


def test_a_save_that_fails_in_the_background_is_raised_by_finish(plan, state, tmp_path, monkeypatch, capfd):
    """As on a disk that fills up: Orbax reports it when it is asked the next time."""
    with Checkpoints(tmp_path, plan.config) as checkpoints:
        checkpoints.save(4, at(state, 4), 3.5)
        checkpoints.finish()
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        try:
            with pytest.raises(UserError, match=r"saving a checkpoint failed: .*too large") as caught:
                save_and_finish(checkpoints, at(state, 8), 8)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.status == 1
    assert f"Last good checkpoint: {tmp_path / 'checkpoints' / '4'}." in str(caught.value)
    assert len(str(caught.value)) < 600
    assert "Traceback" not in capfd.readouterr().err
    assert restore(plan, tmp_path)[1] == 4


def test_a_checkpoint_is_read_back_before_it_is_called_good(plan, workdir, capsys):
    with Checkpoints(workdir, plan.config) as checkpoints:
        for path in arrays_of(workdir / "checkpoints" / "8"):
            path.write_bytes(b"")
        assert checkpoints.last_good() == f"Last good checkpoint: {workdir / 'checkpoints' / '4'}."
        shutil.rmtree(workdir / "checkpoints" / "4" / "position")
        assert checkpoints.last_good() == "There is no good checkpoint."
    assert f"{workdir / 'checkpoints' / '8'} is damaged" in capsys.readouterr().err


STRANGE = {
    "brackets": b"a[b]c",
    "latin-1": b"caf\xe9",
    "blanks": b" a  b ",
    "emoji": "\N{BRAIN}".encode(),
    "glob": b"a*?{b,c}!",
    "quotes": b"a'b\"c\\d`$x",
    "control": b"a\nb\tc\x01",
    "long": b"x" * 200,
    "percent": b"%20%s#frag&x=1",
    "printable": bytes(byte for byte in range(32, 127) if byte != ord("/")),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_workdir_may_have_any_name(plan, state, tmp_path, name, capfd):
    workdir = pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + STRANGE[name]))
    with Checkpoints(workdir, plan.config) as checkpoints:
        checkpoints.save(4, at(state, 4), 3.5)
        assert checkpoints.finish() == f"Last good checkpoint: {workdir / 'checkpoints' / '4'}."
    restored, step, _ = restore(plan, workdir)
    assert step == 4
    assert_equal(restored, at(state, 4))
    assert os.listdir(tmp_path) == [workdir.name]
    assert "warning" not in capfd.readouterr().err


def test_processes_of_a_job_have_one_path(tmp_path):
    """Orbax refuses to save where the paths differ; each process has other files open."""
    folder = epath.Path(tmp_path / "a[b]c")
    folder.mkdir()
    paths = []
    for others in (0, 5):
        with contextlib.ExitStack() as stack:
            for _ in range(others):
                stack.enter_context(open(os.devnull))
            paths.append(stack.enter_context(checkpoint_files.library_path(folder)))
    assert paths[0] == paths[1] != folder


def test_a_notebook_reads_a_run(plan, state, workdir):
    """Its cells run inside an event loop."""

    async def cell():
        return restore(plan, workdir)

    restored, step, _ = asyncio.run(cell())
    assert step == 8
    assert_equal(restored, at(state, 8))


def test_a_checkpoint_of_the_legacy_api_is_read(plan, state, tmp_path):
    """As lm2_jax wrote them before it used orbax.checkpoint.v1: other files for tables, no mark of the version."""
    items = {name: getattr(state, name) for name in ("params", "opt_state", "memory")}
    config = to_dict(plan.config)
    sums = checkpoint_files.checksums(items)[0]
    record = checkpoint_files.record_of(sums, config, step=8, rows=ROWS, first_loss=3.5, tokenizer=None)
    args = {name: ocp.args.StandardSave(nest(checkpoint_files._named(name, tree))) for name, tree in items.items()}
    args |= {"position": ocp.args.JsonSave(record), "config": ocp.args.JsonSave(config)}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder_of(tmp_path) / "8", ocp.args.Composite(**args))
    assert (tmp_path / "checkpoints" / "8" / "position" / "metadata").exists()
    restored, step, first_loss = restore(plan, tmp_path)
    assert (step, first_loss) == (8, 3.5)
    assert_equal(restored, at(state, 8))


def test_a_link_to_a_workdir_is_one(plan, state, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with Checkpoints(f"{tmp_path}/link/", plan.config) as checkpoints:
        checkpoints.save(4, at(state, 4), 3.5)
    assert restore(plan, tmp_path / "real")[1] == 4


def test_a_checksum_depends_on_order_and_place():
    def sums(**trees):
        return checkpoint_files.checksums({"params": {name: jnp.asarray(x) for name, x in trees.items()}})[0]["params"]

    a, b = np.array([1.0, 2.0, 3.0], np.float32), np.array([4.0, 5.0, 6.0], np.float32)
    one = sums(a=a, b=b)
    assert sums(a=a[[1, 0, 2]], b=b)["a"] != one["a"]
    assert sums(a=b, b=a) != one, "arrays changed places"
    assert sums(a=np.zeros((2, 3)))["a"] == 0
    x = np.arange(6, dtype=np.int32)
    assert sums(a=x.reshape(2, 3))["a"] == sums(a=x)["a"], "the place is counted in the file's order"
    for y in (a, x.astype(bool), x.astype(np.int8), np.float32(3), a.astype(jnp.bfloat16)):
        assert checkpoint_files._host_checksum(np.asarray(y)) == sums(a=y)["a"]
    stacked = checkpoint_files.checksums({"params": {"blocks_0": {"w": jnp.stack([jnp.asarray(a), jnp.asarray(b)])}}})
    assert stacked[0]["params"] == {"layers/0/w": one["a"], "layers/1/w": one["b"]}


def test_a_newer_format_is_refused_with_both_versions(plan, workdir):
    path = workdir / "checkpoints" / "8" / "position" / "data.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"format": 99, "version": "7.5"}))
    expected = rf"format 99, written by lm2_jax 7\.5; this is lm2_jax .*formats 1 to {FORMAT}"
    with pytest.raises(UserError, match=expected):
        restore(plan, workdir)


GOLDEN = pathlib.Path(__file__).parent / "golden" / "workdir_format1"


def digests(tree):
    return [hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest() for leaf in jax.tree.leaves(tree)]


def test_a_checkpoint_of_format_1_comes_back_bit_for_bit(tmp_path):
    """Written by version 0.1.0: stacked layers, state fields by name, a random key, no format number."""
    expected = json.loads((GOLDEN / "expected.json").read_text())
    workdir = shutil.copytree(GOLDEN, tmp_path / "workdir")
    config = read_config(workdir)
    old = make_plan(config, LanguageModel(config.model))
    for layout in (one_device(), Layout(make_mesh(MeshConfig(data=2, fsdp=2, model=2)))):
        restored, step, _ = restore(old, workdir, layout)
        assert step == 4
        for item in ("params", "opt_state", "memory"):
            assert digests(getattr(restored, item)) == expected[item], item
    run = load_run(workdir)
    assert digests(run.params) == expected["params"]
    truncate(arrays_of(workdir / "checkpoints" / "4")[0])
    with pytest.raises(UserError, match="none of the checkpoints"):
        restore(old, workdir)


def test_load_run_without_a_run(tmp_path):
    with pytest.raises(UserError, match="no run there"):
        load_run(tmp_path)
