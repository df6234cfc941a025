"""Peak host memory while a checkpoint is read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lm2_jax.interop.hf_config import read_hf_config
from lm2_jax.interop.names import hf_shapes
from lm2_jax.interop.safetensors_file import write_safetensors

ROOT = Path(__file__).parents[2]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16_000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 10,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
PROGRAM = """
import sys
import jax
import jax.numpy as jnp
from lm2_jax.interop.pretrained import from_pretrained

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

from_pretrained(sys.argv[1])  # a small model of the same kind: libraries and compilers are in memory
before = peak()
params = from_pretrained(sys.argv[2]).params
print(sum(x.nbytes for x in jax.tree.leaves(params)), peak() - before)
"""


def write(folder: Path, config: dict) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    spec = read_hf_config(config, "config.json")
    shapes = {
        name: (shape, np.dtype(ml_dtypes.bfloat16)) for name, shape in hf_shapes(spec.decoder, spec.vocab_size).items()
    }
    write_safetensors(
        folder / "model.safetensors", shapes, lambda name: np.full(shapes[name][0], 0.5, ml_dtypes.bfloat16), {}
    )


@pytest.mark.slow
def test_reading_takes_little_more_than_the_model(tmp_path):
    """A checkpoint of 430 MB in float32, read from bfloat16."""
    write(tmp_path / "small", {**CONFIG, "hidden_size": 48, "intermediate_size": 96, "vocab_size": 500})
    write(tmp_path / "large", CONFIG)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "small"), str(tmp_path / "large")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    output = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    size, used = map(int, output.split()[-2:])
    print(f"model {size / 1e6:.0f} MB, peak {used / 1e6:.0f} MB, ratio {used / size:.2f}")
    assert size > 400e6
    assert used <= 1.3 * size
