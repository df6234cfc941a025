"""A memory added to a pretrained decoder, and the same model from scratch: bAbI's qa1 in real books.

    python -m benchmarks.grafted stories                                    # stories260K of $LM2_JAX_DATA
    python -m benchmarks.grafted stories --memories lm2 --starts lora --seeds 0      # a part of it
    python -m benchmarks.grafted smollm2 --source SmolLM2-135M-Instruct.Q4_1.gguf
    python -m benchmarks.grafted stories --print-budget                     # measures a step, trains nothing

Every arm is a memory and a start: all parameters from scratch, all from the checkpoint and all trained, or all from the
checkpoint with only the memory and low-rank adapters trained. Its learning rate is chosen from two with a development
seed, by the answers on training rows, which do not repeat. The background of the test is in books that training never
reads. Runs are in RUNS/<arm>/. The same command resumes: interrupted runs are continued, and what has its row in the
table's .json is not run again, also where RUNS is gone. Each training is a process of its own.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import tyro
from etils import epath

from benchmarks import grafted_table, origin
from benchmarks.grafted_arms import MEMORIES, SEARCH_SEED, STARTS, Arm, Folders, Training, base, donor, run_of
from lm2_jax import cli, formats
from lm2_jax.atomic import write_file
from lm2_jax.compare.jobs import DIVERGED
from lm2_jax.config import RunConfig, to_dict
from lm2_jax.errors import UserError
from lm2_jax.evaluation.names import model_name
from lm2_jax.interop.export import read_origin
from lm2_jax.interop.open_source import open_source
from lm2_jax.interop.workdir import import_source
from lm2_jax.model import LanguageModel
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from lm2_jax.state import state_floats
from lm2_jax.training.metrics import read_lines
from lm2_jax.training.state import make_plan
from lm2_jax.training.workdir import check_owner, read_config

DATA = pathlib.Path(os.environ.get("LM2_JAX_DATA", "../shared/data"))

MEASURED_STEPS, COMPILED_STEPS = 12, 4  # of --print-budget; the first of them include compilation


@dataclasses.dataclass(frozen=True)
class Command:
    """Options."""

    training: Training
    """What all arms have in common."""
    source: pathlib.Path = DATA / "checkpoints" / "stories260K" / "stories260K.bin"
    """The pretrained decoder: a folder or file as `lm2 import` reads it."""
    data: pathlib.Path = DATA
    """Folder with babi/en-10k and books."""
    memories: tuple[str, ...] = ("none", "lm2", "mag", "delta")
    """Memories: none lm2 mag mac delta."""
    starts: tuple[str, ...] = tuple(STARTS)
    """Starts: scratch trained lora."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of parameters and data."""
    learning_rates: tuple[float, ...] = (3e-3, 1e-3)
    """Rates to choose from for each arm; one: no search."""
    search_steps: int | None = None
    """Steps of a run of the search; None: a quarter of a reported run's."""
    test_books: int = 3
    """Books, the last by name, that training never reads and the background of the test is from."""
    lengths: tuple[str, ...] = ("0k", "1k", "2k", "4k")
    """Lengths of the contexts in the test, in GPT-2's tokens."""
    samples: int = 200
    """Questions of each length."""
    runs: pathlib.Path = pathlib.Path("runs/grafted")
    """Folder of the runs."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/grafted")
    """Table to write, as .json and .md."""
    print_budget: bool = False
    """Measures some steps of each arm, prints tokens and hours of the command, and trains nothing."""

    def check(self) -> None:
        """Raises UserError for a name that is none, and for missing files."""
        for what, names, known in (("memories", self.memories, MEMORIES), ("starts", self.starts, STARTS)):
            if unknown := sorted(set(names) - set(known)):
                raise UserError(f"--{what}: unknown {unknown}; known: {list(known)}")
        if not self.learning_rates:
            raise UserError("--learning-rates is empty; expected one rate, or several to choose from")
        if SEARCH_SEED in self.seeds:
            raise UserError(f"--seeds: {SEARCH_SEED} is the development seed; choose another")
        for path in (self.source, self.data / "babi" / "en-10k", self.data / "books"):
            if not path.exists():
                raise UserError(f"{path} does not exist; set $LM2_JAX_DATA, --data or --source")

    @property
    def arms(self) -> list[Arm]:
        """Every memory with every start."""
        return [Arm(memory, start) for memory in self.memories for start in self.starts]

    @property
    def steps_of_search(self) -> int:
        """Steps of a run of the search."""
        return self.search_steps or max(1, self.training.steps // 4)


STORIES = Command(Training(steps=3000, rows=4, segments=(4, 8), segment_tokens=256, remat="none"), search_steps=500)
SMOLLM2 = Command(
    Training(steps=300, rows=1, segments=(2, 4), segment_tokens=256, layers=(9, 19, 29), checkpoint_every=20),
    memories=("lm2",),
    starts=("lora",),
    seeds=(0,),
    learning_rates=(1e-3,),
    lengths=("0k", "1k", "2k"),
    samples=50,
    runs=pathlib.Path("runs/grafted_smollm2"),
    out=pathlib.Path("benchmarks/results/grafted_smollm2"),
)
ACCELERATOR = dataclasses.replace(
    SMOLLM2,
    training=Training(4000, 32, (4, 8), 256, dtype="bfloat16", layers=(4, 9, 14, 19, 24, 29)),
    memories=STORIES.memories,
    starts=STORIES.starts,
    seeds=STORIES.seeds,
    learning_rates=(1e-3, 3e-4),
    lengths=STORIES.lengths,
    samples=STORIES.samples,
    search_steps=500,
    runs=pathlib.Path("runs/grafted_smollm2_accelerator"),
    out=pathlib.Path("benchmarks/results/grafted_smollm2_accelerator"),
)
PLANS = {
    "stories": ("stories260K on a CPU", STORIES),
    "smollm2": ("SmolLM2-135M on a CPU, two hours", SMOLLM2),
    "smollm2_accelerator": ("SmolLM2-135M on an accelerator, all arms", ACCELERATOR),
}


class Diverged(Exception):
    """A training that diverged."""


def run(*words: str) -> None:
    """Runs one of the project's programs."""
    print(f"$ python {' '.join(words)}", flush=True)
    said: list[bytes] = []
    status = cli.run_program(*words, said=said)
    if status and DIVERGED.encode() in b"".join(said):
        raise Diverged
    if status:
        raise UserError(f"python {' '.join(words)} ended with status {status}", status=status)


def split_books(command: Command) -> tuple[Folders, pathlib.Path]:
    """Data of training, and the folder of the test's books; both have links to the books."""
    books = sorted((command.data / "books").glob("*.txt"))
    if not 0 < command.test_books < len(books):
        raise UserError(
            f"--test-books {command.test_books}: expected 1 to {len(books) - 1}, there are {len(books)} books"
        )
    parts = {"train": books[: -command.test_books], "test": books[-command.test_books :]}
    for name, of_part in parts.items():
        folder = command.runs.absolute() / f"books_{command.test_books}" / name
        folder.mkdir(parents=True, exist_ok=True)
        for book in of_part:
            link = folder / book.name
            if not link.is_symlink():
                link.symlink_to(book.resolve())
    folder = command.runs.absolute() / f"books_{command.test_books}"
    return Folders((command.data / "babi" / "en-10k").absolute(), folder / "train"), folder / "test"


def imported(memory: str, command: Command, folders: Folders) -> RunConfig:
    """The checkpoint with a memory as step 0 of a run, in RUNS/start/<memory>; returns its config."""
    workdir, training = start_of(memory, command), command.training
    layers = None if memory == "none" else training.layers
    if not workdir.exists():
        layout = Layout(make_mesh(MeshConfig(), jax.devices()[:1]))
        source, like = open_source(command.source), base(training, folders)
        print(f"importing {command.source} with memory {memory}: {workdir}", flush=True)
        import_source(source, workdir, layout, like, donor(memory), layers, training.segment_tokens, training.dtype)
    config = read_config(workdir)
    model, source = config.model, read_origin(workdir).get("source")
    found = (source, model.segment_tokens, model.precision.compute, getattr(model.join, "layers", None))
    wanted = (str(command.source), training.segment_tokens, training.dtype, layers)
    if found != wanted:
        raise UserError(
            f"{workdir} was imported with source, tokens of a segment, type and layers {found}, and not with {wanted}; "
            "choose another --runs"
        )
    return config


def start_of(memory: str, command: Command) -> pathlib.Path:
    return command.runs / "start" / memory


def train(arm: Arm, config: RunConfig, workdir: pathlib.Path, command: Command) -> None:
    """Trains one run, unless it is trained already; raises `Diverged` where it does."""
    check_owner(epath.Path(workdir), config)  # an existing run may be of another definition of the arm
    if (workdir / "checkpoints" / str(config.optim.steps)).is_dir():
        return
    workdir.parent.mkdir(parents=True, exist_ok=True)
    file = workdir.with_name(f"{workdir.name}.json")
    write_file(epath.Path(file), (json.dumps(to_dict(config), indent=1) + "\n").encode())
    first = () if arm.start == "scratch" else ("--init.from", str(start_of(arm.memory, command)))
    run("train.py", "--config", str(file), "--workdir", str(workdir), *first)
    if not (workdir / "checkpoints" / str(config.optim.steps)).is_dir():
        raise UserError(f"{workdir} was asked to end before its last step; the same command again continues", status=1)


def choose_rate(arm: Arm, command: Command) -> tuple[float, dict[str, float | None]]:
    """The learning rate of an arm, and the answer loss of each candidate; None where it diverged."""
    if len(command.learning_rates) == 1:
        return command.learning_rates[0], {}
    folders, _ = split_books(command)
    config = imported(arm.memory, command, folders)
    scores: dict[str, float | None] = {}
    for rate in command.learning_rates:
        steps = command.steps_of_search
        workdir = command.runs / str(arm) / f"search_{rate:g}_{steps}"
        mark = diverged_mark(workdir)
        if not mark.exists():
            try:
                train(arm, run_of(arm, config, command.training, folders, SEARCH_SEED, rate, steps), workdir, command)
            except Diverged:
                mark.touch()
        scores[f"{rate:g}"] = None if mark.exists() else last_answers(workdir)
    found = {rate: score for rate, score in scores.items() if score is not None}
    if not found:
        raise UserError(f"every learning rate of {arm} diverged; give lower ones with --learning-rates", status=1)
    return float(min(found, key=lambda rate: found[rate])), scores


def diverged_mark(workdir: pathlib.Path) -> pathlib.Path:
    """A file that says that a run diverged, so that it is not tried again."""
    return workdir.with_name(f"{workdir.name}.diverged")


def last_answers(workdir: pathlib.Path) -> float:
    """Mean loss of answers over the last quarter of the logged steps; rows of training do not repeat."""
    losses = [line["answer_loss"] for line in read_lines(workdir) if "answer_loss" in line]
    return float(np.mean(losses[-max(1, len(losses) // 4) :]))


def evaluate(workdir: pathlib.Path, books: pathlib.Path, command: Command) -> dict[str, Any]:
    """The report of `eval.py babilong`."""
    data = ("--babi-dir", str((command.data / "babi" / "en-10k").absolute()), "--books-dir", str(books))
    lengths, samples = ("--lengths", *command.lengths), ("--samples", str(command.samples))
    run("eval.py", "babilong", "--workdir", str(workdir), *data, *lengths, *samples)
    return json.loads((workdir / "eval" / "babilong.json").read_text())


def sizes(config: RunConfig) -> dict[str, int]:
    """Parameters, those that are trained, and floats of state per row."""
    plan = make_plan(config, LanguageModel(config.model))
    leaves, kept = jax.tree.leaves(plan.shapes.params), jax.tree.leaves(plan.trainable)
    return {
        "parameters": sum(leaf.size for leaf in leaves),
        "trained_parameters": sum(leaf.size for leaf, is_trained in zip(leaves, kept, strict=True) if is_trained),
        "state_floats": state_floats(jax.eval_shape(lambda: plan.model.init_state(1))),
        "tokens": config.optim.steps * tokens_of_step(config),
    }


def tokens_of_step(config: RunConfig) -> int:
    return config.data.rows * max(config.data.segments) * config.model.segment_tokens


def measure(arm: Arm, seed: int, chosen: tuple[float, dict[str, float | None]], command: Command) -> dict[str, Any]:
    """Trains and evaluates one run."""
    folders, books = split_books(command)
    rate, search = chosen
    start, training = imported(arm.memory, command, folders), command.training
    config = run_of(arm, start, training, folders, seed, rate, training.steps)
    workdir = command.runs / str(arm) / f"seed_{seed}"
    mark, report = diverged_mark(workdir), None
    if not mark.exists():
        try:
            train(arm, config, workdir, command)
            report = evaluate(workdir, books, command)
        except Diverged:
            mark.touch()
    return {
        "memory": arm.memory,
        "start": arm.start,
        "seed": seed,
        "model": model_name(config.model),
        "diverged": report is None,
        "checkpoint": command.source.name,
        "learning_rate": rate,
        "search": search,
        "search_steps": command.steps_of_search,
        "config": digest_of(arm, start, command, folders),
        "asked": [*command.lengths, command.samples],
        "steps": training.steps,
        **sizes(config),
        "test_books": sorted(book.name for book in books.iterdir()),
        "results": [] if report is None else report["results"],
        "command": origin.typed("benchmarks.grafted"),
        "machine": origin.cores(),
    }


def digest_of(arm: Arm, start: RunConfig, command: Command, folders: Folders) -> str:
    """A hash of an arm's config, but for its rate and seed and for where files are."""
    plain = to_dict(run_of(arm, start, command.training, folders, SEARCH_SEED, 1.0, command.training.steps))
    del plain["data"]["source"]["babi_dir"], plain["data"]["source"]["books_dir"], plain["data"]["tokenizer"]["path"]
    return formats.digest(plain)


def known_rate(arm: Arm, command: Command, rows: Iterable[grafted_table.Row]) -> Any:
    """The rate of an arm and its search, from a row of the same config; None where there is none."""
    folders, _ = split_books(command)
    config = digest_of(arm, imported(arm.memory, command, folders), command, folders)
    tried = {f"{rate:g}" for rate in command.learning_rates} if len(command.learning_rates) > 1 else set()
    for row in rows:
        is_arm = (row["memory"], row["start"], row.get("config")) == (arm.memory, arm.start, config)
        if is_arm and set(row["search"]) == tried and (not tried or row["search_steps"] == command.steps_of_search):
            return row["learning_rate"], row["search"]
    return None


def is_measured(arm: Arm, seed: int, rate: float, command: Command, rows: Iterable[grafted_table.Row]) -> bool:
    """Whether a row says what the command would measure."""
    folders, _ = split_books(command)
    config = digest_of(arm, imported(arm.memory, command, folders), command, folders)
    wanted = (arm.memory, arm.start, seed, config, rate, [*command.lengths, command.samples])
    names = ("memory", "start", "seed", "config", "learning_rate", "asked")
    return any(tuple(row.get(name) for name in names) == wanted for row in rows)


def main() -> None:
    """Trains what is missing, evaluates, and writes the table."""
    command = tyro.extras.overridable_config_cli(PLANS, description=__doc__)
    command.check()
    jax.config.update("jax_platforms", "cpu")  # of this process alone, which must not hold the accelerator
    if command.print_budget:
        print(budget(command))
        return
    file = command.out.with_suffix(".json")
    held = json.loads(file.read_text())["results"] if file.exists() else []
    rows = {grafted_table.identity(row): row for row in held}
    chosen = {}
    for seed in command.seeds:
        for arm in command.arms:
            if arm not in chosen:
                chosen[arm] = known_rate(arm, command, rows.values()) or choose_rate(arm, command)
            if is_measured(arm, seed, chosen[arm][0], command, rows.values()):
                continue
            row = measure(arm, seed, chosen[arm], command)
            rows[grafted_table.identity(row)] = row
            grafted_table.write([rows[key] for key in sorted(rows)], command.out)
    print(grafted_table.table(list(rows.values())))


def budget(command: Command) -> str:
    """Tokens and hours of the command, from the seconds of a measured step of each arm."""
    folders, _ = split_books(command)
    searched = len(command.learning_rates) if len(command.learning_rates) > 1 else 0
    steps = command.training.steps * len(command.seeds) + command.steps_of_search * searched
    lines = ["| arm | seconds per step | steps | tokens | hours of training |", "|---|---|---|---|---|"]
    total = 0.0
    for arm in command.arms:
        start = imported(arm.memory, command, folders)
        config = run_of(arm, start, command.training, folders, SEARCH_SEED, 1e-5, MEASURED_STEPS)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, log_every=1))
        workdir = command.runs / str(arm) / "budget"
        shutil.rmtree(workdir, ignore_errors=True)
        try:
            train(arm, config, workdir, command)
        except Diverged as error:
            raise UserError(f"{arm} diverged in {MEASURED_STEPS} steps at a rate of 1e-5", status=1) from error
        rates = [line["tokens_per_second"] for line in read_lines(workdir)[COMPILED_STEPS:]]
        seconds = tokens_of_step(config) / float(np.median(rates))
        hours = seconds * steps / 3600
        total += hours
        lines.append(f"| {arm} | {seconds:.2f} | {steps:,} | {steps * tokens_of_step(config):,} | {hours:.1f} |")
        shutil.rmtree(workdir)
    note = "Evaluation comes on top of it: about a third of the time of training for each token of the test."
    return "\n".join([*lines, "", f"Together {total:.1f} hours on {origin.cores()}. {note}"])


if __name__ == "__main__":
    cli.run(main)
