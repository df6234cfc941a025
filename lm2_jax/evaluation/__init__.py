"""Suites of `eval.py` and answerers: one file each, registered by being imported here."""

from lm2_jax.evaluation.babilong import Babilong as Babilong
from lm2_jax.evaluation.perplexity import Perplexity as Perplexity
from lm2_jax.evaluation.recall import Recall as Recall
from lm2_jax.evaluation.recurrent_prompt import RecurrentPrompt as RecurrentPrompt
from lm2_jax.evaluation.retrieval import Rag as Rag
from lm2_jax.evaluation.suite import Suite as Suite

SUITES = Suite.registry
"""Name of a subcommand -> its config class."""
