"""Merged memories: what answers from a sum of two memories know, compared with reading both texts in a row.

    python -m benchmarks.merge_memories                             # both arms, one run of each
    python -m benchmarks.merge_memories --arms gated_delta --no-train   # with the newest checkpoint

Two small models learn the recall task of configs/probe.py: who is where, with questions throughout the text. Then each
row of the experiment has two texts of held-out prose and statements: A about two of the four persons, B about the other
two. Both are read into memories of their own, and a question about John (text A) or Daniel (text B) is asked after

- memory A, and memory B;
- the merged memory (`lm2_jax.inference.merging`); for Titans also with the momentum set to 0 after the merge;
- A and then B, read in a row;
- nothing.

Texts end at a segment border, so no answer is in the segment of the question. Training questions are about one person
(Daniel) first, then two (John), then four, so that a run that was stopped in the second stage can be evaluated.

Runs are in runs/merge/<arm>_<steps>. The same command resumes: a finished run is not trained again, an interrupted one
continues. Rows of other arms, steps and lengths in the table's .json are kept.
"""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import origin
from lm2_jax import cli
from lm2_jax.data.babi import PLACES, Query, write_question
from lm2_jax.data.background import open_background
from lm2_jax.data.philox import Draws
from lm2_jax.data.text_tokens import Encoder, noise
from lm2_jax.data.worlds import World, word
from lm2_jax.errors import UserError
from lm2_jax.evaluation.names import model_name
from lm2_jax.inference.merging import merge_states
from lm2_jax.model import LanguageModel, ModelState
from lm2_jax.runs import Run, load_run

RUNS = pathlib.Path("runs/merge")
RESULTS = pathlib.Path("benchmarks/results/merge_memories")
PERSONS = (("John", "Mary"), ("Daniel", "Sandra"))  # of text A and of text B; the first is asked about
NOISE_SHARE = 0.2  # as in training
MEMORIES = {
    "gated_delta": ("gated_delta", "--model.memory.num-heads", "4", "--model.memory.chunk-tokens", "32"),
    "titans": ("titans", "--model.memory.num-heads", "4", "--model.memory.chunk-tokens", "16"),
}
CONDITIONS = {
    "A": "memory A",
    "B": "memory B",
    "merged": "merged",
    "merged_no_momentum": "merged, momentum 0",
    "in_a_row": "A then B in a row",
    "nothing": "nothing",
}
Row = dict[str, Any]  # of the .json: one arm, number of steps and length


@dataclasses.dataclass(frozen=True)
class Command:
    """Options."""

    arms: tuple[str, ...] = tuple(MEMORIES)
    """Memories to compare, of `gated_delta` and `titans`; each alone mixes the tokens of its decoder (join `mixer`)."""
    steps: int = 600
    """Steps of training, with 16 rows of 4 segments of 32 tokens each."""
    train: bool = True
    """Whether to train what is missing first; else the newest checkpoint is evaluated, whatever its step."""
    segments: tuple[int, ...] = (1, 2, 4)
    """Lengths of each text, in segments."""
    rows: int = 512
    """Pairs of texts per length."""
    seed: int = 0
    """Seed of the texts."""
    out: pathlib.Path = RESULTS
    """Table to write, as .json and .md."""


class Texts(NamedTuple):
    """Texts about some persons, and a question about one of them each."""

    tokens_BS: np.ndarray
    question_BQ: np.ndarray
    answer_B: np.ndarray  # tokens


def words(arm: str, steps: int) -> list[str]:
    """The training command of an arm."""
    return [
        "train.py", "probe_lmm", "--workdir", str(workdir(arm, steps)), "--model.memory", *MEMORIES[arm],
        "--model.remat", "none", "--optim.steps", str(steps), "--data.source.asked", "1", "2", "4",
        "--data.source.asked-steps", str(steps * 3 // 16), str(steps * 7 // 16), "--data.rows", "16",
        "--train.eval-every", "0", "--checkpoint.every-steps", "50",
    ]  # fmt: skip


def workdir(arm: str, steps: int) -> pathlib.Path:
    """Where the run of an arm is."""
    return RUNS / f"{arm}_{steps}"


def trained(arm: str, steps: int, may_train: bool) -> Run:
    """The run of an arm; it is trained unless it is already, or unless `may_train` is false."""
    if may_train and not (workdir(arm, steps) / "checkpoints" / str(steps)).is_dir():
        command = words(arm, steps)
        print(f"$ python {' '.join(command)}", flush=True)
        if status := cli.run_program(*command):
            raise UserError(f"the run {workdir(arm, steps)} ended with status {status}", status=status)
    return load_run(workdir(arm, steps))


def make_texts(run: Run, persons: tuple[str, ...], segments: int, rows: int, seed: int, stream: int) -> Texts:
    """Held-out texts of exactly so many segments."""
    encode, T = Encoder(run.tokenizer), run.config.model.segment_tokens
    pairs = [_text(encode, persons, segments * T, Draws(seed, stream, row)) for row in range(rows)]
    tokens, queries, places = zip(*pairs, strict=True)
    questions = [encode.question(write_question(query)) for query in queries]
    answers = [encode(place)[0] for place in places]
    if len({len(question) for question in questions}) > 1:
        raise UserError("questions about different persons have different lengths under this tokenizer", status=1)
    return Texts(np.array(tokens, np.int32), np.array(questions, np.int32), np.array(answers, np.int32))


def _text(encode: Encoder, persons: tuple[str, ...], size: int, draws: Draws) -> tuple[list[int], Query, str]:
    """Statements about the persons with prose in between; where somebody is whom it mentions."""
    world, tokens, mentioned = World(draws, persons, (), ("move",)), [], {}
    prose = noise(open_background(None), encode, draws, True, (1, None))
    while True:
        if mentioned and draws.chance(NOISE_SHARE):
            tokens += next(prose)[1][: size - len(tokens)]
            continue
        event = world.act(persons if persons[0] in mentioned else persons[:1], PLACES)
        ids = encode(word(event, 0.0, draws))
        if len(tokens) + len(ids) > size:
            break
        tokens += ids
        person, place = event.words
        mentioned[person] = place
    while len(tokens) < size:
        tokens += next(prose)[1][: size - len(tokens)]
    person = persons[0]
    return tokens, Query("where_person", (person,)), mentioned[person]


@functools.partial(jax.jit, static_argnums=0)
def _segment(
    model: LanguageModel, params: Any, state: ModelState, tokens_BT: Any, count: Any
) -> tuple[Any, ModelState]:
    """Logits after the first `count` tokens of a segment, the rest of which is padding, and the state."""
    valid_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]) < count, tokens_BT.shape)
    out = model.apply({"params": params}, tokens_BT, state, None, valid_BT, method="forward")
    last_B1D = jax.lax.dynamic_slice_in_dim(out.hidden, count - 1, 1, axis=1)  # pyright: ignore
    logits_B1V = model.apply({"params": params}, last_B1D, method="logits")
    return logits_B1V[:, 0], out.state  # pyright: ignore


def read(run: Run, tokens_BS: np.ndarray, state: ModelState) -> ModelState:
    """The state after a text of full segments."""
    T = run.config.model.segment_tokens
    for first in range(0, tokens_BS.shape[1], T):
        _, state = _segment(run.model, run.params, state, tokens_BS[:, first : first + T], T)
    return state


def states(run: Run, a: Texts, b: Texts) -> dict[str, ModelState]:
    """The state of each condition, all at a segment border."""
    nothing = run.model.init_state(len(a.tokens_BS))
    after_a, after_b = (read(run, texts.tokens_BS, nothing) for texts in (a, b))
    merged = merge_states(run, [after_a, after_b])
    made = {
        "A": after_a,
        "B": after_b,
        "merged": merged,
        "in_a_row": read(run, b.tokens_BS, after_a),
        "nothing": nothing,
    }
    if hasattr(merged.groups[0].memory, "momentum"):
        made["merged_no_momentum"] = merged._replace(groups=tuple(_without_momentum(group) for group in merged.groups))
    return {name: made[name] for name in CONDITIONS if name in made}


def _without_momentum(group: Any) -> Any:
    memory = group.memory
    return group._replace(memory=memory._replace(momentum=tuple(jnp.zeros_like(m) for m in memory.momentum)))


def count_right(run: Run, state: ModelState, texts: Texts) -> int:
    """Questions that the state answers with the right token."""
    size = texts.question_BQ.shape[1]
    padded_BT = np.pad(texts.question_BQ, ((0, 0), (0, run.config.model.segment_tokens - size)))
    logits_BV, _ = _segment(run.model, run.params, state, padded_BT, size)
    return int((np.asarray(logits_BV).argmax(axis=-1) == texts.answer_B).sum())


def evaluate(run: Run, arm: str, segments: int, command: Command) -> Row:
    """One arm at one length."""
    a, b = (
        make_texts(run, persons, segments, command.rows, command.seed, stream) for stream, persons in enumerate(PERSONS)
    )
    found = {name: [count_right(run, state, texts) for texts in (a, b)] for name, state in states(run, a, b).items()}
    return {
        "arm": arm,
        "steps": int(run.step),
        "segments": segments,
        "seed": command.seed,
        "command": origin.typed("benchmarks.merge_memories"),
        "machine": origin.cores(),
        "training": f"python {' '.join(words(arm, command.steps))}",
        "model": model_name(run.config.model),
        "segment_tokens": run.config.model.segment_tokens,
        "asked": command.rows,
        "most_frequent": [int(np.bincount(texts.answer_B).max()) for texts in (a, b)],
        "right": found,
    }


def interval(right: int, asked: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share, in per cent."""
    z, share = 1.959964, right / asked
    middle = share + z * z / (2 * asked)
    half = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    return tuple(100 * (middle + sign * half) / (1 + z * z / asked) for sign in (-1, 1))  # pyright: ignore


def shown(right: int, asked: int) -> str:
    """A share in per cent with its interval."""
    low, high = interval(right, asked)
    return f"{100 * right / asked:.1f} ({low:.1f} to {high:.1f})"


def table(rows: list[Row]) -> str:
    """Markdown: a row per arm, length and condition."""
    names = ("memory", "steps", "segments of each text", "state", "questions about A", "questions about B")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row, (name, right) in itertools.chain.from_iterable(
        ((row, item) for item in row["right"].items()) for row in rows
    ):
        cells = " | ".join(shown(count, row["asked"]) for count in right)
        lines.append(f"| {row['model']} | {row['steps']} | {row['segments']} | {CONDITIONS[name]} | {cells} |")
    return "\n".join(lines) + "\n"


def write(rows: list[Row], out: pathlib.Path) -> None:
    """Writes the table of all rows so far, with the commands that produced them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    asked, frequent = max(row["asked"] for row in rows), max(max(row["most_frequent"]) / row["asked"] for row in rows)
    made = origin.markdown([(row["command"], row["machine"]) for row in rows])
    trained = "".join(f"- `{line}`\n" for line in dict.fromkeys(row["training"] for row in rows))
    text = (
        "# Merged memories\n\nRight answers in per cent, with 95% intervals (Wilson) over pairs of texts; up to "
        f"{asked} pairs, one question about each text. Always giving the most frequent answer is right in at most "
        f"{100 * frequent:.1f}%. One run of each model.\n\n{table(rows)}\n{made}{trained}"
    )
    out.with_suffix(".md").write_text(text)
    out.with_suffix(".json").write_text(json.dumps({"results": rows}, indent=1) + "\n")


def main() -> None:
    """Trains what is missing, evaluates, and writes the table."""
    command = tyro.cli(Command, description=__doc__)
    if unknown := [arm for arm in command.arms if arm not in MEMORIES]:
        raise UserError(f"unknown arms {unknown}; known: {list(MEMORIES)}")
    file = command.out.with_suffix(".json")
    held = json.loads(file.read_text())["results"] if file.exists() else []
    rows = {(row["arm"], row["steps"], row["segments"]): row for row in held}
    for arm in command.arms:
        run = trained(arm, command.steps, command.train)
        for segments in command.segments:
            rows[arm, int(run.step), segments] = evaluate(run, arm, segments, command)
            write([rows[key] for key in sorted(rows)], command.out)
    print(table([rows[key] for key in sorted(rows)]))


if __name__ == "__main__":
    cli.run(main)
