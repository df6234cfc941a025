"""Tiny runs with generic parameters."""

import functools

import lm2_jax
from lm2_jax.data.tokenizers import TokenizerConfig, build_tokenizer
from lm2_jax.runs import Run
from tests.contract.subjects import generic_params

WORDS = "the key is in the box under the stairs, and nobody has looked there since the winter of the great snow. "


@functools.cache
def tiny_run(name: str, seed: int = 0) -> Run:
    """The run of a tiny preset, as if it had been trained; its answers never end by themselves."""
    config = lm2_jax.preset(name)
    model = lm2_jax.build_model(config.model)
    tokenizer = build_tokenizer(TokenizerConfig(kind="bytes"), list, config.model.vocab_size)
    tokenizer.eos_id = -1
    return Run(config, model, generic_params(model, seed), tokenizer, 7)


def text_of(tokens: int) -> str:
    """A text of so many tokens (bytes)."""
    return (WORDS * (tokens // len(WORDS) + 1))[:tokens]
