"""What a mesh costs: no work is done twice, and no memory and no weight is gathered inside the loop over segments.

Read from programs compiled for CPU devices. XLA counts a loop's body once, in the program of one device as in that of
a mesh, so their operations compare. If a collective was added or removed on purpose, run

    python -m pytest tests/sharding/test_costs.py --update-golden
"""

import collections
import itertools
import json
import math
from pathlib import Path

import jax
import pytest

from lm2_jax.layout import axes_of
from lm2_jax.sharding import MeshConfig
from tests.contract.subjects import abstract_params
from tests.sharding.programs import EXPANSION, SLOTS, Case, case

MESHES = {
    "fsdp2_model2": MeshConfig(data=1, fsdp=2, model=2),
    "model2_slots2": MeshConfig(data=1, model=2, slots=2),
    "fsdp2_model2_slots2": MeshConfig(data=1, fsdp=2, model=2, slots=2),
}
PAIRS = [
    *itertools.product(("lm2_tiny", "lm2_paper_tiny", "titans_mac_tiny"), ("model2_slots2", "fsdp2_model2_slots2")),
    ("titans_mac_tiny", "fsdp2_model2"),
]
SEGMENT_LOOP = 2  # inside the loop over layers
HIDDEN = EXPANSION * 16  # of a Titans memory's network, in heads of 16
FILE = Path(__file__).parents[1] / "golden" / "collectives.json"

pytestmark = [pytest.mark.slow, pytest.mark.parametrize(("name", "mesh"), PAIRS)]


def test_devices_share_the_work(name, mesh):
    here, alone = case(name, MESHES[mesh], False), case(name, None, False)
    assert 1.0 <= here.flops / alone.flops <= 1.15


def gathered_weights(here: Case) -> set[tuple[int, ...]]:
    """Shapes of one layer's parameters when only heads and hidden widths are still split."""
    assert here.layout is not None
    boxed, shapes = abstract_params(here.model), set()
    names = jax.tree.leaves(axes_of(boxed), is_leaf=lambda leaf: type(leaf) is tuple)
    for leaf, axes in zip(jax.tree.leaves(here.arguments.params), names, strict=True):
        split = {name: here.shape["model"] for name in ("heads", "kv_heads", "mlp", "gate_width")}
        dimensions = [size // split.get(name, 1) for name, size in zip(axes, leaf.shape, strict=True)]
        shapes.add(tuple(size for name, size in zip(axes, dimensions, strict=True) if name != "layers"))
    return {shape for shape in shapes if math.prod(shape) > here.config.decoder.width}


def test_no_memory_and_no_weight_is_gathered_inside_the_segment_loop(name, mesh):
    here = case(name, MESHES[mesh], False)
    inside = [(kind, shape) for depth in here.loops if depth >= SEGMENT_LOOP for kind, shape in here.loops[depth]]
    moved = {shape for kind, shape in inside if kind in ("all-gather", "all-to-all", "collective-permute")}
    gathered = {shape for kind, shape in inside if kind in ("all-gather", "all-to-all")}
    assert bool(gathered) == (MESHES[mesh].slots > 1), "the queries are gathered there"
    assert not [shape for shape in gathered if SLOTS in shape], "a bank"
    hidden = {HIDDEN, HIDDEN // MESHES[mesh].slots}
    assert not [shape for shape in moved if hidden.intersection(shape)], "weights of an inner memory"
    weights = gathered_weights(here)
    assert not [shape for shape in gathered if tuple(size for size in shape if size > 1) in weights], "a weight"
    if name == "lm2_tiny":  # the slots' keys go round instead, a shard's part at a time
        assert "collective-permute" in {kind for kind, _ in inside}


def test_collectives_are_as_written_down(name, mesh, request):
    here = case(name, MESHES[mesh], False)
    found = {
        f"loop depth {depth}": dict(sorted(_by_kind(counts).items())) for depth, counts in sorted(here.loops.items())
    }
    golden = json.loads(FILE.read_text()) if FILE.is_file() else {}
    if request.config.getoption("--update-golden"):
        golden.setdefault(name, {})[mesh] = found
        FILE.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    assert golden.get(name, {}).get(mesh) == found, "see the top of this file"


def _by_kind(counts) -> collections.Counter[str]:
    kinds: collections.Counter[str] = collections.Counter()
    for (kind, _), count in counts.items():
        kinds[kind] += count
    return kinds
