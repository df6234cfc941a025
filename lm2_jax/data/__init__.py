"""Sources of examples, tokenizers, and the pipeline that feeds batches; importing it registers the sources."""

from lm2_jax.data import babilong_source, mixed, shards, text_source

__all__ = ["babilong_source", "mixed", "shards", "text_source"]
