"""Reads text into a memory and answers prompts.

--workdir W --read book.txt --save-memory book.memory
--workdir W --memory book.memory --prompt "Where is the key?"
--workdir W --memory book.memory --prompts questions.jsonl --out answers.jsonl
--workdir W --memory book.memory --chat
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from lm2_jax import cli
from lm2_jax.arguments import ArgumentParser
from lm2_jax.errors import UserError
from lm2_jax.folders import check_file, prepare_file
from lm2_jax.inference.sampling import Sampling

if TYPE_CHECKING:
    from lm2_jax.inference.chat import ChatTemplate
    from lm2_jax.inference.engine import Engine, Request
    from lm2_jax.inference.snapshot import MemorySnapshot
    from lm2_jax.runs import Run


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and does what it says."""
    options = _parser().parse_args(arguments)
    _check(options)
    # Everything that can be wrong with files is found before the model is loaded.
    from lm2_jax.inference.chat import ChatTemplate
    from lm2_jax.inference.reading import TextFile

    sampling = _sampling(options)
    files = [TextFile.open(path) for path in options.read or ()]
    prompts = _read_prompts(options.prompts) if options.prompts else []
    for path, flag in ((options.save_memory, "--save-memory"), (options.out, "--out")):
        if path:
            check_file(path, flag)
    if options.out and epath.Path(options.out).exists():
        raise UserError(f"--out {options.out} exists; it is not overwritten. Choose another file, or delete it")
    text = _prompt_text(options)
    run = _load(options)
    template = ChatTemplate.load(options.workdir or options.model, run.tokenizer) if options.chat else None
    memory = None
    if template is not None:
        return _chat(run, template, files, options, sampling)
    if files or options.memory or options.save_memory:
        memory = _read(run, files, options, options.save_memory)
    engine = _engine(run, memory, options)
    if options.prompts:
        _answer_file(engine, run, prompts, options, sampling)
    elif text is not None:
        tokens = _encoded(run, text, options.question is not None)
        _print_answer(engine, _request(tokens, 0, options, sampling))


def _read(run: "Run", files: list[Any], options: argparse.Namespace, save_to: str | None) -> "MemorySnapshot":
    from lm2_jax.inference.saving import ReadProgress, read_and_save

    progress = ReadProgress(sum(file.size for file in files))
    return read_and_save(run, files, options.memory, save_to, options.every, progress)


def _chat(
    run: "Run", template: "ChatTemplate", files: list[Any], options: argparse.Namespace, sampling: Sampling
) -> None:
    """A conversation on the terminal; each line of standard input is a message."""
    from lm2_jax.inference.chat import Chat

    memory = _read(run, files, options, None) if files or options.memory else None
    chat = Chat(run, template, memory)
    if sys.stdin.isatty():
        print("Type a message; Ctrl-D ends the conversation.", file=sys.stderr)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except (EOFError, UnicodeDecodeError) as error:
            if isinstance(error, UnicodeDecodeError):
                raise UserError(f"standard input: expected UTF-8 text: {error}") from error
            break
        if text.strip():
            _print_pieces(chat.say(text, options.max_new_tokens, sampling, tuple(options.stop)))
    if options.save_memory:
        chat.finish().save(options.save_memory)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=cli.program("generate"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_argument_group("model")
    model.add_argument("--workdir", metavar="W", help="folder or bucket of a trained run")
    model.add_argument("--model", metavar="FOLDER", help="folder of a model in another format, such as Hugging Face's")
    memory = parser.add_argument_group("memory")
    memory.add_argument("--read", nargs="+", metavar="FILE", help="UTF-8 text files of any size, read in this order")
    memory.add_argument("--memory", metavar="M", help="memory file to begin with")
    memory.add_argument("--save-memory", metavar="M", help="memory file to write; a reading that was killed is resumed")
    memory.add_argument(
        "--every", type=int, default=100_000, metavar="N", help="tokens between two saves while reading (%(default)s)"
    )
    prompt = parser.add_argument_group("prompt").add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue; - or none: standard input")
    prompt.add_argument("--question", metavar="TEXT", help="a question in the form that question-answering runs learn")
    prompt.add_argument(
        "--prompts", metavar="IN.jsonl", help='a file with {"prompt": TEXT} or {"question": TEXT} per line'
    )
    prompt.add_argument("--chat", action="store_true", help="a conversation, with the model's chat template")
    answer = parser.add_argument_group("answer")
    answer.add_argument("--out", metavar="OUT.jsonl", help='with --prompts: the same lines with "output"')
    answer.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="most tokens (%(default)s)")
    answer.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="the answer ends before one of these")
    answer.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token (%(default)s)")
    answer.add_argument("--top-k", type=int, default=0, help="the k most likely tokens; 0: all (%(default)s)")
    answer.add_argument("--top-p", type=float, default=1.0, help="the most likely tokens up to this sum (%(default)s)")
    answer.add_argument("--min-p", type=float, default=0.0, help="least share of the likeliest token (%(default)s)")
    answer.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: repeats less (%(default)s)")
    answer.add_argument("--seed", type=int, default=0, help="same seed, same text (%(default)s)")
    answer.add_argument("--batch-size", type=int, default=8, help="prompts processed at the same time (%(default)s)")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Refuses options that do not go together."""
    if (options.workdir is None) == (options.model is None):
        raise UserError("expected a model: either --workdir W of a run, or --model FOLDER")
    for flag, least in (("max_new_tokens", 1), ("every", 1), ("batch_size", 1)):
        if getattr(options, flag) < least:
            name = flag.replace("_", "-")
            raise UserError(f"--{name} {getattr(options, flag)}: expected a number of at least {least}")
    if (options.prompts is None) != (options.out is None):
        raise UserError("--prompts IN.jsonl and --out OUT.jsonl are used together")


def _sampling(options: argparse.Namespace) -> Sampling:
    try:
        return Sampling(
            options.repetition_penalty, options.temperature, options.top_k, options.top_p, options.min_p, options.seed
        )
    except UserError as error:
        name, _, rest = str(error).partition("=")
        raise UserError(f"--{name.replace('_', '-')} {rest}") from error


def _prompt_text(options: argparse.Namespace) -> str | None:
    """The one prompt; None where there is none."""
    if options.question is not None or options.prompts or options.chat:
        return options.question
    only_reads = options.prompt is None and (options.read or options.save_memory)
    if only_reads:
        return None
    if options.prompt not in (None, "-"):
        return options.prompt
    if sys.stdin.isatty():
        print("Type the prompt; Ctrl-D ends it.", file=sys.stderr)
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: expected UTF-8 text ({error.reason} at byte {error.start:,})") from error
    if not text and not options.memory and not options.read:
        raise UserError("standard input is empty; expected a prompt there, or with --prompt TEXT")
    return text.removesuffix("\n")


def _read_prompts(path: str) -> list[dict[str, Any]]:
    try:
        lines = epath.Path(path).read_bytes().decode("utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"--prompts {path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: expected a JSONL file of UTF-8 text: {error}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--prompts {path}:{number}: expected a JSON object, got {line[:60]!r}") from error
        texts = [entry.get(name) for name in ("prompt", "question") if name in entry] if isinstance(entry, dict) else []
        if len(texts) != 1 or not isinstance(texts[0], str):
            raise UserError(f'--prompts {path}:{number}: expected one text, {{"prompt": TEXT}} or {{"question": TEXT}}')
        prompts.append(entry)
    if not prompts:
        raise UserError(f"--prompts {path}: the file has no prompts")
    return prompts


def _load(options: argparse.Namespace) -> "Run":
    if options.workdir is not None:
        from lm2_jax.runs import load_run

        return load_run(options.workdir)
    if importlib.util.find_spec("lm2_jax.interop") is None:
        raise UserError("--model: this version reads no other model formats; use --workdir W of a trained run")
    import lm2_jax

    return lm2_jax.from_pretrained(options.model)


def _engine(run: "Run", memory: "MemorySnapshot | None", options: argparse.Namespace) -> "Engine":
    from lm2_jax.inference.engine import Engine

    return Engine(run, memory, options.batch_size if options.prompts else 1)


def _encoded(run: "Run", text: str, is_question: bool) -> np.ndarray:
    from lm2_jax.data.text_tokens import Encoder

    ids = Encoder(run.tokenizer).question(text) if is_question else run.tokenizer.encode(text)
    return np.array(ids, np.int32)


def _request(tokens: np.ndarray, index: int, options: argparse.Namespace, sampling: Sampling) -> "Request":
    from lm2_jax.inference.engine import Request

    return Request(tokens, index, options.max_new_tokens, sampling, tuple(options.stop))


def _print_answer(engine: "Engine", request: "Request") -> None:
    """Shows an answer as it comes."""
    _print_pieces(piece.text for piece in engine.generate([request]))


def _print_pieces(texts: Iterator[str]) -> None:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        for text in texts:
            print(text, end="", flush=True)
        print(flush=True)
    except BrokenPipeError:  # the reader of a pipe has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _answer_file(
    engine: "Engine", run: "Run", prompts: list[dict[str, Any]], options: argparse.Namespace, sampling: Sampling
) -> None:
    """Writes each line as soon as its answer and those before it are known."""

    def requests() -> Iterator["Request"]:
        for index, entry in enumerate(prompts):
            is_question = "question" in entry
            tokens = _encoded(run, entry["question" if is_question else "prompt"], is_question)
            yield _request(tokens, index, options, sampling)

    outputs, done, written = [""] * len(prompts), [False] * len(prompts), 0
    try:
        with prepare_file(options.out, "--out").open("w") as file:
            for piece in engine.generate(requests()):
                outputs[piece.index] += piece.text
                done[piece.index] = piece.answer is not None
                while written < len(prompts) and done[written]:
                    file.write(json.dumps({**prompts[written], "output": outputs[written]}) + "\n")
                    file.flush()
                    written += 1
    except OSError as error:
        raise UserError(f"--out {options.out}: cannot be written: {error}", status=1) from error
    print(f"{written} answers in {options.out}", file=sys.stderr)
