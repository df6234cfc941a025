"""Results of finished runs in one small file, so that their folders can be deleted or left on another machine."""

import json
import pathlib
import threading
from typing import Any

from lm2_jax import atomic, formats
from lm2_jax.compare.protocol import Job
from lm2_jax.config import RunConfig
from lm2_jax.config_file import to_dict
from lm2_jax.errors import UserError

FILE = "finished.jsonl"
OF_JOB = ("optim.steps", "optim.learning_rate", "train.seed", "data.seed")  # a job has its own values


class Finished:
    """Results by run: a line of FILE each, with the digest of the run's config.

    Args:
      folder: of the comparison.
      configs: by preset, with the options of every training. A result of another config is not used.
      machine: on which new results are computed.
    Raises:
      UserError: FILE is damaged.
    """

    def __init__(self, folder: pathlib.Path, configs: dict[str, RunConfig], machine: str):
        self._path, self._machine = folder / FILE, machine
        self._digests = {preset: config_digest(config) for preset, config in configs.items()}
        self._lock = threading.Lock()
        self._records: dict[str, dict[str, Any]] = {}
        for record in _read(self._path):
            self._records[_key(record)] = record

    def find(self, job: Job, what: str, asked: Any) -> dict[str, Any] | None:
        """The record of a result; None where there is none.

        Args:
          job: the run.
          what: `metrics`, or the name of a suite.
          asked: how it was measured, as JSON types.
        """
        return self._records.get(_key(self._identity(job, what, asked)))

    def add(self, job: Job, what: str, asked: Any, value: Any) -> dict[str, Any]:
        """Writes a result and returns its record."""
        record = self._identity(job, what, asked) | {"machine": self._machine, "value": value}
        with self._lock:
            self._records[_key(record)] = record
            lines = [json.dumps(self._records[key], sort_keys=True) for key in sorted(self._records)]
            atomic.write_file(self._path, "\n".join([*lines, ""]))
        return record

    def machines(self) -> str:
        """Every machine that results of these configs come from."""
        digests = set(self._digests.values())
        return "; ".join(sorted({r["machine"] for r in self._records.values() if r["config"] in digests}))

    def _identity(self, job: Job, what: str, asked: Any) -> dict[str, Any]:
        return {
            "preset": job.preset,
            "learning_rate": job.learning_rate,
            "seed": job.seed,
            "steps": job.steps,
            "config": self._digests[job.preset],
            "what": what,
            "asked": asked,
        }


def config_digest(config: RunConfig) -> str:
    """A hash of a config but for the values that a job has for itself."""
    plain = to_dict(config)
    for path in OF_JOB:
        section, name = path.split(".")
        del plain[section][name]
    return formats.digest(plain)


def _key(record: dict[str, Any]) -> str:
    identity = {name: value for name, value in record.items() if name not in ("machine", "value")}
    return json.dumps(identity, sort_keys=True)


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            _ = record["machine"], record["value"], record["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: damaged ({type(error).__name__}: {error}). Remove it: the same command reads results from the "
            "folders of the runs, and runs again what has none",
            status=1,
        ) from error
    return records
