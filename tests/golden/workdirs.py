"""Makes the golden workdirs anew: python -m tests.golden.workdirs

Each is a run of a tiny preset, stopped at half of its steps, with what it held after the last step. Only a release that
changes a format on purpose makes them anew; the old ones then stay next to them.
"""

import dataclasses
import json
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lm2_jax
from lm2_jax.params import to_canonical
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from lm2_jax.training.fit import fit

FOLDER = Path(__file__).parent / "workdirs"
PRESETS = ("lm2_tiny", "titans_mac_tiny", "rmt_tiny")
STEPS = 12
KEPT = ("config.json", "tokenizer.json", "metrics.jsonl", "checkpoints")


def config_of(preset: str, steps: int) -> lm2_jax.RunConfig:
    run = lm2_jax.preset(preset)
    return dataclasses.replace(
        run,
        optim=dataclasses.replace(run.optim, steps=STEPS, warmup_steps=1),
        train=dataclasses.replace(run.train, eval_every=0, eval_batches=0, log_every=1),
        checkpoint=dataclasses.replace(run.checkpoint, every_steps=steps, keep=1),
    )


def trained(config: lm2_jax.RunConfig, workdir: Path, stop_at: int | None = None) -> dict[str, np.ndarray]:
    """Trains or resumes on one device; the parameters by canonical name."""
    layout = Layout(make_mesh(MeshConfig(), jax.devices()[:1]), config=config)
    state = fit(config, workdir, layout).state
    return {name: np.asarray(a) for name, a in named(state.params).items()}


def named(params: Any) -> dict[str, Any]:
    return {name: leaf for name, leaf in to_canonical(params).items()}


def machine() -> dict[str, str]:
    """What bitwise equality depends on."""
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    widest = "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else "other"
    return {"jax": jax.__version__, "machine": platform.machine(), "vectors": widest}


def main() -> None:
    for preset in PRESETS:
        target = FOLDER / preset
        with tempfile.TemporaryDirectory() as folder:
            workdir = Path(folder) / preset
            config = config_of(preset, STEPS // 2)
            after = trained(config, workdir)
            half = workdir / "checkpoints" / str(STEPS)
            shutil.rmtree(half)
            del half
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            for name in KEPT:
                copy = shutil.copytree if (workdir / name).is_dir() else shutil.copy
                copy(workdir / name, target / name)
            np.savez_compressed(target / "after.npz", **after)
            (target / "made_with.json").write_text(json.dumps(machine()) + "\n")


if __name__ == "__main__":
    main()
