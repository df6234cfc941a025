"""Softmax attention: projections (`layer`), who sees whom (`keys`), implementations (`backends`)."""

from lm2_jax.attention.cache import Cache as Cache
from lm2_jax.attention.layer import Attention as Attention
from lm2_jax.attention.layer import Projected as Projected
from lm2_jax.attention.layer import SegmentKV as SegmentKV
from lm2_jax.attention.layer import Window as Window
from lm2_jax.attention.softmax import ExtraKV as ExtraKV
