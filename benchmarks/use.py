"""Reading and decoding on the CPU, compared with transformers: the same Llama weights, with and without a memory.

    python -m benchmarks.use --peer /path/to/python     # one that has torch and transformers
    python -m benchmarks.use --only tiny                # reads a million tokens with lm2_tiny

The decoder has the shape of SmolLM2-135M and random weights, the same on both sides. Ours has LM2's bank in addition,
and segments of 512 tokens; its output scale is zero, so both sides have equal logits in the first segment, which is
checked. Both read chunks of 512 tokens. Other programs may run on the machine, so both processes exist at the same time
and are measured in turn; ratios matter more than times. Reading 131,072 tokens takes the peer hours on a CPU, so its
reading is measured at that depth only: the next chunk after a cache of random numbers.

Part `tiny`: one reader begins anew every 10,000 tokens, another reads a million tokens; they take turns.

Writes benchmarks/results/use.json.
"""

import contextlib
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen as nn
from safetensors.numpy import save_file

import lm2_jax
from benchmarks import origin, use_worker
from lm2_jax import cli, streaming
from lm2_jax.blocks.residual import ResidualJoin
from lm2_jax.config import ModelConfig
from lm2_jax.decoder import DecoderConfig
from lm2_jax.errors import UserError
from lm2_jax.inference.reading import Reader
from lm2_jax.inference.snapshot import Source, empty_memory
from lm2_jax.memory.gated_bank import GatedBankConfig
from lm2_jax.params import to_canonical
from lm2_jax.runs import Run

TURN = 10_000  # tokens that the tiny model reads before the other reader's turn
LARGEST_DIFFERENCE = 1e-3  # of logits, between both sides
MODEL = ModelConfig(
    vocab_size=49152,
    segment_tokens=use_worker.CHUNK,
    decoder=DecoderConfig(
        width=576, num_layers=30, num_heads=9, num_kv_heads=3, mlp_width=1536, rope_theta=100_000.0, tie_head=True
    ),
    memory=GatedBankConfig(num_slots=16, num_heads=9),
    join=ResidualJoin(silent_start=True),
)
HF_NAMES = {
    "attention/q_proj/w": "self_attn.q_proj",
    "attention/k_proj/w": "self_attn.k_proj",
    "attention/v_proj/w": "self_attn.v_proj",
    "attention/o_proj/w": "self_attn.o_proj",
    "attention_norm/scale": "input_layernorm",
    "mlp_norm/scale": "post_attention_layernorm",
    "mlp/gated/w": "mlp.gate_proj",
    "mlp/up/w": "mlp.up_proj",
    "mlp/down/w": "mlp.down_proj",
}


@dataclasses.dataclass(frozen=True)
class Command:
    """Options."""

    peer: str | None = None
    """Python that has torch and transformers; None: only ours is measured."""
    lengths: tuple[int, ...] = (1024, 16384)
    """Tokens that both sides read."""
    ours: tuple[int, ...] = (131072,)
    """Lengths that only ours reads."""
    deep: tuple[int, ...] = (1024, 16384, 131072)
    """Lengths after which both sides read one more chunk; the peer's cache is filled with random numbers."""
    repeats: int = 2
    """Measurements of each length on each side, in turn; the faster one counts."""
    decode: int = 16
    """Tokens decoded after each reading; the median counts."""
    million: int = 1_000_000
    """Tokens that the tiny model reads."""
    only: Literal["tiny", "large"] | None = None
    """Runs one part and keeps the other's figures in the file."""
    worker: bool = False
    """Our side of the comparison; used by the benchmark itself."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/use.json")
    """File to write."""


def weights(model: Any) -> Any:
    """Random parameters, the same in each process."""
    tokens = np.zeros((1, MODEL.segment_tokens), np.int32)
    return jax.jit(model.init)(jax.random.key(0), tokens, model.init_state(1))["params"]


def to_transformers(folder: str) -> None:
    """Writes our decoder's weights as a Hugging Face folder."""
    arrays, tensors = to_canonical(nn.unbox(weights(lm2_jax.build_model(MODEL)))), {}
    width = MODEL.decoder.width
    for name, array in arrays.items():
        array = np.asarray(array, np.float32)
        place, _, rest = name.removeprefix("layers/").partition("/")
        if name == "embed/table":
            tensors["model.embed_tokens.weight"] = array
        elif name == "final_norm/scale":
            tensors["model.norm.weight"] = array
        elif rest in HF_NAMES:
            if array.ndim == 3:  # [D H K], or [H K D] of the output projection
                array = array.reshape(-1, width) if rest.startswith("attention/o") else array.reshape(width, -1)
            tensors[f"model.layers.{place}.{HF_NAMES[rest]}.weight"] = np.ascontiguousarray(array.T)
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
    d = MODEL.decoder
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": d.width,
        "num_hidden_layers": d.num_layers, "num_attention_heads": d.num_heads, "num_key_value_heads": d.num_kv_heads,
        "intermediate_size": d.mlp_width, "vocab_size": MODEL.vocab_size, "rope_theta": d.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": d.rope_theta}, "rms_norm_eps": d.norm_epsilon,
        "tie_word_embeddings": True, "hidden_act": "silu", "max_position_embeddings": 1 << 20, "torch_dtype": "float32",
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    pathlib.Path(folder, "config.json").write_text(json.dumps(config))


def work() -> None:
    """Our side."""
    model = lm2_jax.build_model(MODEL)
    params = weights(model)

    def extend(state: Any, tokens: list[int]) -> Any:
        return jax.block_until_ready(streaming.absorb(model, params, np.array([tokens], np.int32), state))[1]

    def filled(length: int) -> Any:
        return start()  # the state has one size; its content makes no difference in time

    def start() -> Any:
        return model.init_state(1)

    first = np.array([use_worker.text(32, MODEL.vocab_size)], np.int32)
    logits_1V, _ = streaming.absorb(model, params, first, start())
    side = use_worker.Reading(start, extend, lambda state: extend(state, [1]), filled, MODEL.vocab_size)
    use_worker.serve(side, np.asarray(logits_1V)[0, :64].tolist())


class Side:
    """A process that measures when it is asked to."""

    def __init__(self, line: list[str]):
        self._process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self._answer()

    def measure(self, length: int, decode: int, filled: bool) -> dict[str, float]:
        """Reads and decodes once; with `filled`, only the chunk after so many tokens is read."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"length": length, "decode": decode, "filled": filled}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"{' '.join(self._process.args)} ended with status {self._process.wait()}", status=1)
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


@contextlib.contextmanager
def sides(peer: str | None) -> Iterator[dict[str, Side]]:
    """The processes that are compared."""
    with tempfile.TemporaryDirectory() as folder:
        lines = {"lm2_jax": [sys.executable, "-m", "benchmarks.use", "--worker"]}
        if peer is not None:
            to_transformers(folder)
            lines["transformers"] = [peer, use_worker.__file__, folder]
        running = {name: Side(line) for name, line in lines.items()}
        try:
            yield running
        finally:
            for side in running.values():
                side.close()


def compare(command: Command, save: Any) -> None:
    """Reads each length on each side in turn; `save` gets the figures after each length."""
    with sides(command.peer) as running:
        figures: dict[str, Any] = {"decode_tokens": command.decode, "repeats": command.repeats, "sides": {}}
        logits = [np.array(side.ready.pop("logits")) for side in running.values()]
        if len(logits) == 2:
            difference = float(np.abs(logits[0] - logits[1]).max())
            if difference > LARGEST_DIFFERENCE:
                raise UserError(f"the two sides are not the same model: logits differ by {difference}", status=1)
            figures["logits_differ_by"] = difference
        for name, side in running.items():
            figures["sides"][name] = {"bytes_before_reading": side.ready["ready"]}
        plan = [(length, "lengths", list(running)) for length in command.lengths]
        plan += [(length, "lengths", ["lm2_jax"]) for length in command.ours]
        plan += [(length, "next_chunk_after", list(running)) for length in command.deep]
        for length, kind, names in plan:
            is_filled = kind != "lengths"
            found = [
                {name: running[name].measure(length, command.decode, is_filled) for name in names}
                for _ in range(command.repeats if len(names) > 1 else 1)
            ]
            for name in names:
                figures["sides"][name].setdefault(kind, {})[str(length)] = {
                    "read_tokens_per_second": (use_worker.CHUNK if is_filled else length)
                    / min(one[name]["read_seconds"] for one in found),
                    "decode_tokens_per_second": 1 / min(one[name]["decode_seconds"] for one in found),
                    "peak_bytes": max(one[name]["peak_bytes"] for one in found),
                }
            save("large", figures)


def tiny(command: Command) -> dict[str, Any]:
    """A tiny model reads a million tokens, in turn with one that begins anew every `TURN` tokens."""
    config = lm2_jax.preset("lm2_tiny")
    model = lm2_jax.build_model(config.model)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32), jnp.int32), model.init_state(1))["params"]
    nothing: Any = None
    empty = empty_memory(Run(config, model, params, nothing, 0))
    draw = np.random.default_rng(0)

    def reader() -> Reader:
        made = Reader(empty)
        made.begin(Source("text", None, 0, False))
        return made

    def seconds(reader: Reader, tokens: np.ndarray) -> float:
        began = time.perf_counter()
        reader.feed(tokens)
        jax.block_until_ready(reader.memory.state)
        return time.perf_counter() - began

    long, ratios, rates, early = reader(), [], [], 0
    for turn in range(command.million // TURN):
        tokens = draw.integers(0, config.model.vocab_size, TURN).astype(np.int32)
        order = [reader(), long] if turn % 2 else [long, reader()]
        times = {one is long: seconds(one, tokens) for one in order}
        early = early or use_worker.resident_bytes()
        if turn:  # the first turn compiles
            ratios.append(times[False] / times[True])
            rates.append(TURN / times[True])
    late = use_worker.resident_bytes()
    assert long.memory.tokens_read == command.million
    return {
        "tokens": command.million,
        "tokens_per_second": statistics.median(rates),
        "speed_over_that_of_the_first_tokens": statistics.median(ratios),
        "of_its_last_tenth_alone": statistics.median(ratios[-len(ratios) // 10 :]),
        "bytes_after_the_first_tokens": early,
        "bytes_at_the_end": late,
        "memory_ratio": late / early,
    }


def main() -> None:
    """Measures and writes the file."""
    command = tyro.cli(Command, description=__doc__)
    if command.worker:
        return work()
    figures = json.loads(command.out.read_text()) if command.only and command.out.exists() else {}

    def save(part: str, found: Any) -> None:
        line = origin.typed("benchmarks.use").replace(str(command.peer), "PYTHON")
        origins = {"command": line, "machine": f"{origin.cores()}, other programs running"}
        figures[part] = origins | found
        command.out.parent.mkdir(parents=True, exist_ok=True)
        command.out.write_text(json.dumps(figures, indent=1) + "\n")

    if command.only != "large":
        save("tiny", tiny(command))
    if command.only != "tiny":
        compare(command, save)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    cli.run(main)
