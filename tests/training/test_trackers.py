"""Trackers: the lines of metrics.jsonl, no step twice, and a tracker that fails stops nothing."""

import json
import sys
import types

import pytest
from etils import epath

from lm2_jax.errors import UserError
from lm2_jax.training.metrics import MetricsLog, read_lines
from lm2_jax.training.trackers import NoTracker, Trackio, Wandb


class Service:
    """What a tracker's server keeps: the points of each run, by its id or name."""

    def __init__(self, identify):
        self.identify, self.points, self.starts = identify, {}, []

    def init(self, **options):
        self.starts.append(options)
        points = self.points.setdefault(options[self.identify], [])
        return types.SimpleNamespace(log=lambda values, step: points.append((step, values)), finish=lambda: None)


TRACKERS = {"wandb": (Wandb(mode="offline"), "id"), "trackio": (Trackio(), "name")}


@pytest.fixture(params=TRACKERS)
def tracker(request, monkeypatch):
    config, identify = TRACKERS[request.param]
    service = Service(identify)
    monkeypatch.setitem(sys.modules, request.param, types.SimpleNamespace(init=service.init))
    return config, service


def write(workdir, tracker, after, steps):
    with MetricsLog(workdir, after, tracker, {"name": "x"}) as log:
        for step in steps:
            log.write(step, {"loss": float(step)})


def test_a_resumed_run_continues_there_and_sends_no_step_twice(tracker, tmp_path):
    config, service = tracker
    workdir = epath.Path(tmp_path) / "mine"
    workdir.mkdir()
    write(workdir, config, 0, range(1, 8))
    write(workdir, config, 4, range(5, 10))  # steps 5 to 7 were logged before a crash
    assert [line["step"] for line in read_lines(workdir)] == list(range(1, 10))
    (points,) = service.points.values()
    assert [step for step, _ in points] == list(range(1, 10))
    assert points[8] == (9, {"loss": 9.0})
    first, second = service.starts
    assert first == second
    assert first["resume"] == "allow"
    assert first["config"] == {"name": "x"}
    assert "mine" in first["name"]
    other = epath.Path(tmp_path) / "other"
    other.mkdir()
    write(other, config, 0, range(1, 3))
    assert len(service.points) == 2


def test_a_tracker_that_is_new_to_a_run_gets_all_steps_from_there(tracker, tmp_path):
    config, service = tracker
    workdir = epath.Path(tmp_path)
    write(workdir, NoTracker(), 0, range(1, 8))
    write(workdir, config, 4, range(5, 10))
    (points,) = service.points.values()
    assert [step for step, _ in points] == [5, 6, 7, 8, 9]


def test_a_tracker_that_fails_stops_nothing(tracker, tmp_path, capsys, monkeypatch):
    config, service = tracker

    def log(values, step):
        raise ConnectionError("gone")

    monkeypatch.setattr(service, "init", None)
    module = types.SimpleNamespace(init=lambda **_: types.SimpleNamespace(log=log, finish=lambda: None))
    monkeypatch.setitem(sys.modules, config.kind, module)
    write(epath.Path(tmp_path), config, 0, range(1, 5))
    assert len(read_lines(tmp_path)) == 4
    error = capsys.readouterr().err
    assert error.count("warning: the tracker failed") == 1
    assert "ConnectionError: gone" in error


@pytest.mark.parametrize("config", [Wandb(), Trackio()], ids=lambda config: config.kind)
def test_a_missing_library_is_reported_before_anything_is_made(config, monkeypatch):
    monkeypatch.setitem(sys.modules, config.kind, None)
    with pytest.raises(UserError, match=f"pip install {config.kind}; or set --train.tracker none") as caught:
        config.check()
    assert caught.value.status == 2
    NoTracker().check()


def test_a_tracker_that_does_not_start_and_a_damaged_id(tracker, tmp_path, monkeypatch):
    config, _ = tracker

    def refuse(**options):
        raise ValueError("no account")

    monkeypatch.setitem(sys.modules, config.kind, types.SimpleNamespace(init=refuse))
    with pytest.raises(UserError, match="could not start: ValueError: no account") as caught:
        MetricsLog(epath.Path(tmp_path), 0, config)
    assert caught.value.status == 1
    (tmp_path / "tracker.json").write_text("{")
    with pytest.raises(UserError, match=r"tracker\.json is damaged; remove it"):
        MetricsLog(epath.Path(tmp_path), 0, config)


def records(content):
    """The records of a small file in LevelDB's log format, which wandb writes after a header of its own."""
    at = 7
    assert content.startswith(b":W&B")
    assert len(content) < 32_768, "more than one block"
    while at + 7 <= len(content):
        length = int.from_bytes(content[at + 4 : at + 6], "little")
        assert content[at + 6] == 1, "a record in several parts"
        yield content[at + 7 : at + 7 + length]
        at += 7 + length


def test_wandb_itself_offline(tmp_path, monkeypatch):
    """Where wandb is installed: two starts are one run of it, and its files hold each step once."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    workdir = epath.Path(tmp_path) / "run"
    workdir.mkdir()
    write(workdir, Wandb(mode="offline"), 0, range(1, 8))
    write(workdir, Wandb(mode="offline"), 4, range(5, 10))
    ids, steps = set(), []
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        ids.add(path.stem)
        for data in records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                steps.append(int(json.loads(items["_step"])))
    assert len(ids) == 1
    assert sorted(steps) == list(range(1, 10))
