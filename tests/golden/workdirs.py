"""Makes the golden workdirs: python -m tests.golden.workdirs

Each holds a run of a tiny preset that was stopped at half of its steps, and the parameters after the last step.
They are kept for later versions, which must resume and evaluate them; a new format gets new ones next to the old ones.
"""

import dataclasses
import json
import os
import platform
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "64")  # threads, as in tests/conftest.py: sums depend on how they are cut

import jax
import numpy as np

import lm2_jax
from lm2_jax.params import to_canonical
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from lm2_jax.training.fit import fit

FOLDER = Path(__file__).parent / "workdirs"
PRESETS = ("lm2_tiny", "rmt_tiny", "titans_mac_tiny")
STEPS = 8


def config_of(preset: str) -> lm2_jax.RunConfig:
    """A tiny run with a checkpoint at half of its steps."""
    run = lm2_jax.preset(preset)
    return dataclasses.replace(
        run,
        optim=dataclasses.replace(run.optim, steps=STEPS, warmup_steps=1),
        train=dataclasses.replace(run.train, eval_every=0, eval_batches=0, log_every=1),
        checkpoint=dataclasses.replace(run.checkpoint, every_steps=STEPS // 2, keep=2),
    )


def trained(config: lm2_jax.RunConfig, workdir: Path) -> dict[str, np.ndarray]:
    """Trains or resumes on one device; the parameters after the last step by canonical name."""
    layout = Layout(make_mesh(MeshConfig(), jax.devices()[:1]), config=config)
    return {name: np.asarray(array) for name, array in to_canonical(fit(config, workdir, layout).state.params).items()}


def machine() -> dict[str, str]:
    """What bitwise equality depends on: versions, and how wide the processor's vectors are."""
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    vectors = "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else "other"
    return {"jax": jax.__version__, "machine": platform.machine(), "vectors": vectors}


def main() -> None:
    for preset in PRESETS:
        target = FOLDER / preset
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as folder:
            workdir = Path(folder) / preset
            after = trained(config_of(preset), workdir)
            for name in ("config.json", "tokenizer.json", "metrics.jsonl"):
                shutil.copy(workdir / name, target / name)
            half = Path("checkpoints") / str(STEPS // 2)
            shutil.copytree(workdir / half, target / half)
        np.savez_compressed(target / "after.npz", **after)
        (target / "made_with.json").write_text(json.dumps(machine()) + "\n")


if __name__ == "__main__":
    main()
