"""One small program per model and mesh, compiled once for all tests: value, gradient, costs and collectives."""

import collections
import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lm2_jax
from lm2_jax import partition
from lm2_jax.aot.hlo import Instruction, Program, parse
from lm2_jax.config import ModelConfig
from lm2_jax.layout import axes_of
from lm2_jax.memory.titans import StepConfig
from lm2_jax.precision import Precision
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from lm2_jax.sharding.mesh import AXES
from lm2_jax.sharding.partition import MeshPartition
from tests.contract.subjects import FLOAT64, UNOPTIMIZED, abstract_params, config_of, generic_params, precise

ROWS, SEGMENTS, TOKENS, VOCABULARY = 8, 3, 16, 64
SLOTS = 40  # a size that no other dimension has, split or not
EXPANSION = 7  # of Titans' networks: the hidden width of 7 x 16 is such a number too
# With large steps on random parameters an inner memory is chaotic: float32 runs part that differ in one rounding.
CALM = StepConfig(maximum=0.01)


class Automatic(MeshPartition):
    """A mesh where `logical_shard_map` is left to XLA's partitioner: the reference of what it computes."""

    def map_shards(self, *_: Any) -> None:
        return None


@contextlib.contextmanager
def automatic(layout: Layout | None) -> Iterator[None]:
    """Inside a layout's context, leaves all programs to XLA's partitioner."""
    with partition.use(None if layout is None else Automatic(dict(layout.mesh.shape), layout.rules)):
        yield


class Outcome(NamedTuple):
    """What a program returns."""

    loss: Any
    logits: Any
    state: Any
    grads: Any


class Arguments(NamedTuple):
    """What it takes."""

    params: Any
    tokens: Any
    state: Any
    weights: Any


def small(name: str, float64: bool) -> ModelConfig:
    """The model of a tiny preset or a variant with sizes that every mesh of the tests divides."""
    config = config_of(name)
    sizes = {"num_slots": SLOTS, "num_tokens": 4, "chunk_tokens": 8, "mlp_width": 48, "vocab_size": VOCABULARY}
    sizes |= {"segment_tokens": TOKENS, "window_tokens": TOKENS // 2, "expansion": EXPANSION}
    return _replaced(config, sizes | {"step": CALM, "precision": FLOAT64 if float64 else Precision()})


def _replaced(config: Any, values: dict[str, Any]) -> Any:
    """A config with all fields of these names changed, at any depth; None stays."""
    if isinstance(config, tuple):
        return tuple(_replaced(item, values) for item in config)
    if not dataclasses.is_dataclass(config):
        return config
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is not None and field.name in values:
            changes[field.name] = values[field.name]
        else:
            changes[field.name] = _replaced(value, values)
    return dataclasses.replace(config, **changes)


class Case:
    """A model on a mesh, or on one device where there is none."""

    def __init__(
        self,
        name: str,
        mesh: MeshConfig | None,
        float64: bool,
        by_hand: bool = True,
        remat: Literal["none", "dots", "full"] = "none",
    ):
        self.config, self.by_hand = dataclasses.replace(small(name, float64), remat=remat), by_hand
        self.model = lm2_jax.build_model(self.config)
        self.layout = None
        if mesh is not None:
            devices = math.prod(mesh.sizes(math.prod(getattr(mesh, axis) for axis in AXES)))
            self.layout = Layout(make_mesh(mesh, jax.devices()[:devices]))

    @property
    def shape(self) -> dict[str, int]:
        """Sizes of the mesh axes."""
        return dict(self.layout.mesh.shape) if self.layout else dict.fromkeys(AXES, 1)

    @functools.cached_property
    def axes(self) -> Any:
        """Logical axes of parameters and state."""
        with precise(self.config):
            return axes_of(abstract_params(self.model)), self.model.state_axes()

    @functools.cached_property
    def arguments(self) -> Arguments:
        """Generic parameters, random tokens, an initial state and weights of the loss, with their shardings."""
        with precise(self.config):
            params, state = generic_params(self.model), self.model.init_state(ROWS)
            rng = np.random.default_rng(0)
            tokens = rng.integers(0, VOCABULARY, (ROWS, SEGMENTS * TOKENS), np.int32)
            weights = rng.standard_normal((*tokens.shape, VOCABULARY)).astype(self.config.precision.params)
            if self.layout is None:
                return Arguments(params, tokens, state, weights)
            params, state = jax.device_put((params, state), self.layout.shardings(self.axes, (params, state)))
            return Arguments(params, self.layout.batch(tokens), state, self.layout.batch(weights))

    def _program(self, params: Any, tokens: Any, state: Any, weights: Any) -> Outcome:
        def loss(params: Any) -> Any:
            out: Any = self.model.apply({"params": params}, tokens, state, method="forward", with_logits=True)
            floats = [leaf for leaf in jax.tree.leaves(out.state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
            of_state = sum((jnp.mean(leaf * leaf) for leaf in floats), jnp.zeros((), out.logits.dtype))
            return jnp.mean(weights * out.logits) + of_state, (out.logits, out.state)

        (value, (logits, state)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return Outcome(value, logits, state, grads)

    @functools.cached_property
    def lowered(self) -> Any:
        """The program before compilation."""
        arguments = self.arguments
        context = contextlib.nullcontext() if self.layout is None else self.layout.context()
        manual = contextlib.nullcontext() if self.by_hand else automatic(self.layout)
        with precise(self.config), context, manual:
            return jax.jit(self._program, compiler_options=UNOPTIMIZED).lower(*arguments)

    @functools.cached_property
    def compiled(self) -> Any:
        """The program."""
        with precise(self.config):
            return self.lowered.compile()

    @functools.cached_property
    def outcome(self) -> Outcome:
        """What it returns."""
        with precise(self.config):
            return self.compiled(*self.arguments)

    @property
    def flops(self) -> float:
        """Operations of all devices, loop bodies counted once."""
        return self.compiled.cost_analysis()["flops"] * math.prod(self.shape.values())

    @functools.cached_property
    def loops(self) -> "Loops":
        """Its collectives by the depth of their loop."""
        return collectives_in(parse(self.compiled.as_text()))

    @functools.cached_property
    def carried(self) -> "Carried":
        """What its loops carry by their depth, from 1."""
        return carried_in(parse(self.compiled.as_text()))


# Few at a time: some sixty compiled programs take all the memory maps that Linux gives a process, and XLA crashes.
case = functools.lru_cache(maxsize=8)(Case)


# By depth of the loop, 0 outside of all: the kind of a collective, and the shape of one array it returns.
Loops = dict[int, collections.Counter[tuple[str, tuple[int, ...]]]]
_COLLECTIVE = re.compile(r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?")
_CALLS = ("to_apply", "calls", "true_computation", "false_computation")


Carried = dict[int, set[tuple[int, ...]]]  # by depth of a loop: shapes of what it carries, takes and makes


def _shapes(text: str) -> list[tuple[int, ...]]:
    """Dimensions of each array of an HLO shape."""
    found = re.findall(r"\[([\d,]*)\]", re.sub(r"\{[^}]*\}", "", text))
    return [tuple(map(int, dimensions.split(","))) if dimensions else () for dimensions in found]


def _instructions(program: Program) -> Iterator[tuple[int, Instruction]]:
    """Every instruction with the number of loops around it, each loop body once."""

    def walk(name: str, depth: int) -> Iterator[tuple[int, Instruction]]:
        for instruction in program.computations[name].instructions.values():
            yield depth, instruction
            if instruction.opcode == "while":
                yield from walk(program.called(instruction, "body").name, depth + 1)
                continue
            for attribute in _CALLS:
                if (called := instruction.attribute(attribute)) in program.computations:
                    yield from walk(called, depth)

    return walk(program.entry, 0)


def collectives_in(program: Program) -> Loops:
    """Every array that a collective returns; what is combined into one counts singly."""
    found: Loops = collections.defaultdict(collections.Counter)
    for depth, instruction in _instructions(program):
        if match := _COLLECTIVE.fullmatch(instruction.opcode):
            for shape in _shapes(instruction.shape):
                found[depth][match[1], shape] += 1
    return found


def carried_in(program: Program) -> Carried:
    """The arrays of every loop's state, as one device has them."""
    found: Carried = collections.defaultdict(set)
    for depth, instruction in _instructions(program):
        if instruction.opcode == "while":
            found[depth + 1] |= set(_shapes(instruction.shape))
    return found
