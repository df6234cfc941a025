"""Optional experiment trackers: they get the lines of `metrics.jsonl`, and no step twice.

A run is known to the tracker by an id that is kept in the workdir's `tracker.json`, so a resumed run continues there.
Steps that were logged before a crash are not sent again: a resumed run computes the same values.
"""

import abc
import dataclasses
import importlib
import json
import os
import sys
import uuid
from typing import Any, ClassVar, Literal, NamedTuple

from etils import epath

from lm2_jax.atomic import write_file
from lm2_jax.errors import UserError
from lm2_jax.registry import Family

FILE = "tracker.json"


class Tracker(abc.ABC):
    """Where metrics are sent."""

    @abc.abstractmethod
    def log(self, step: int, values: dict[str, float]) -> None:
        """Sends the line of one step."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Sends what is waiting."""


@dataclasses.dataclass(frozen=True)
class TrackerConfig(Family):
    """Base of the trackers; `train.tracker` of a run."""

    def check(self) -> None:
        """Raises UserError if the tracker's library is missing."""

    def open(self, run_id: str, name: str, config: dict[str, Any]) -> Tracker | None:
        """Connects to the tracker.

        Args:
          run_id: the run's id there; the run is made, or resumed if it exists.
          name: what the run is called.
          config: the run's config, to be shown.
        Raises:
          UserError: the tracker's library is missing, or it refuses.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class NoTracker(TrackerConfig):
    """Metrics are in the workdir only: `metrics.jsonl` and TensorBoard."""

    kind: ClassVar[str] = "none"

    def open(self, run_id: str, name: str, config: dict[str, Any]) -> None:
        """Nothing."""


@dataclasses.dataclass(frozen=True)
class LibraryConfig(TrackerConfig, abstract=True):
    """Base of trackers that are a library of the name of their kind."""

    project: str = "lm2_jax"
    """Project of the run."""

    def options(self, run_id: str, name: str) -> dict[str, Any]:
        """What the library's `init` gets in addition to the project and the config."""
        raise NotImplementedError

    def check(self) -> None:
        """See the base class."""
        _library(self.kind)

    def open(self, run_id: str, name: str, config: dict[str, Any]) -> Tracker:
        """See the base class."""
        library = _library(self.kind)
        options = {"project": self.project, "resume": "allow", "config": config, **self.options(run_id, name)}
        started = _started(self.kind, lambda: library.init(**options))
        return _Sending(lambda step, values: started.log(values, step=step), started.finish)


@dataclasses.dataclass(frozen=True)
class Wandb(LibraryConfig):
    """Weights & Biases (`pip install wandb`)."""

    kind: ClassVar[str] = "wandb"
    entity: str | None = None
    """User or team; None: the default of the account."""
    mode: Literal["online", "offline"] = "online"
    """Offline: files in the folder `wandb`, which `wandb sync` sends later."""

    def options(self, run_id: str, name: str) -> dict[str, Any]:
        """The id resumes a run."""
        return {"entity": self.entity, "mode": self.mode, "id": run_id, "name": name}


@dataclasses.dataclass(frozen=True)
class Trackio(LibraryConfig):
    """Trackio, with runs on this machine or in a space of the Hugging Face hub (`pip install trackio`)."""

    kind: ClassVar[str] = "trackio"
    space_id: str | None = None
    """Space `owner/name` of the hub; None: this machine."""

    def options(self, run_id: str, name: str) -> dict[str, Any]:
        """Runs are known by their names."""
        return {"space_id": self.space_id, "name": f"{name}-{run_id}"}


class _Sending(Tracker):
    """A tracker whose failures do not stop the training: the first one is reported, and nothing is sent after it."""

    def __init__(self, log: Any, finish: Any):
        self._log, self._finish, self._failed = log, finish, False

    def log(self, step: int, values: dict[str, float]) -> None:
        self._try(lambda: self._log(step, values))

    def finish(self) -> None:
        self._try(self._finish)

    def _try(self, call: Any) -> None:
        if self._failed:
            return
        try:
            call()
        except Exception as error:
            self._failed = True
            print(
                f"warning: the tracker failed and gets no more metrics: {type(error).__name__}: {error}. "
                "metrics.jsonl has all of them; a resumed run sends those after the last step it had logged.",
                file=sys.stderr,
            )


class Opened(NamedTuple):
    """A tracker that is ready."""

    tracker: Tracker
    is_resumed: bool  # it has metrics of an earlier start


def open_tracker(tracker: TrackerConfig, workdir: epath.Path, config: dict[str, Any]) -> Opened | None:
    """Connects to the tracker of a run, under the id that its workdir keeps; None where there is no tracker.

    Args:
      tracker: the config.
      workdir: of the run.
      config: the run's config, to be shown.
    Raises:
      UserError: as `TrackerConfig.open`, or the file with the id is damaged.
    """
    if isinstance(tracker, NoTracker):
        return None
    path = workdir / FILE
    ids: dict[str, str] = {}
    if path.exists():
        try:
            ids = {str(kind): str(found) for kind, found in json.loads(path.read_text()).items()}
        except (ValueError, AttributeError, RecursionError) as error:
            message = f"{path} is damaged; remove it, and the tracker takes what follows as a new run"
            raise UserError(message, status=1) from error
    is_resumed = tracker.kind in ids
    if not is_resumed:
        ids[tracker.kind] = uuid.uuid4().hex[:12]
        write_file(path, json.dumps(ids, indent=1) + "\n")
    name = os.path.basename(os.fspath(workdir).rstrip("/")) or "run"
    opened = tracker.open(ids[tracker.kind], name, config)
    return None if opened is None else Opened(opened, is_resumed)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"train.tracker of kind {name!r} needs the package {name}, which is not installed: pip install {name}; or "
            "set --train.tracker none"
        ) from error


def _started(name: str, start: Any) -> Any:
    try:
        return start()
    except Exception as error:
        offline = " --train.tracker.mode offline keeps its files here;" if name == "wandb" else ""
        raise UserError(
            f"train.tracker: {name} could not start: {type(error).__name__}: {error}.{offline} "
            "--train.tracker none trains without it",
            status=1,
        ) from error
