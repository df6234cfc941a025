"""Choice of the next token from its logits; pure functions of arrays."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt

from lm2_jax.errors import UserError
from lm2_jax.types import Array, Bool, Float, Int

LARGEST_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen. The filters apply in the order of the fields, each to what the one before kept."""

    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens in the prompt or the answer; 1: off."""
    temperature: float = 0.0
    """Divides the logits; 0: always the most likely token."""
    top_k: int = 0
    """Keeps the k most likely tokens, and those as likely as the last of them; 0: all."""
    top_p: float = 1.0
    """Keeps the most likely tokens whose probabilities first sum to p; 1: all."""
    min_p: float = 0.0
    """Keeps tokens with at least this share of the probability of the most likely one; 0: all."""
    seed: int = 0
    """Same seed, same text: a draw depends on the seed, the prompt's number and the token's number alone."""

    def __post_init__(self) -> None:
        self._check("repetition_penalty", self.repetition_penalty > 0, "a number above 0")
        self._check("temperature", self.temperature >= 0, "a number of at least 0")
        self._check("top_k", self.top_k >= 0, "a whole number of at least 0 (0 keeps all)")
        self._check("top_p", 0 < self.top_p <= 1, "a number above 0 and at most 1 (1 keeps all)")
        self._check("min_p", 0 <= self.min_p <= 1, "a number from 0 (keeps all) to 1")
        self._check("seed", 0 <= self.seed <= LARGEST_SEED, f"a whole number from 0 to {LARGEST_SEED}")

    def _check(self, name: str, is_good: bool, expected: str) -> None:
        value = getattr(self, name)
        if not (is_good and math.isfinite(value)):
            raise UserError(f"{name}={value}: expected {expected}")


class SamplingRows(NamedTuple):
    """The settings of each row of a batch."""

    repetition_penalty: Float[Array, " B"]
    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    seed: UInt[Array, " B"]
    prompt: UInt[Array, " B"]  # number of the prompt


def sampling_rows(settings: list[tuple[Sampling, int]]) -> SamplingRows:
    """The rows' settings as arrays, from each row's `Sampling` and prompt number."""

    def column(name: str, dtype: type) -> Array:
        return jnp.asarray(np.array([getattr(sampling, name) for sampling, _ in settings], dtype))

    return SamplingRows(
        repetition_penalty=column("repetition_penalty", np.float32),
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        seed=column("seed", np.uint32),
        prompt=jnp.asarray(np.array([prompt for _, prompt in settings], np.uint32)),
    )


def penalize_repetition(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], penalty_B: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Divides the positive logits of seen tokens by the penalty and multiplies the negative ones (arXiv:1909.05858)."""
    penalty_B1 = penalty_B.astype(logits_BV.dtype)[:, None]
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1), logits_BV)


def keep_top_k(logits_BV: Float[Array, "B V"], k_B: Int[Array, " B"]) -> Float[Array, "B V"]:
    """-inf for all but the k largest logits and those equal to the last of them; k = 0 keeps all."""
    V = logits_BV.shape[1]
    rank_B = jnp.where(k_B == 0, V, jnp.minimum(k_B, V)) - 1
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    last_B1 = jnp.take_along_axis(sorted_BV, rank_B[:, None], axis=1)
    return jnp.where(logits_BV >= last_B1, logits_BV, -jnp.inf)


def keep_top_p(logits_BV: Float[Array, "B V"], p_B: Float[Array, " B"]) -> Float[Array, "B V"]:
    """-inf for all but the most likely tokens whose probabilities first sum to p (nucleus, arXiv:1904.09751)."""
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    share_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV  # of the tokens that are more likely
    p_B1 = p_B.astype(logits_BV.dtype)[:, None]
    kept_BV = (before_BV < p_B1) & jnp.isfinite(sorted_BV)
    kept_BV = kept_BV.at[:, 0].set(True)
    last_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where((logits_BV >= last_B1) | (p_B1 >= 1), logits_BV, -jnp.inf)


def keep_min_p(logits_BV: Float[Array, "B V"], p_B: Float[Array, " B"]) -> Float[Array, "B V"]:
    """-inf for tokens with less than p times the probability of the most likely one (arXiv:2407.01082)."""
    least_B1 = logits_BV.max(axis=-1, keepdims=True) + jnp.log(p_B.astype(logits_BV.dtype))[:, None]
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def draw(
    logits_BV: Float[Array, "B V"], seed_B: UInt[Array, " B"], prompt_B: UInt[Array, " B"], token_B: Int[Array, " B"]
) -> Int[Array, " B"]:
    """A token of each row by the Gumbel-max trick; the draw depends on (seed, prompt, token) and on no other row."""

    def noise(seed: Array, prompt: Array, token: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt), token)
        return jax.random.gumbel(key, logits_BV.shape[1:], jnp.float32)

    gumbel_BV = jax.vmap(noise)(seed_B, prompt_B, token_B).astype(logits_BV.dtype)
    return jnp.argmax(logits_BV + gumbel_BV, axis=-1).astype(jnp.int32)


def choose(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], rows: SamplingRows, token_B: Int[Array, " B"]
) -> Int[Array, " B"]:
    """The next token of each row.

    Args:
      logits_BV: of the next token.
      seen_BV: the tokens of the prompt and of the answer so far.
      rows: the settings of each row.
      token_B: the number of the token within its answer, from 0.
    """
    logits_BV = penalize_repetition(logits_BV, seen_BV, rows.repetition_penalty)
    likeliest_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    is_drawn_B = rows.temperature > 0

    def drawn(logits_BV: Array) -> Array:
        temperature_B = jnp.where(is_drawn_B, rows.temperature, 1).astype(logits_BV.dtype)
        logits_BV = keep_top_k(logits_BV / temperature_B[:, None], rows.top_k)
        logits_BV = keep_min_p(keep_top_p(logits_BV, rows.top_p), rows.min_p)
        return jnp.where(is_drawn_B, draw(logits_BV, rows.seed, rows.prompt, token_B), likeliest_B)

    # Greedy decoding does not sort the vocabulary.
    return jax.lax.cond(is_drawn_B.any(), drawn, lambda _: likeliest_B, logits_BV)
