"""The device mesh and the table that maps logical axes to it; the rest of `lm2_jax` uses logical axes only."""

from lm2_jax.sharding.check import assert_sharded as assert_sharded
from lm2_jax.sharding.layout import Layout as Layout
from lm2_jax.sharding.mesh import MeshConfig as MeshConfig
from lm2_jax.sharding.mesh import make_mesh as make_mesh
from lm2_jax.sharding.rules import RULES as RULES
