"""The training loop."""

import contextlib
import json
import math
import os
import pathlib
import shlex
import signal
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from etils import epath

from lm2_jax.checkpoint import Checkpoints
from lm2_jax.config import RunConfig, to_dict
from lm2_jax.data.base import Source
from lm2_jax.data.tokenizers import FileTokenizer, build_tokenizer
from lm2_jax.errors import UserError
from lm2_jax.folders import open_path
from lm2_jax.layout import Layout, sharded_shapes
from lm2_jax.model import LanguageModel
from lm2_jax.params import load_by_name, to_canonical
from lm2_jax.precision import prepare_numbers
from lm2_jax.training import hosts
from lm2_jax.training import workdir as workdirs
from lm2_jax.training.evaluate import host_batches, make_evaluate
from lm2_jax.training.lock import WorkdirLock
from lm2_jax.training.metrics import MetricsLog
from lm2_jax.training.objective import batch_shapes, evaluate_batch
from lm2_jax.training.profile import ProfileConfig, Profiler
from lm2_jax.training.progress import ProgressLine, Throughput, flops_per_token
from lm2_jax.training.replace import replacement
from lm2_jax.training.signals import StopSignals
from lm2_jax.training.state import Plan, TrainState, evaluation_params, make_plan, refusals
from lm2_jax.training.step import jit_train_step
from lm2_jax.training.watch import Watch
from lm2_jax.types import PyTree

FINISHED = (
    "This run is finished: step {steps} is the last of optim.steps={steps}. To train further, add "
    "`--optim.steps {more}` to the same command. The learning-rate schedule is then computed again for the new number "
    "of steps: from the next step on, the rate is that of a run of that length."
)


class FitResult(NamedTuple):
    """How a call of `fit` ended."""

    state: TrainState
    step: int
    stopped_by: int | None  # the signal that ended the run before its last step

    @property
    def status(self) -> int:
        """Exit status: 130 after Ctrl-C, else 0, also for a run that was asked to end: it has saved all it needs."""
        return 130 if self.stopped_by == signal.SIGINT else 0


def fit(
    config: RunConfig,
    workdir: epath.PathLike,
    layout: Layout,
    profile: ProfileConfig = ProfileConfig(),
    init_from: epath.PathLike | None = None,
    overwrite: bool = False,
) -> FitResult:
    """Trains a run to its last step, or resumes the one that the workdir holds.

    Args:
      config: of the run.
      workdir: folder or bucket.
      layout: where arrays are placed.
      profile: steps of which a trace is written, if any.
      init_from: workdir of another run, or a pretrained model, whose parameters a new run starts with as far as names
        agree; a run that is resumed ignores it.
      overwrite: whether a run that is in the workdir is replaced, see `lm2_jax.training.replace`.
    Raises:
      UserError: before anything is trained or changed, a workdir of another config or another process, one that cannot
        be written to or has no room, or no usable checkpoint among those there; later, a loss that is not finite or
        diverges, or a file that cannot be written.
    """
    prepare_jax(config)
    workdir = open_path(workdir, "--workdir")
    with StopSignals() as stop, workdirs.owned(workdir) as lock, replacement(workdir, lock, overwrite):
        run = prepare(config, workdir, layout)
        evaluate = hosts.run_on_all_hosts(lambda: make_evaluate(run.plan, run.source, layout))
        check_hosts(run.plan, workdir, layout, run.tokenizer)
        hosts.run_on_all_hosts(profile.prepare)
        hosts.run_on_all_hosts(lambda: workdirs.claim(workdir, config, run.tokenizer, run.exists))
        check = workdirs.resume_check(config, run.tokenizer)
        with layout.context(), Checkpoints(workdir, config, run.tokenizer.fingerprint, check) as checkpoints:
            return _train(run, workdir, layout, checkpoints, evaluate, profile, init_from, stop, lock)


def _train(
    run: "Prepared",
    workdir: epath.Path,
    layout: Layout,
    checkpoints: Checkpoints,
    evaluate: Callable[[PyTree], dict[str, float]],
    profile: ProfileConfig,
    init_from: epath.PathLike | None,
    stop: StopSignals,
    lock: WorkdirLock | None,
) -> FitResult:
    """The loop, in a workdir that belongs to this run."""
    plan, config, steps = run.plan, run.plan.config, run.plan.config.optim.steps
    train_step = jit_train_step(plan, layout)
    with ProgressLine(steps) as progress, _as_user_error(workdir, checkpoints):
        state, start, first_loss = begin(plan, layout, checkpoints)
        progress.say(describe(plan, layout, workdir, start) + replicated_arrays(state, layout))
        _say_start(progress, workdir, start, steps)
        if init_from is not None and start == 0:
            state, report = start_from(init_from, state, plan, layout)
            progress.say(report)
        throughput = Throughput(
            flops_per_token(config.model, plan.shapes.params), steps, state.step.sharding.device_set
        )
        data = host_batches(plan, run.source, layout, start)
        step, pending, last = start, None, start >= steps or stop.requested(start)
        with (
            MetricsLog(workdir, start, config.train.tracker, to_dict(config)) as log,
            Profiler(profile, start) as profiler,
        ):
            watch = Watch(config, checkpoints, log, progress, throughput, first_loss)
            while not last:
                profiler.before(step)
                with jax.transfer_guard("disallow"):
                    batch = layout.batch(next(data))
                    state, report = train_step(state, batch)
                profiler.after(step, report)
                if pending is not None:
                    watch.read(*pending)  # of the step before, while the device is busy with this one
                step, pending = step + 1, (step + 1, report)
                throughput.count(batch.tokens.size)
                last = step == steps or stop.requested(step)
                evaluates = config.train.eval_batches > 0 and (step == steps or _due(step, config.train.eval_every))
                saves = last or _due(step, config.checkpoint.every_steps)
                stop.finishing = last
                if evaluates or saves:
                    with watch.pause():
                        more = evaluate(evaluation_params(state)) if evaluates else None
                    watch.read(*pending, more)
                    pending = None
                if saves:
                    with watch.pause():
                        if lock is not None:
                            lock.check()
                        log.flush()  # every line up to a checkpoint is on the disk before the checkpoint is
                        checkpoints.save(step, state, watch.first_loss, last or _with_memory(step, config))
            stop.finishing = True
            progress.say(f"step {step}/{steps}: {checkpoints.finish()}")
    return FitResult(state, step, stop.caught if step < steps else None)


def _say_start(progress: ProgressLine, workdir: epath.Path, start: int, steps: int) -> None:
    if start < steps:
        progress.say(f"Live curves: tensorboard --logdir {shlex.quote(os.fspath(workdir))} (pip install tensorboard)")
        progress.compiling()
    else:
        progress.say(FINISHED.format(steps=steps, more=2 * steps))


@contextlib.contextmanager
def _as_user_error(workdir: epath.Path, checkpoints: Checkpoints) -> Iterator[None]:
    """A file that cannot be written is one message that names the last good checkpoint."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise UserError(f"{workdir}: writing failed: {error}. {checkpoints.last_good()}", status=1) from error


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _with_memory(step: int, config: RunConfig) -> bool:
    return (step // config.checkpoint.every_steps) % config.checkpoint.memory_every == 0


def prepare_jax(config: RunConfig) -> None:
    """Settings of the process: compiled programs are kept on disk, and float64 only where the config asks for it."""
    # XLA saves a program of several CPU devices without the order of its collectives: read back, it blocks forever.
    several = jax.default_backend() == "cpu" and jax.device_count() > 1
    if not several and jax.config.values["jax_compilation_cache_dir"] is None:  # or $JAX_COMPILATION_CACHE_DIR
        with contextlib.suppress(RuntimeError):  # a user without a home folder trains without a cache
            jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache" / "lm2_jax" / "xla"))
    prepare_numbers(config.model.precision)


class Prepared(NamedTuple):
    """A run before anything is computed."""

    plan: Plan
    tokenizer: FileTokenizer
    source: Source
    exists: bool  # whether the workdir holds checkpoints of it


def prepare(config: RunConfig, workdir: epath.Path, layout: Layout) -> Prepared:
    """Host-side setup: the workdir's checks, the tokenizer, the source, and the plan of the run."""

    def on_this_host() -> Prepared:
        exists = workdirs.check_owner(workdir, config)
        config.train.tracker.check()
        tokenizer = build_tokenizer(
            config.data.tokenizer,
            lambda: config.data.source.corpus(config.data.seed),
            config.model.vocab_size,
            workdir if exists else None,
        )
        source = config.data.source.build(tokenizer, config.model.segment_tokens, config.data.seed)
        plan = make_plan(config, LanguageModel(config.model))
        plan.shardings(layout)  # a dimension that does not divide is reported before anything is made
        with layout.context():
            check_trainable(plan)
        workdirs.check_space(workdir, config, plan.shapes)
        return Prepared(plan, tokenizer, source, exists)

    return hosts.run_on_all_hosts(on_this_host)


def check_hosts(plan: Plan, workdir: epath.Path, layout: Layout, tokenizer: FileTokenizer) -> None:
    """Refuses processes of one job that were started with other options or in other workdirs, on all of them."""
    if jax.process_count() == 1:
        return
    mesh = str(jax.tree.leaves(plan.shardings(layout)))
    hosts.check_same(config=json.dumps(to_dict(plan.config)), mesh=mesh, tokenizer=tokenizer.fingerprint)
    workdirs.check_shared(workdir)


def check_trainable(plan: Plan) -> None:
    """Runs the model on shapes, inside a layout's context.

    Raises:
      UserError: model, data and mesh do not fit together.
    """
    rows, segments = plan.config.data.rows // plan.config.optim.accumulate, plan.config.data.segments[0]
    batch = batch_shapes(rows, segments, plan.config.model.segment_tokens)
    memory = jax.eval_shape(lambda: plan.model.init_state(rows))
    with refusals():
        jax.eval_shape(
            lambda params, memory, batch: evaluate_batch(plan.model, plan.config, params, memory, batch),
            plan.shapes.params,
            memory,
            batch,
        )


def begin(plan: Plan, layout: Layout, checkpoints: Checkpoints) -> tuple[TrainState, int, float | None]:
    """The state to start from, its step, and the first loss where it is known: restored, or else new."""
    restored = checkpoints.restore(sharded_shapes(plan.shapes, plan.shardings(layout)))
    if restored is None:
        return plan.init(layout), 0, None
    return restored.state, int(restored.state.step), restored.first_loss


def start_from(source: epath.PathLike, state: TrainState, plan: Plan, layout: Layout) -> tuple[TrainState, str]:
    """A new run's state with the parameters of another run or of a pretrained model, as far as names agree.

    Args:
      source: workdir of the other run, whose memory and number of layers may be different, or a checkpoint as
        `lm2_jax.from_pretrained` reads it.
      state: initial state.
      plan: of the new run.
      layout: where arrays are placed.
    Returns:
      The state, and a report of what was taken.
    Raises:
      UserError: the other run cannot be read, or parameters of one name have other shapes.
    """
    from lm2_jax.interop.pretrained import from_pretrained  # loads what only other projects' files need

    run = from_pretrained(source, layout=layout)
    loaded = load_by_name(to_canonical(run.params), state.params)
    state = jax.jit(plan.first_state, out_shardings=plan.shardings(layout))(loaded.params)
    return state, loaded.report(f"step {run.step} of {os.fspath(source)}")


def replicated_arrays(state: PyTree, layout: Layout) -> str:
    """A warning about the largest arrays that are replicated on several devices, empty where there are none.

    It is no error: a mesh may have no axis for a dimension, as one of heads alone has none for a bank's slots.
    """
    lines, most = layout.replicated_arrays(state), 5
    if not lines:
        return ""
    more = [f"and {len(lines) - most} more; see --plan"] if len(lines) > most else []
    return "\n  ".join([f"\nwarning: {len(lines)} arrays are replicated on every device:", *lines[:most], *more])


def describe(plan: Plan, layout: Layout, workdir: epath.Path, start: int) -> str:
    """What is about to be trained, on what, and where."""
    count = sum(leaf.size for leaf in jax.tree.leaves(plan.shapes.params))
    shardings = jax.tree.leaves(plan.shardings(layout))
    on_device = sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(plan.shapes), shardings, strict=True)
    )
    devices = sorted(shardings[0].device_set, key=lambda device: device.id)
    verb = f"resuming after step {start}" if start else "starting"
    verb = "finished" if start >= plan.config.optim.steps else verb
    return (
        f"{plan.config.name}: {count:,} parameters, {on_device / 2**20:,.1f} MiB of train state on each of "
        f"{len(devices)} {devices[0].device_kind} devices; {verb} in {os.fspath(workdir)}"
    )
