"""Use of a trained run: reading text into its memory, generating text, and scoring text."""

from lm2_jax.inference.api import generate as generate
from lm2_jax.inference.api import score as score
from lm2_jax.inference.engine import Engine as Engine
from lm2_jax.inference.engine import Request as Request
from lm2_jax.inference.merging import merge as merge
from lm2_jax.inference.reading import read as read
from lm2_jax.inference.sampling import Sampling as Sampling
from lm2_jax.inference.snapshot import MemorySnapshot as MemorySnapshot
