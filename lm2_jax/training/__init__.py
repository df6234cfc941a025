"""Training: the optimizer, one step, the loop, and what is written down about it."""

from lm2_jax.training.fit import Outcome as Outcome
from lm2_jax.training.fit import fit as fit
from lm2_jax.training.state import TrainState as TrainState
