"""The longest document of a model with full attention (`decoder.max_tokens`), checked wherever the host can count.

Inside a compiled program nothing can be raised: there, outputs at positions that do not fit are NaN
(`lm2_jax.attention.cache`).
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from jax.core import Tracer

from lm2_jax.attention.cache import Cache, check_room

if TYPE_CHECKING:
    from jax.typing import ArrayLike

    from lm2_jax.config import ModelConfig
    from lm2_jax.model import ModelState, StreamState


def check_stream(config: "ModelConfig", carry: "StreamState", tokens_B: np.ndarray) -> None:
    """Raises TooLongError where a row of an open stream has no room for so many more tokens."""
    segments_B = _segments(config, carry.state)
    if segments_B is None or _is_traced(carry.position):
        return
    assert config.decoder.max_tokens is not None
    check_room(segments_B, np.asarray(carry.position) + tokens_B, config.segment_tokens, config.decoder.max_tokens)


def check_tokens(config: "ModelConfig", state: "ModelState", tokens: int) -> None:
    """Raises TooLongError where a row has no room for so many more tokens; `state` is at a border."""
    segments_B = _segments(config, state)
    if segments_B is not None:
        assert config.decoder.max_tokens is not None
        check_room(segments_B, np.full(len(segments_B), tokens), config.segment_tokens, config.decoder.max_tokens)


def check_segments(
    config: "ModelConfig",
    state: "ModelState",
    shape: tuple[int, ...],
    reset: "ArrayLike | None" = None,
    valid: "ArrayLike | None" = None,
    document: "ArrayLike | None" = None,
) -> None:
    """Raises TooLongError where full segments do not fit, as far as that is known while a program is traced.

    Args:
      config: the model.
      state: before the first segment.
      shape: [B, K T] of the tokens.
      reset: [B K] or [B], a document begins at this segment, or at the first one; None: nowhere.
      valid: [B, K T], false at padding; None: everywhere true.
      document: given where documents are packed, which are not counted here.
    """
    max_tokens, T = config.decoder.max_tokens, config.segment_tokens
    B, S = shape
    if max_tokens is None or document is not None:
        return
    segments_B = _segments(config, state)
    if reset is None and valid is None and segments_B is None:
        segments_B = np.zeros(B, int)
    if segments_B is None or _is_traced(reset) or _is_traced(valid):
        return
    reset_BJ = np.zeros((B, S // T), bool)
    if reset is not None:
        reset_BJ[:, : 1 if np.ndim(reset) == 1 else None] = np.asarray(reset).reshape(B, -1)
    valid_BJT = np.ones((B, S // T, T), bool) if valid is None else np.asarray(valid).reshape(B, -1, T)
    used_B = segments_B
    for reset_B, valid_BT in zip(reset_BJ.T, valid_BJT.swapaxes(0, 1), strict=True):
        used_B = np.where(reset_B, 0, used_B)
        last_B = np.where(valid_BT, np.arange(1, T + 1), 0).max(axis=1)
        check_room(used_B, last_B, T, max_tokens)
        used_B = used_B + (last_B > 0)


def _segments(config: "ModelConfig", state: "ModelState") -> np.ndarray | None:
    """Full segments of each row's document so far; None without full attention, and where they are not known."""
    if config.decoder.max_tokens is None:
        return None
    caches = [group.window for group in state.groups if isinstance(group.window, Cache)]
    if not caches or _is_traced(caches[0].segments) or not getattr(caches[0].segments, "is_fully_addressable", True):
        return None
    return np.where(np.asarray(caches[0].is_start)[0], 0, np.asarray(caches[0].segments)[0])


def _is_traced(array: Any) -> bool:
    return isinstance(array, Tracer)
