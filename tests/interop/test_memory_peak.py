"""Peak host memory while a checkpoint is imported: at most 1.3 times the model."""

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
LARGE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
MEDIUM = {**LARGE, "vocab_size": 8000, "hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12}
SMALL = {**LARGE, "vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 23}
PROGRAM = """
import json, sys
import jax
devices, dtype = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_num_cpu_devices", devices)
from lm2_jax.interop.open_source import open_source
from lm2_jax.interop.pretrained import read_decoder
from lm2_jax.sharding import Layout, MeshConfig, make_mesh

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

layout = Layout(make_mesh(MeshConfig(data=1, fsdp=devices)))
small = read_decoder(open_source(sys.argv[3]), dtype=dtype, layout=layout)  # libraries and compilers are in memory
before = peak()
params = read_decoder(open_source(sys.argv[4]), dtype=dtype, layout=layout).params
size = sum(x.nbytes for x in jax.tree.leaves(params))
print(json.dumps({"parameters": sum(x.size for x in jax.tree.leaves(params)), "size": size, "used": peak() - before}))
"""


def write(folder: Path, config: dict) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    spec, bfloat16 = read_hf_config(config, "config.json"), np.dtype(ml_dtypes.bfloat16)
    shapes = {name: (shape, bfloat16) for name, shape in hf_shapes(spec.decoder, spec.vocab_size).items()}
    write_safetensors(folder / "model.safetensors", shapes, lambda name: np.full(shapes[name][0], 0.5, bfloat16), {})
    return folder


@pytest.mark.parametrize(
    ("config", "dtype", "devices"),
    [
        pytest.param(MEDIUM, "float32", 1, marks=pytest.mark.slow, id="medium"),
        pytest.param(LARGE, "bfloat16", 1, marks=pytest.mark.long, id="1.2B"),
        pytest.param(LARGE, "bfloat16", 8, marks=pytest.mark.long, id="1.2B-eight_devices"),
    ],
)
def test_an_import_takes_little_more_than_the_model(config, dtype, devices, tmp_path):
    folders = [str(write(tmp_path / name, c)) for name, c in (("small", SMALL), ("model", config))]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(devices), dtype, *folders]
    output = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found = json.loads(output.splitlines()[-1])
    print(found, f"ratio {found['used'] / found['size']:.3f}")
    assert found["parameters"] > (1.2e9 if config is LARGE else 80e6)
    assert found["used"] <= 1.3 * found["size"]
