"""What is written down and shown: lines, diagnostics, rates, and the progress line on and off a terminal."""

import io
import json
import shutil
import struct

import jax
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

import lm2_jax
from lm2_jax.errors import UserError
from lm2_jax.model import LanguageModel
from lm2_jax.training import metrics, progress
from lm2_jax.training.lock import TakenOver
from lm2_jax.training.metrics import MetricsLog, diagnostics, read_lines
from lm2_jax.training.progress import ProgressLine, Throughput, clock, flops_per_token
from lm2_jax.training.state import make_plan


def steps(workdir):
    return [line["step"] for line in read_lines(workdir)]


def test_a_resumed_log_drops_what_came_after_the_checkpoint(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        for step in (1, 2, 3, 4):
            log.write(step, {"loss": step / 2})
    with open(tmp_path / metrics.FILE, "a") as file:
        file.write('{"step": 5, "loss": 2')  # a kill in the middle of a line
    with MetricsLog(tmp_path, 2) as log:
        assert steps(tmp_path) == [1, 2]
        log.write(3, {"loss": 9.0})
        assert steps(tmp_path) == [1, 2, 3], "a line is there as soon as it is written"
    assert read_lines(tmp_path)[-1] == {"step": 3, "loss": 9.0}


def test_tensorboard_gets_the_same_numbers(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.write(1, {"loss": 0.5, "eval_loss": 2.0})
        log.write(2, {"loss": 0.25})
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert scalars(file) == [(1, "loss", 0.5), (1, "eval_loss", 2.0), (2, "loss", 0.25)]


def scalars(file):
    """Step, name and value of all in a TensorBoard file: a length, its checksum, an event, its checksum, and so on."""
    return [(event.step, value.tag, value.simple_value) for event in events(file) for value in event.summary.value]


def events(file):
    data, found = file.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        (length_crc,), (crc,) = struct.unpack("<I", data[8:12]), struct.unpack("<I", data[12 + size : 16 + size])
        assert (length_crc, crc) == (masked_crc32c(data[:8]), masked_crc32c(data[12 : 12 + size]))
        found.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return found


@pytest.mark.parametrize(("error", "written"), [(TakenOver("gone"), False), (UserError("diverged"), True)])
def test_a_process_that_lost_its_workdir_writes_no_more(tmp_path, monkeypatch, error, written):
    """As in a bucket, where lines are kept for a while and then the file is replaced."""

    def fail():
        with MetricsLog(tmp_path, 0) as log:
            monkeypatch.setattr(log, "flush", lambda: flushed.append(True))
            raise error

    flushed = []
    with pytest.raises(UserError):
        fail()
    assert flushed == [True] * written


GOOD = b'{"step": 1, "loss": 1.0}'
DAMAGE = [b"{", b"null", b"[1]", b'{"loss": 2}', b'{"step": "2"}', b'{"step": 2.5}', b'{"step": true}', b"\xff\xfe\0",
          b"[" * 100_000, b'{"step": 2, "loss": ' + b"9" * 5000 + b"}"]  # fmt: skip


@pytest.mark.parametrize("line", DAMAGE)
def test_a_damaged_line_stops_no_resume_and_is_kept_aside(tmp_path, capsys, line):
    (tmp_path / metrics.FILE).write_bytes(GOOD + b"\n" + line + b"\n" + GOOD.replace(b"1", b"3", 1) + b"\n")
    with MetricsLog(tmp_path, 3) as log:
        log.write(4, {"loss": 0.5})
    assert steps(tmp_path) == [1, 3, 4]
    assert (tmp_path / metrics.DAMAGED).read_bytes() == line + b"\n"
    assert f"1 damaged lines were moved to {tmp_path / metrics.DAMAGED}" in capsys.readouterr().err


def test_no_step_is_there_twice(tmp_path):
    """As after two processes of an older version that wrote to one workdir."""
    (tmp_path / metrics.FILE).write_bytes(GOOD + b"\n" + GOOD + b"\n")
    with MetricsLog(tmp_path, 1):
        assert steps(tmp_path) == [1]


def test_a_log_that_needs_no_change_is_not_rewritten(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.write(1, {"loss": 1.0})
    before = (tmp_path / metrics.FILE).stat()
    with MetricsLog(tmp_path, 1):
        after = (tmp_path / metrics.FILE).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_tensorboard_has_every_point_as_soon_as_it_is_written(tmp_path):
    """So a kill loses none, and a resume only takes back what comes after the checkpoint."""
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0})
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert [step for step, _, _ in scalars(file)] == [1, 2, 3]
    MetricsLog(tmp_path, 2)
    (second,) = set((tmp_path / "tensorboard").iterdir()) - {file}
    assert second.name > file.name, "TensorBoard reads files in the order of their names"
    assert [event.step for event in events(second) if event.session_log.status] == [3]


def test_a_removed_workdir_is_an_error_and_not_made_anew(tmp_path):
    workdir = tmp_path / "workdir"
    workdir.mkdir()
    log = MetricsLog(workdir, 0)
    shutil.rmtree(workdir)
    with pytest.raises(OSError, match="No such file"):
        log.write(1, {"loss": 1.0})
    assert not workdir.exists()


def test_a_bucket_gets_whole_files_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "is_remote", lambda path: True)
    with MetricsLog(tmp_path, 0) as log:
        log.write(1, {"loss": 1.0})
        log.write(2, {"loss": 0.5})
        assert steps(tmp_path) == [], "not every line is an upload"
        log.flush()
        log.write(3, {"loss": 0.25})
        assert steps(tmp_path) == [1, 2]
    assert steps(tmp_path) == [1, 2, 3]


def test_what_is_no_number_is_never_written(tmp_path):
    with MetricsLog(tmp_path, 0) as log, pytest.raises(ValueError, match="JSON"):
        log.write(1, {"loss": float("nan")})


def test_diagnostics_by_layer():
    assert diagnostics({"gate": np.array([0.25, 0.75]), "norm": np.float32(2.0)}) == {
        "memory/gate/0": 0.25,
        "memory/gate/1": 0.75,
        "memory/norm/0": 2.0,
    }


def test_flops_by_hand():
    """6 per parameter, and 6 L H K T for the scores and sums of causal attention."""
    config = lm2_jax.preset("none_tiny")
    shapes = make_plan(config, LanguageModel(config.model)).shapes.params
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert flops_per_token(config.model, shapes) == 6 * count + 6 * 2 * 4 * 8 * 32


class Device:
    device_kind = "NVIDIA A100-SXM4-40GB"


def test_throughput_by_hand(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    throughput = Throughput(flops=31.2e6, steps=11, devices=[Device(), Device()])
    throughput.count(1000)
    now[0] += 50  # compilation
    assert throughput.measure(1) == {"tokens_per_second": pytest.approx(20), "mfu": pytest.approx(20 * 31.2e6 / 624e12)}
    for _ in range(5):
        throughput.count(1000)
    now[0] += 14
    throughput.leave_out(4)  # an evaluation
    values = throughput.measure(6)
    assert values["tokens_per_second"] == pytest.approx(500)
    assert values["mfu"] == pytest.approx(500 * 31.2e6 / (2 * 312e12))
    assert values["seconds_left"] == pytest.approx(5 * 14 / 5)


def test_clock():
    assert [clock(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]


VALUES = {"loss": 1.25, "answer_accuracy": 0.5, "tokens_per_second": 1234.0, "mfu": 0.41, "seconds_left": 65.0}


def test_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    with ProgressLine(20, Console(file=out, width=40)) as line:
        line.show(5, VALUES)
    assert out.getvalue().split() == (
        "step 5/20 | loss 1.250 | answers 50.0% | 1,234 tokens/s | MFU 41.0% | 1:05 left".split()
    )


def test_a_live_line_on_a_terminal():
    out = io.StringIO()
    with ProgressLine(20, Console(file=out, width=150, force_terminal=True)) as line:
        line.show(5, VALUES)
        line.step(6)
    assert "6/20" in out.getvalue()
    assert "loss 1.250 | answers 50.0%" in out.getvalue()
    assert "\x1b[" in out.getvalue(), "it is drawn in place"


def test_lines_are_json(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.write(7, {"loss": 0.5})
    assert json.loads((tmp_path / metrics.FILE).read_text()) == {"step": 7, "loss": 0.5}
