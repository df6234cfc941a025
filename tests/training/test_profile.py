"""The trace of a few steps."""

import dataclasses

import jax
import pytest

from lm2_jax.config import OptimConfig
from lm2_jax.errors import UserError
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from lm2_jax.training.fit import fit
from lm2_jax.training.profile import ProfileConfig, Profiler
from tests.e2e.tiny_run import tiny_config, write_documents


@pytest.fixture
def calls(monkeypatch):
    """What is asked of jax, in order."""
    made = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: made.append(f"start {folder}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: made.append("stop"))
    return made


def run(config, start, steps, calls):
    with Profiler(config, start) as profiler:
        for step in range(start, steps):
            profiler.before(step)
            calls.append(step)
            profiler.after(step, None)
    return calls


def test_it_traces_the_steps_that_were_asked_for(calls):
    config = ProfileConfig("there", profile_after=2, profile_steps=2)
    assert run(config, 10, 16, calls) == [10, 11, "start there", 12, 13, "stop", 14, 15]


def test_a_run_that_ends_earlier_still_writes_its_trace(calls):
    assert run(ProfileConfig("there", profile_after=1), 0, 2, calls) == [0, "start there", 1, "stop"]


def test_nothing_is_traced_unless_asked_for(calls):
    assert run(ProfileConfig(), 0, 9, calls) == list(range(9))


def test_a_folder_that_cannot_be_written_to_is_found_out_before_training(tmp_path):
    (tmp_path / "file").write_text("no folder")
    config = tiny_config(write_documents(tmp_path / "documents"))
    layout = Layout(make_mesh(MeshConfig(), jax.devices()[:1]))
    with pytest.raises(UserError, match=r"--profile=.*file/x.*cannot write there") as caught:
        fit(config, tmp_path / "run", layout, ProfileConfig(str(tmp_path / "file" / "x")))
    assert caught.value.status == 1
    assert not (tmp_path / "run" / "config.json").exists()


def test_numbers_that_make_no_sense():
    with pytest.raises(ValueError, match="profile_steps=0"):
        ProfileConfig(profile_steps=0)


@pytest.mark.slow
def test_training_writes_an_xplane_trace(tmp_path):
    config = tiny_config(write_documents(tmp_path / "documents"), every_steps=9)
    config = dataclasses.replace(config, optim=OptimConfig(steps=3, warmup_steps=1))
    layout = Layout(make_mesh(MeshConfig(), jax.devices()[:1]))
    fit(config, tmp_path / "run", layout, ProfileConfig(str(tmp_path / "trace"), profile_after=1, profile_steps=1))
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
