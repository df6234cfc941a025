"""Runs as processes of their own, several at a time; what is finished is not run again."""

import json
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from lm2_jax import cli
from lm2_jax.compare.finished import Finished
from lm2_jax.compare.protocol import Job
from lm2_jax.errors import UserError
from lm2_jax.training.metrics import read_lines

WORKDIR_OPTION = {"recall": "--workdirs", "babilong": "--workdir"}  # of the suites that can judge a run
DIVERGED = "Training stopped:"  # how the message of a run that diverged begins


class Runner:
    """Trains and evaluates runs.

    Args:
      options: more options of every training.
      evaluation: a suite of `lm2 eval` and its options, by which `evaluate` judges a run.
      parallel: processes at a time; on Linux each has its share of the cores.
      show: prints a line.
      finished: results that exist, and where new ones are kept; None: they are in the folders of the runs alone.
    """

    def __init__(
        self,
        options: Sequence[str],
        evaluation: Sequence[str],
        parallel: int,
        show: Callable[[str], None],
        finished: Finished | None = None,
    ):
        self._options, self._evaluation, self._parallel, self._show = list(options), evaluation, parallel, show
        self._finished = finished
        self._cores = _shares(parallel)
        self._free = list(range(parallel))
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def search(self, jobs: Iterable[Job]) -> dict[Job, dict[str, float] | None]:
        """The held-out metrics of each run at its end; None for a run that diverged, which is not tried again.

        Args:
          jobs: the runs; one that is finished is only read, an interrupted one is resumed.
        Raises:
          UserError: a run failed; the others that were under way can be resumed.
        """
        return self._each(jobs, lambda job, share: self._metrics(job, share, may_diverge=True))

    def report(
        self, jobs: Iterable[Job], is_judged: Callable[[dict[str, float]], bool]
    ) -> dict[Job, tuple[dict[str, float], list[dict[str, Any]]]]:
        """The held-out metrics of each run at its end, and the results of the suite, one for each length, and task.

        A run is evaluated when it is trained, so that what is finished does not need its folder any more.

        Args:
          jobs: the runs, as for `search`.
          is_judged: whether the suite suits a run with these metrics; if not, it has no results.
        Raises:
          UserError: a run failed, or diverged.
        """
        suite, *options = self._evaluation

        def call(job: Job, share: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
            metrics = self._metrics(job, share, may_diverge=False)

            def evaluate() -> list[dict[str, Any]]:
                if not is_trained(job):  # its metrics are kept, but its folder is gone
                    self._train(job, share, may_diverge=False)
                return self._evaluate(job, share)

            return metrics, self._once(job, suite, options, evaluate) if is_judged(metrics) else []

        return self._each(jobs, call)

    def _metrics(self, job: Job, share: int, may_diverge: bool) -> Any:
        return self._once(job, "metrics", None, lambda: self._train(job, share, may_diverge))

    def _once(self, job: Job, what: str, asked: Sequence[str] | None, call: Callable[[], Any]) -> Any:
        """A result that is kept, or a new one."""
        if self._finished is None:
            return call()
        found = self._finished.find(job, what, asked)
        return (found or self._finished.add(job, what, asked, call()))["value"]

    def _each(self, jobs: Iterable[Job], call: Callable[[Job, int], Any]) -> dict[Job, Any]:
        """Calls for each run, as many at a time as there are shares."""
        jobs = list(jobs)

        def in_share(job: Job) -> Any:
            with self._lock:
                share = self._free.pop()
            try:
                return call(job, share)
            finally:
                with self._lock:
                    self._free.append(share)

        with ThreadPoolExecutor(self._parallel) as pool:
            futures = [pool.submit(in_share, job) for job in jobs]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                return {job: future.result() for job, future in zip(jobs, futures, strict=True)}
            except BaseException:
                for future in futures:
                    future.cancel()
                self._stop()
                raise

    def _stop(self) -> None:
        """Lets the processes save and end."""
        with self._lock:
            self._stopped = True
            running = list(self._processes)
        for process in running:
            process.terminate()

    def _train(self, job: Job, share: int, may_diverge: bool) -> dict[str, float] | None:
        mark = job.workdir / "diverged"
        if mark.exists():
            return None
        words = ["train", job.preset, "--workdir", str(job.workdir)]
        for name, value in (
            ("optim.learning_rate", f"{job.learning_rate:g}"),
            ("optim.steps", job.steps),
            ("train.seed", job.seed),
            ("data.seed", job.seed),
        ):
            words += [f"--{name}", str(value)]
        if not is_trained(job):
            self._show(f"training {job.preset}, rate {job.learning_rate:g}, seed {job.seed}: {job.workdir}")
            status, error = self._run([*words, *self._options], share)
            if status and may_diverge and DIVERGED in error:
                mark.write_text(error)
                self._show(f"  it diverged: {job.workdir}")
                return None
            if status:
                raise UserError(
                    f"compare: the run {job.workdir} ended with status {status}: {error.strip() or 'no message'}. The "
                    "same command again resumes the comparison",
                    status=1,
                )
        found = final_metrics(job.workdir, job.steps)
        if found is None:
            raise UserError(f"compare: {job.workdir} has no metrics of step {job.steps}; was it interrupted?", status=1)
        return found

    def _evaluate(self, job: Job, share: int) -> list[dict[str, Any]]:
        suite, *options = self._evaluation
        out = job.workdir / "eval" / "compare"
        file, asked = out / f"{suite}.json", out / "options.json"
        wanted = json.dumps([job.steps, *self._evaluation])
        if not file.exists() or not asked.exists() or asked.read_text() != wanted:
            self._show(f"evaluating {job.workdir}")
            words = ["eval", suite, WORKDIR_OPTION[suite], str(job.workdir), "--out", str(out), *options]
            status, error = self._run(words, share)
            if status:
                raise UserError(
                    f"compare: the evaluation of {job.workdir} ended with status {status}: "
                    f"{error.strip() or 'no message'}",
                    status=1,
                )
            asked.write_text(wanted)
        results = json.loads(file.read_text())["results"]
        return [{name: value for name, value in result.items() if name != "workdir"} for result in results]

    def _run(self, words: list[str], share: int) -> tuple[int, str]:
        """Exit status, and the last error message, of one of our programs."""
        name, *rest = words
        command = [sys.executable, *cli.program_words(name), *rest]
        with self._lock:
            if self._stopped:
                return 1, "the comparison was stopped"
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            self._processes.add(process)
        if (cores := self._cores[share]) is not None:
            os.sched_setaffinity(process.pid, cores)  # before it has started a thread
        try:
            _, error = process.communicate()
        finally:
            with self._lock:
                self._processes.discard(process)
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        return process.returncode, lines[-1].removeprefix("error: ") if lines else error[-500:]


def final_metrics(workdir: pathlib.Path, steps: int) -> dict[str, float] | None:
    """The held-out metrics at the last step of a run, or None where it has not come there."""
    if not workdir.is_dir():
        return None
    last = next((line for line in reversed(read_lines(workdir)) if line["step"] == steps), None)
    found = {} if last is None else {name: value for name, value in last.items() if name.startswith("eval_")}
    return found or None


def is_trained(job: Job) -> bool:
    """Whether the workdir of a run has its last checkpoint and metrics."""
    has_checkpoint = (job.workdir / "checkpoints" / str(job.steps)).is_dir()
    return has_checkpoint and final_metrics(job.workdir, job.steps) is not None


def score(metrics: dict[str, float] | None) -> float:
    """What the search maximises: held-out accuracy of answers, or where there are none minus the held-out loss."""
    if metrics is None:
        return -float("inf")
    return metrics.get("eval_answer_accuracy", -metrics["eval_loss"])


def _shares(parallel: int) -> list[set[int] | None]:
    """The cores of each process; None: all."""
    if parallel == 1 or not hasattr(os, "sched_getaffinity"):
        return [None] * parallel
    cores = sorted(os.sched_getaffinity(0))
    if parallel > len(cores):
        return [None] * parallel
    return [set(cores[share::parallel]) for share in range(parallel)]
