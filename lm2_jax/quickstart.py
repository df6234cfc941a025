"""`make quickstart`: trains a small LM2 and its twin without memory on the CPU, and shows what each remembers.

It runs the commands that a person would type, from the repository's root.
"""

import pathlib
import shlex
import time

import rich.console

from lm2_jax import cli
from lm2_jax.errors import UserError
from lm2_jax.evaluation.recall import measure, show
from lm2_jax.folders import prepare_folder
from lm2_jax.runs import load_run

RUNS = pathlib.Path("runs/quickstart")
PRESETS = {"quickstart": RUNS / "lm2", "quickstart_none": RUNS / "none"}
SEGMENTS, ROWS = 16, 256  # of the final comparison; four times as long as in training


def command(console: rich.console.Console, *words: str) -> None:
    """Shows a command, and runs it."""
    console.print(f"\n[bold]$ python {shlex.join(words)}[/bold]")
    status = cli.run_program(*words)
    if status:
        raise UserError(f"`python {shlex.join(words)}` ended with status {status}", status=status)


def main() -> None:
    """Trains, compares, and says where the pictures are."""
    if not pathlib.Path("train.py").is_file():
        raise UserError("the quickstart runs train.py: start it in the repository's root")
    console, began = rich.console.Console(highlight=False), time.monotonic()
    console.print(
        "Two small language models read the same stories: who went where, and meanwhile much else. Now and then a\n"
        "question comes up. One model has LM2's memory; its twin sees nothing but the segment at hand. Interrupt them\n"
        "when you like: the same command goes on where it stopped."
    )
    for preset, workdir in PRESETS.items():
        command(console, "train.py", preset, "--workdir", str(workdir))
    results = [measure(load_run(workdir), workdir, SEGMENTS, ROWS) for workdir in PRESETS.values()]
    paths = show(results, prepare_folder(RUNS / "eval"), console)
    lm2, twin = (result.counts.accuracy(1, 4) for result in results)
    if lm2 is None or twin is None:
        raise UserError(f"none of {ROWS} held-out rows asks for a fact of another segment: change ROWS", status=1)
    command(console, *f"eval.py babilong --workdir {PRESETS['quickstart']} --lengths 0k 1k --samples 50".split())
    console.print(
        f"\nFacts told 1 to 4 segments ago: LM2 {100 * lm2:.1f}%, its twin without memory {100 * twin:.1f}%.\n"
        f"That took {(time.monotonic() - began) / 60:.1f} minutes. The picture: {paths[-1]}\n"
        "Go on: read configs/quickstart.py, change a field (see python train.py quickstart --help), or train\n"
        "babilong_small on real text."
    )


if __name__ == "__main__":
    cli.run(main)
