"""A run goes on on another mesh: what is restored is bitwise the same, and so, to rounding, is what is learned."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from lm2_jax.checkpoint import Checkpoints
from lm2_jax.config import OptimConfig
from lm2_jax.memory.gated_bank import GatedBankConfig
from lm2_jax.memory.titans import TitansConfig
from lm2_jax.model import LanguageModel
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from lm2_jax.training.fit import begin, fit
from lm2_jax.training.state import make_plan
from tests.contract.subjects import FLOAT64, precise
from tests.e2e.tiny_run import MODELS, arrays, tiny_config, write_documents

STEPS = 10
MESHES = {
    8: MeshConfig(data=1, fsdp=2, model=2, slots=2),
    1: MeshConfig(),
    4: MeshConfig(data=1, fsdp=1, model=1, slots=-1),
}


# By memory: the mesh axis that the third dimension of its first array lies on, and that dimension.
SPLIT = {GatedBankConfig: ("slots", 8), TitansConfig: ("model", 2)}


def config_of(documents, model):
    """The tiny run whose memory goes on from step to step, its sizes such that every mesh divides them."""
    run = tiny_config(documents, model, keep=3)
    memory = run.model.memory
    memory = dataclasses.replace(memory, num_slots=8) if isinstance(memory, GatedBankConfig) else memory
    decoder = dataclasses.replace(run.model.decoder, width=16)
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, segment_tokens=16, memory=memory, decoder=decoder, precision=FLOAT64),
        optim=OptimConfig(steps=STEPS, warmup_steps=2),
        train=dataclasses.replace(run.train, eval_batches=0),
    )


def layout_of(devices):
    return Layout(make_mesh(MESHES[devices], jax.devices()[:devices]))


def train(config, workdir, devices):
    """The real loop on so many devices; the loss of every step it made, and all arrays behind the last one."""
    with precise(config.model):
        outcome = fit(config, workdir, layout_of(devices))
        lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["loss"] for line in lines}, arrays(outcome)


def restored(config, workdir, devices):
    """What a run on so many devices would go on from."""
    with precise(config.model):
        plan, layout = make_plan(config, LanguageModel(config.model)), layout_of(devices)
        with layout.context(), Checkpoints(workdir, config) as checkpoints:
            state, step, _ = begin(plan, layout, checkpoints)
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(plan.shardings(layout)), strict=True):
            assert leaf.sharding.shard_shape(leaf.shape) == sharding.shard_shape(leaf.shape)
        axis, most = SPLIT[type(config.model.memory)]
        memory = jax.tree.leaves(state.memory.groups[0].memory)[0]
        assert memory.sharding.shard_shape(memory.shape)[2] == most // layout.mesh.shape[axis]
        leaves = jax.tree_util.tree_leaves_with_path(state)
        return step, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def copy_of(workdir, step):
    """The workdir as it was after a step."""
    copy = workdir.parent / f"{workdir.name}_behind_{step}"
    shutil.copytree(workdir, copy)
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    return copy


@pytest.mark.parity
@pytest.mark.usefixtures("wide_numbers")
@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=pytest.mark.slow if name == "lm2" else pytest.mark.long) for name in MODELS]
)
def test_a_run_goes_on_on_other_devices(tmp_path, model):
    config = config_of(write_documents(tmp_path / "documents"), model)
    losses, end = train(config, tmp_path / "eight", 8)
    assert sorted(losses) == list(range(1, STEPS + 1))

    # Ten steps on eight devices are ten steps on one.
    alone, end_alone = train(config, tmp_path / "one", 1)
    np.testing.assert_allclose([losses[n] for n in losses], [alone[n] for n in losses], rtol=1e-6)
    for path, array in end.items():
        np.testing.assert_allclose(array, end_alone[path], rtol=1e-6, atol=1e-8, err_msg=path)

    # The last checkpoint holds, on any mesh, bit for bit what the run ended with.
    for devices in MESHES:
        step, state = restored(config, tmp_path / "eight", devices)
        assert step == STEPS
        assert state.keys() == end.keys()
        for path, array in state.items():
            np.testing.assert_array_equal(array, end[path], err_msg=f"{path} on {devices} devices")

    # 8 -> 1 behind step 4, and 1 -> 4 behind step 8 of that: the losses that were to come.
    workdir = tmp_path / "eight"
    for step, devices in ((4, 1), (8, 4)):
        workdir = copy_of(workdir, step)
        resumed, _ = train(config, workdir, devices)
        for later in range(step + 1, STEPS + 1):
            assert resumed[later] == pytest.approx(losses[later], rel=1e-6), (devices, later)
