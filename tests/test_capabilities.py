"""What a memory or a join promises is checked when a model is built, not answered wrongly later."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import lm2_jax
from lm2_jax.blocks.context import ContextBlock, ContextJoin
from lm2_jax.blocks.gate import GateBlock, GateJoin
from lm2_jax.config import ModelConfig
from lm2_jax.memory.base import Capability, Memory, MemoryConfig
from lm2_jax.memory.gated_bank import GatedBankConfig
from lm2_jax.memory.titans import TitansConfig


class State(NamedTuple):
    is_start: Any


class Stateless(NamedTuple):
    count: Any


class Bare(Memory):
    """A memory without any method but those of its state."""

    state: type = State

    def init_state(self, batch: int) -> Any:
        return self.state(jnp.ones(batch, bool))

    def state_axes(self) -> Any:
        return self.state(("batch",))


class Running(Bare):
    def advance(self, inputs, state, metrics=None):
        return inputs.x, state


class HalfOpen(Running):
    def open(self, state):
        return state


@dataclasses.dataclass(frozen=True)
class Made(MemoryConfig, abstract=True):
    """A memory for a test, which no registry knows."""

    kind = "made"
    module: Any = Running()
    can: Capability = Capability.RUNNING

    @property
    def capabilities(self) -> Capability:
        return self.can

    def build(self, width, precision, **linen):
        return self.module


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (Made(Bare()), "declares RUNNING but does not define .*'advance'"),
        (Made(Running(), Capability.RUNNING | Capability.READ), "declares READ .*'reader', 'read'"),
        (Made(HalfOpen()), "defines open alone; .* both or neither"),
        (Made(Running(state=Stateless)), "must be a NamedTuple with a field is_start"),
    ],
)
def test_a_memory_that_lacks_what_it_declares_is_refused(memory, words):
    with pytest.raises(TypeError, match=words):
        ModelConfig(memory=memory, join=GateJoin())


def test_a_memory_that_has_what_it_declares_is_taken():
    assert ModelConfig(memory=Made(), join=GateJoin()).has_memory


class ReadsSilently(GateBlock):
    """A flow that reads the segment's start without saying so."""

    def flow(self, x, port):
        return x + port.each_segment(lambda _, one, x_BTD: one.read(x_BTD), x)


class OwnKeysSilently(ContextBlock):
    makes_own_keys = False


@dataclasses.dataclass(frozen=True)
class SilentJoin(GateJoin, abstract=True):
    def block(self):
        return ReadsSilently


@dataclasses.dataclass(frozen=True)
class SilentContext(ContextJoin, abstract=True):
    def block(self):
        return OwnKeysSilently


@pytest.mark.parametrize(
    ("join", "words"),
    [(SilentJoin(), "ReadsSilently.flow calls port.read; set `reads`"), (SilentContext(), "set `makes_own_keys`")],
)
def test_a_flow_that_could_not_be_streamed_is_refused_when_the_model_is_made(join, words):
    config = ModelConfig(memory=TitansConfig(chunk_tokens=8), join=join)
    model, tokens = lm2_jax.build_model(config), jnp.zeros((1, config.segment_tokens), jnp.int32)
    with pytest.raises(TypeError, match=words):
        jax.eval_shape(model.init, jax.random.key(0), tokens, model.init_state(1))


def test_capabilities_follow_the_fields():
    assert Capability.WRITE_THROUGH_BLOCK in GatedBankConfig().capabilities
    assert Capability.SHAREABLE not in GatedBankConfig(start="learned").capabilities
