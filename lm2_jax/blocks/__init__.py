"""Joins of memory and attention; importing a module here registers it."""

from lm2_jax.blocks import context as context
from lm2_jax.blocks import gate as gate
from lm2_jax.blocks import heads as heads
from lm2_jax.blocks import layer as layer
from lm2_jax.blocks import layer_tokens as layer_tokens
from lm2_jax.blocks import mixed as mixed
from lm2_jax.blocks import mixer as mixer
from lm2_jax.blocks import plain as plain
from lm2_jax.blocks import recall as recall
from lm2_jax.blocks import residual as residual
from lm2_jax.blocks import tokens as tokens
from lm2_jax.blocks.base import Block as Block
from lm2_jax.blocks.base import JoinConfig as JoinConfig

JOINS = JoinConfig.registry
