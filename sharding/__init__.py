"""The mesh and what is split over it; `lm2_jax` names logical axes only and never imports this package."""

from lm2_jax.sharding.check import assert_sharded as assert_sharded
from lm2_jax.sharding.layout import Layout as Layout
from lm2_jax.sharding.mesh import MeshConfig as MeshConfig
from lm2_jax.sharding.mesh import make_mesh as make_mesh
from lm2_jax.sharding.rules import RULES as RULES
