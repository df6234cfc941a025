"""Memories; importing a module here registers it."""

from lm2_jax.memory import associative as associative
from lm2_jax.memory import compressive as compressive
from lm2_jax.memory import gated_bank as gated_bank
from lm2_jax.memory import gated_delta as gated_delta
from lm2_jax.memory import hierarchical as hierarchical
from lm2_jax.memory import none as none
from lm2_jax.memory import titans as titans
from lm2_jax.memory import tokens as tokens
from lm2_jax.memory.base import Memory as Memory
from lm2_jax.memory.base import MemoryConfig as MemoryConfig

REGISTRY = MemoryConfig.registry
