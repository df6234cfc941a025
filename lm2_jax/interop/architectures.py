"""The classes of `transformers` whose arithmetic the decoder has, and what each of their configs means."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from lm2_jax.decoder import DecoderConfig

Bias = Literal["none", "qkv", "qkvo"]

# Fields with the one value that the decoder computes; absent means this value.
FIXED: dict[str, tuple[Any, ...]] = {
    "mlp_bias": (False, None),
    "qkv_bias": (False, None),
    "use_qk_norm": (False, None),
    "qk_norm": (False, None),
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1, 1.0, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "is_encoder_decoder": (False, None),
}
_NO_WINDOW: dict[str, tuple[Any, ...]] = {"sliding_window": (None,)}
# Qwen's configs always name a window, and say apart from it whether it is used.
_NO_USED_WINDOW: dict[str, tuple[Any, ...]] = {"use_sliding_window": (False, None)}


class Architecture(NamedTuple):
    """One class of `transformers`.

    Attributes:
      name: of the class, in `architectures` of a config.json.
      model_type: in a config.json.
      models: who uses it, for messages and the documentation.
      biases: `attention_bias` of a config -> that of the decoder; one that is missing is refused.
      qk_norm: as in the decoder.
      fixed: fields with the only values that are supported, in addition to `FIXED`.
      absent: what an absent field means, where it is not what the decoder computes.
      extra: fields of an exported config in addition to the common ones.
    """

    name: str
    model_type: str
    models: str
    biases: Mapping[bool, Bias]
    qk_norm: bool = False
    fixed: Mapping[str, tuple[Any, ...]] = _NO_WINDOW
    absent: Mapping[str, Any] = {}
    extra: Mapping[str, Any] = {}


# The first that fits a decoder is the one that it is exported as.
ARCHITECTURES = (
    Architecture(
        "LlamaForCausalLM",
        "llama",
        "Llama 1 to 3.x, SmolLM2, TinyLlama",
        {False: "none", True: "qkvo"},
        extra={"mlp_bias": False},
    ),
    Architecture(
        "MistralForCausalLM",
        "mistral",
        "Mistral without a sliding window",
        {False: "none"},
        absent={"sliding_window": 4096, "num_key_value_heads": 8},
    ),
    Architecture(
        "Qwen2ForCausalLM",
        "qwen2",
        "Qwen2, Qwen2.5, without a sliding window",
        {False: "qkv", True: "qkv"},  # always these, whatever the config says
        fixed=_NO_USED_WINDOW,
        absent={"num_key_value_heads": 32},
        extra={"use_sliding_window": False, "sliding_window": None},
    ),
    Architecture(
        "Qwen3ForCausalLM",
        "qwen3",
        "Qwen3 without experts or a sliding window",
        {False: "none", True: "qkvo"},
        qk_norm=True,
        fixed=_NO_USED_WINDOW,
        absent={"num_key_value_heads": 32, "head_dim": 128},
        extra={"use_sliding_window": False, "sliding_window": None},
    ),
)


def architecture_of(decoder: DecoderConfig) -> Architecture | None:
    """The class that computes what a decoder does; None where `transformers` has none."""
    for known in ARCHITECTURES:
        if known.qk_norm == decoder.qk_norm and decoder.attention_bias in known.biases.values():
            return known
    return None
