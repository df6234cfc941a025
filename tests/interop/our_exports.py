"""First half of a comparison of exports with `transformers`, run by hand; see check_transformers.py.

    python -m tests.interop.our_exports OUT [NAME...]
    python tests/interop/check_transformers.py OUT/*     # where torch and transformers are installed

For each config of `golden`, a model with other random weights and a vocabulary of 300 goes through `import_source` and
`export_workdir`, and its logits are computed in one segment. With names, only these.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

import lm2_jax
from lm2_jax.interop.export import export_workdir
from lm2_jax.interop.open_source import open_source
from lm2_jax.interop.workdir import import_source
from lm2_jax.presets import PRESETS
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from tests.interop.folders import GOLDEN, hf_folder, random_weights

TOKENS = 48


def write(path: Path, out: Path, layout: Layout) -> None:
    with np.load(path) as arrays:
        config = {**json.loads(str(arrays["config"])), "vocab_size": 300}
    source = open_source(hf_folder(out / "source", config, random_weights(config, seed=1)))
    import_source(source, out / "workdir", layout, PRESETS["none_tiny"], segment_tokens=TOKENS)
    print(export_workdir(out / "workdir", out / "hf"))
    run = lm2_jax.from_pretrained(out / "hf", segment_tokens=TOKENS)
    tokens = np.random.default_rng(0).integers(0, 300, (2, TOKENS)).astype(np.int32)
    logits, _ = jax.jit(run.model.apply)({"params": run.params}, tokens, run.model.init_state(2))
    np.savez(out / "ours.npz", tokens=tokens, logits=np.asarray(logits))


def main() -> None:
    layout = Layout(make_mesh(MeshConfig()))
    out, names = Path(sys.argv[1]), sys.argv[2:]
    unknown = set(names) - {path.stem for path in GOLDEN}
    if unknown:
        raise SystemExit(f"no golden of these names: {sorted(unknown)}")
    for path in GOLDEN:
        if path.stem in names or not names:
            write(path, out / path.stem, layout)


if __name__ == "__main__":
    main()
