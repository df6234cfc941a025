"""What a campaign tries: each case is a function of a seed that raises `Broken` where the product breaks a promise."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath
from tokenizers import Tokenizer

from lm2_jax import checkpoint_files, load_run
from lm2_jax.checkpoint import Checkpoints, saved_steps
from lm2_jax.config import RunConfig, from_dict, to_dict
from lm2_jax.data.tokenizers import load_tokenizer
from lm2_jax.errors import UserError
from lm2_jax.model import LanguageModel
from lm2_jax.presets import PRESETS
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from lm2_jax.training import workdir as workdirs
from lm2_jax.training.fit import begin
from lm2_jax.training.metrics import MetricsLog
from lm2_jax.training.state import make_plan
from tests.e2e.tiny_run import MODELS, STEPS, tiny_config, train, write_documents

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "e2e" / "tiny_run.py"
STATUSES = {0, 130, -signal.SIGTERM, -signal.SIGINT}  # the negative ones before the program has begun its work


class Broken(AssertionError):
    """A promise that was not kept."""


def require(holds: bool, promise: str, log: str = "") -> None:
    """Raises `Broken` with the end of a log where something does not hold."""
    if not holds:
        raise Broken(f"{promise}\n{log[-2000:]}".rstrip())


class Bench:
    """What cases share: documents, undisturbed runs to compare with, and a folder for each case."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.documents = folder / "documents"
        if not self.documents.exists():
            write_documents(self.documents)
        self._expected: dict[str, tuple[dict, float]] = {}

    def start(self, workdir: pathlib.Path, model: str, limit: int | None = None) -> subprocess.Popen:
        """Starts the tiny run; no file may become larger than `limit` bytes."""
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache")}
        command = [sys.executable, str(PROGRAM), str(workdir), str(self.documents), "--model", model]
        return subprocess.Popen(
            command,
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )

    def expected(self, model: str) -> tuple[dict, float]:
        """Checksums of an undisturbed run's last checkpoint, and the seconds that it took."""
        if model not in self._expected:
            workdir, pace = self.folder / f"undisturbed-{model}", self.folder / f"seconds-{model}"
            if not pace.exists():
                self.finish(workdir, model)
                begun, again = time.monotonic(), self.folder / "timed"  # with a warm compilation cache
                self.finish(again, model)
                shutil.rmtree(again)
                pace.write_text(str(time.monotonic() - begun))
            self._expected[model] = self.sums(workdir), float(pace.read_text())
        return self._expected[model]

    def finish(self, workdir: pathlib.Path, model: str) -> None:
        process = self.start(workdir, model)
        log, _ = process.communicate(timeout=600)
        require(process.returncode == 0, f"a run to the end leaves with {process.returncode}", log)

    def short_config(self) -> RunConfig:
        """A run of four steps with two checkpoints."""
        config = tiny_config(self.documents, every_steps=2)
        return dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=4))

    def undamaged(self) -> pathlib.Path:
        """The workdir of that run, whose copies are damaged."""
        workdir = self.folder / "undamaged"
        if saved_steps(workdir) != [2, 4]:
            train(self.short_config(), workdir)
        return workdir

    def sums(self, workdir: pathlib.Path) -> dict:
        record, _ = checkpoint_files.read_record(epath.Path(workdir / "checkpoints"), STEPS)
        return record["checksums"]

    def check_finished(self, workdir: pathlib.Path, model: str) -> None:
        """The same command again ends where the undisturbed run ended, bit for bit, with every step logged once."""
        self.finish(workdir, model)
        require(self.sums(workdir) == self.expected(model)[0], "the run ends in other numbers")
        steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        require(steps == list(range(1, STEPS + 1)), f"logged steps are {steps}")


def kill(bench: Bench, draw: np.random.Generator, workdir: pathlib.Path) -> None:
    """`kill -9` at one to three moments between the start of the process and its end."""
    model = str(draw.choice(list(MODELS)))
    _, seconds = bench.expected(model)
    for _ in range(draw.integers(1, 4)):
        process = bench.start(workdir, model)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0, seconds))
        process.kill()
        process.communicate()
    bench.check_finished(workdir, model)


def signals(bench: Bench, draw: np.random.Generator, workdir: pathlib.Path) -> None:
    """One or two of SIGTERM and SIGINT at any moment: a documented status, no traceback, nothing lost."""
    model = str(draw.choice(list(MODELS)))
    _, seconds = bench.expected(model)
    process = bench.start(workdir, model)
    for _ in range(draw.integers(1, 3)):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0, seconds / 2))
        process.send_signal(draw.choice([signal.SIGTERM, signal.SIGINT]))
    log, _ = process.communicate(timeout=600)
    require("Traceback" not in log, "a signal prints a traceback", log)
    require(process.returncode in STATUSES, f"a signal ends with status {process.returncode}", log)
    bench.check_finished(workdir, model)


def disk(bench: Bench, draw: np.random.Generator, workdir: pathlib.Path) -> None:
    """No file can become larger than a random limit: status 1 and one message, and nothing lost."""
    model = str(draw.choice(list(MODELS)))
    bench.expected(model)
    process = bench.start(workdir, model, limit=int(2 ** draw.uniform(6, 19)))
    log, _ = process.communicate(timeout=600)
    require("Traceback" not in log, "a full disk prints a traceback", log)
    require(process.returncode in (0, 1), f"a full disk ends with status {process.returncode}", log)
    require(process.returncode == 0 or log.count("error: ") == 1, "there is not one message", log)
    bench.check_finished(workdir, model)


def two(bench: Bench, draw: np.random.Generator, workdir: pathlib.Path) -> None:
    """Two processes on one workdir: one of them trains, the other is refused, or finds the run finished."""
    model = str(draw.choice(list(MODELS)))
    _, seconds = bench.expected(model)
    first = bench.start(workdir, model)
    time.sleep(draw.uniform(0, seconds / 2))
    second = bench.start(workdir, model)
    logs = [process.communicate(timeout=600)[0] for process in (first, second)]
    statuses = [first.returncode, second.returncode]
    require(0 in statuses and set(statuses) <= {0, 1}, f"two processes end with {statuses}", "\n".join(logs))
    for status, log in zip(statuses, logs, strict=True):
        require(status == 0 or "is in use by process" in log, "a refusal does not name the owner", log)
        require("Traceback" not in log, "two processes print a traceback", log)
    bench.check_finished(workdir, model)


DAMAGES: dict[str, Callable[[bytes, np.random.Generator], bytes | None]] = {
    "removed": lambda content, draw: None,
    "emptied": lambda content, draw: b"",
    "cut": lambda content, draw: content[: draw.integers(0, len(content) + 1)],
    "one bit": lambda content, draw: _flip(content, draw, 1),
    "sixteen bits": lambda content, draw: _flip(content, draw, 16),
    "zeros": lambda content, draw: bytes(len(content)),
    "longer": lambda content, draw: content + draw.bytes(16),
    "noise": lambda content, draw: draw.bytes(len(content)),
}


def _flip(content: bytes, draw: np.random.Generator, bits: int) -> bytes:
    changed = bytearray(content)
    for place in draw.integers(0, 8 * len(content), bits) if content else ():
        changed[place // 8] ^= 1 << (place % 8)
    return bytes(changed)


def damage(bench: Bench, draw: np.random.Generator, workdir: pathlib.Path) -> None:
    """One file of a workdir is damaged: what is read is what was written, an earlier checkpoint, or one message."""
    undamaged, config = bench.undamaged(), bench.short_config()
    shutil.copytree(undamaged, workdir)
    file = draw.choice(sorted(str(path) for path in workdir.rglob("*") if path.is_file()))
    name = str(draw.choice(list(DAMAGES)))
    content = DAMAGES[name](pathlib.Path(file).read_bytes(), draw)
    pathlib.Path(file).unlink() if content is None else pathlib.Path(file).write_bytes(content)
    what = f"{os.path.relpath(file, workdir)} {name}"
    layout = Layout(make_mesh(MeshConfig(), jax.devices()[:1]))
    with contextlib.redirect_stderr(io.StringIO()):
        for reader in (lambda: _resume(config, workdir, layout), lambda: _load(workdir)):
            try:
                state = reader()
            except UserError:
                continue
            except Exception as error:
                raise Broken(f"{what}: {type(error).__name__}: {error}") from error
            sums = checkpoint_files.checksums(state)[0]
            expected = [
                checkpoint_files.read_record(epath.Path(undamaged / "checkpoints"), step)[0]["checksums"]
                for step in (2, 4)
            ]
            same = any(all(sums[item] == saved[item] for item in sums) for saved in expected)
            require(same, f"{what}: other numbers were read")


def _resume(config: RunConfig, workdir: pathlib.Path, layout: Layout) -> dict:
    """All that a resume reads and writes, without training."""
    with workdirs.owned(workdir) as lock:
        assert lock is not None
        folder = lock._workdir
        exists = workdirs.check_owner(folder, config)
        if not exists:
            raise UserError("nothing to resume")
        tokenizer = load_tokenizer(folder, config.data.tokenizer)
        plan = make_plan(config, LanguageModel(config.model))
        workdirs.claim(folder, config, tokenizer, exists)
        check = workdirs.resume_check(config, tokenizer)
        with layout.context(), Checkpoints(folder, config, tokenizer.fingerprint, check) as checkpoints:
            state, step, _ = begin(plan, layout, checkpoints)
            MetricsLog(folder, step)
    return {"params": state.params, "opt_state": state.opt_state, "memory": state.memory}


def _load(workdir: pathlib.Path) -> dict:
    return {"params": load_run(workdir).params}


JUNK = (None, True, -1, 0, 1, 2, 7, 10**12, 10**400, -0.5, 1e-300, 1e300, float("nan"), float("inf"), "", "x", "\ud800",
        [], [0], [1, 2], ["x"], {}, {"kind": "x"}, [[[]]])  # fmt: skip


def fuzz(bench: Bench, draw: np.random.Generator, workdir: pathlib.Path) -> None:
    """One or two fields of a preset's config.json hold something else: a config, or one message."""
    preset = PRESETS[str(draw.choice(sorted(PRESETS)))]
    plain = json.loads(json.dumps(to_dict(preset)))
    names = []
    for _ in range(draw.integers(1, 3)):
        table, path = plain, ""
        while True:
            name = str(draw.choice(sorted(table)))
            path = f"{path}.{name}"
            if isinstance(table[name], dict) and table[name] and draw.random() < 0.9:
                table = table[name]
                continue
            value = JUNK[draw.integers(len(JUNK))]
            if draw.random() < 0.1:
                del table[name]
            else:
                table[name] = value
            names.append(f"{path.lstrip('.')}={value!r}")
            break
    try:
        config = from_dict(RunConfig, plain)
        require(
            json.dumps(to_dict(from_dict(RunConfig, json.loads(json.dumps(to_dict(config))))))
            == json.dumps(to_dict(config)),
            f"{names}: the config changes when it is written and read",
        )
    except UserError as error:
        require(len(str(error)) < 5000, f"{names}: a message of {len(str(error))} letters")
    except Broken:
        raise
    except Exception as error:
        raise Broken(f"{preset.name} with {', '.join(names)}: {type(error).__name__}: {error}") from error


def tokenizer(bench: Bench, draw: np.random.Generator, workdir: pathlib.Path) -> None:
    """The tokenizer's file is damaged: it is refused, or reads as the same tokenizer in everything that it does."""
    undamaged = bench.undamaged()
    content = (undamaged / "tokenizer.json").read_bytes()
    name = str(draw.choice(list(DAMAGES)))
    damaged = DAMAGES[name](content, draw)
    if draw.random() < 0.5:  # most damage is no JSON any more
        name, damaged = "another value", _another_value(content, draw)
    shutil.copytree(undamaged, workdir)
    path = workdir / "tokenizer.json"
    path.unlink() if damaged is None else path.write_bytes(damaged)
    try:
        load_run(workdir)
    except UserError:
        return
    except Exception as error:
        raise Broken(f"{name}: {type(error).__name__}: {error}") from error
    assert damaged is not None
    same = Tokenizer.from_buffer(damaged).to_str() == Tokenizer.from_buffer(content).to_str()
    require(same, f"{name}: another tokenizer was read")


def _another_value(content: bytes, draw: np.random.Generator) -> bytes:
    """The same tokenizer with a switch turned, or with the ids of two tokens exchanged."""
    plain = json.loads(content)
    tables = [table for table in (plain["pre_tokenizer"], plain["decoder"], plain["model"]) if table is not None]
    switches = [(table, name) for table in tables for name in table if isinstance(table[name], bool)]
    if draw.random() < 0.5:
        table, name = switches[draw.integers(len(switches))]
        table[name] = not table[name]
    else:
        vocab = plain["model"]["vocab"]
        first, second = draw.choice(sorted(vocab), 2, replace=False)
        vocab[first], vocab[second] = vocab[second], vocab[first]
    return json.dumps(plain, ensure_ascii=False).encode()


def numbers(bench: Bench, draw: np.random.Generator, workdir: pathlib.Path) -> None:
    """A number of a preset's config is one that makes sense nowhere: it is refused."""
    preset = PRESETS[str(draw.choice(sorted(PRESETS)))]
    plain = json.loads(json.dumps(to_dict(preset)))
    path = list(draw.choice(np.array([*_numbers_in(plain)], dtype=object)))
    value = NOWHERE[draw.integers(len(NOWHERE))]
    table = plain
    for name in path[:-1]:
        table = table[name]
    table[path[-1]] = value
    what = f"{preset.name} with {'.'.join(path)}={value!r}"
    try:
        from_dict(RunConfig, plain)
    except UserError:
        return
    except Exception as error:
        raise Broken(f"{what}: {type(error).__name__}: {error}") from error
    raise Broken(f"{what} is accepted")


NOWHERE = (float("nan"), float("-inf"), -(10**12), -1e300)


def _numbers_in(table: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all numbers in a config."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _numbers_in(value, (*path, name))
        elif isinstance(value, int | float) and not isinstance(value, bool) and (*path, name) != ("format",):
            yield (*path, name)


KINDS = {
    "kill": kill,
    "signals": signals,
    "damage": damage,
    "tokenizer": tokenizer,
    "disk": disk,
    "two": two,
    "fuzz": fuzz,
    "numbers": numbers,
}
FULL = {
    "kill": 100,
    "signals": 100,
    "damage": 500,
    "tokenizer": 405,
    "disk": 50,
    "two": 20,
    "fuzz": 1000,
    "numbers": 438,
}


def run_case(kind: str, seed: int, case: int, bench: Bench) -> str | None:
    """One case; gives what broke, with the command that repeats it, or None."""
    workdir = bench.folder / f"{kind}-{seed}-{case}"
    shutil.rmtree(workdir, ignore_errors=True)
    try:
        KINDS[kind](bench, np.random.default_rng([seed, case, *kind.encode()]), workdir)
    except Broken as broken:
        return f"{kind}, case {case}: {broken}\nrepeat: python -m tests.campaign {kind} --seed {seed} --case {case}"
    shutil.rmtree(workdir, ignore_errors=True)
    return None
