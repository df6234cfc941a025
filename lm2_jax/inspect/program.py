"""Shows what a memory reads, writes and forgets: `inspect --workdir W --text FILE [--question Q] --out DIR`.

Writes DIR/report.html, one page with all pictures in it, and the pictures as PNG files.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from lm2_jax import atomic
from lm2_jax.arguments import ArgumentParser
from lm2_jax.errors import UserError
from lm2_jax.folders import check_folder, prepare_folder

if TYPE_CHECKING:
    from lm2_jax.inference.reading import TextFile
    from lm2_jax.inspect.collect import Reading
    from lm2_jax.runs import Run

REPORT = "report.html"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, reads the text and writes the report."""
    options = _parser().parse_args(arguments)
    if options.recall_rows < 0:
        raise UserError(f"--recall-rows {options.recall_rows}: expected 0 or more")
    if options.segment is not None and options.segment < 0:
        raise UserError(f"--segment {options.segment}: expected the number of a segment, from 0")
    if options.question is not None and not options.question.strip():
        raise UserError("--question is empty; expected a question, or leave it out")
    from lm2_jax.inference.reading import TextFile

    text = TextFile.open(options.text, "--text")
    out = _out_folder(options.out)
    from lm2_jax.runs import load_run

    run = load_run(options.workdir)
    print(write_report(run, text, options.question, out, options.segment, options.recall_rows))


def write_report(
    run: "Run",
    text: "TextFile",
    question: str | None,
    out: epath.PathLike,
    segment: int | None = None,
    recall_rows: int = 0,
) -> str:
    """Reads a text and writes the report about it.

    Args:
      run: a trained run.
      text: the text.
      question: about it, or None.
      out: folder of the report.
      segment: the one whose tokens are shown, from 0; None: the last full one.
      recall_rows: held-out rows for accuracy by distance; 0: none.
    Returns:
      What was written where.
    Raises:
      UserError: the text is too short, or nothing can be written.
    """
    from lm2_jax.inspect.report import make_report

    folder = prepare_folder(out, "--out")
    page = make_report(run, _read(run, text, segment), text.path.name, question, recall_rows)
    write(folder, {f"{name}.png": png for name, png in page.pictures.items()} | {REPORT: page.encode()})
    return f"{folder / REPORT} and {len(page.pictures)} pictures in {folder}"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m lm2_jax.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, metavar="W", help="folder or bucket of a trained run")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text file that the model reads")
    parser.add_argument("--question", metavar="TEXT", help="a question about the text")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the report")
    parser.add_argument(
        "--segment", type=int, metavar="N", help="segment whose tokens are shown one by one, from 0; default: the last"
    )
    parser.add_argument(
        "--recall-rows", type=int, default=64, metavar="N",
        help="held-out rows of the run's own data for accuracy by distance; 0: none (%(default)s)",
    )  # fmt: skip
    return parser


def _out_folder(path: str) -> epath.Path:
    if epath.Path(path).is_file():
        raise UserError(f"--out {path}: expected a folder, this is a file")
    return check_folder(path, "--out")


def _read(run: "Run", text: "TextFile", segment: int | None) -> "Reading":
    """Reads the text with progress on stderr."""
    from lm2_jax.inference.saving import ReadProgress
    from lm2_jax.inference.texts import token_pieces
    from lm2_jax.inspect.collect import read_text

    progress, T = ReadProgress(text.size), run.config.model.segment_tokens
    read = 0

    def pieces() -> Any:
        nonlocal read
        for piece in token_pieces(run.tokenizer, text.chunks(progress.at_byte)):
            read += len(piece)
            yield piece

    reading = read_text(run, pieces(), segment, progress.at_border)
    if reading is None:
        wanted = "one is needed" if segment is None else f"segment {segment}, counted from 0, is needed"
        raise UserError(
            f"--text {text.path}: the text has {read:,} tokens, {read // T:,} full segments of {T}; {wanted}: "
            f"choose a longer text{'' if segment is None else ' or another --segment'}"
        )
    progress.end(reading.memory)
    return reading


def write(out: epath.Path, files: dict[str, bytes]) -> None:
    """Writes each file, all of it or nothing.

    Raises:
      UserError: one cannot be written.
    """
    for name, content in files.items():
        try:
            atomic.write_file(out / name, content)
        except OSError as error:
            raise UserError(f"--out {out}: {name} cannot be written: {error}", status=1) from error
