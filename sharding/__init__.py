"""The mesh and what is split over it; `lm2_jax` names logical axes only and never imports this package."""

from sharding.check import assert_sharded as assert_sharded
from sharding.layout import Layout as Layout
from sharding.mesh import MeshConfig as MeshConfig
from sharding.mesh import make_mesh as make_mesh
from sharding.rules import RULES as RULES
