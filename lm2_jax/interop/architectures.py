"""The classes of `transformers` whose arithmetic the decoder has, and what each of their configs means."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from lm2_jax.decoder import DecoderConfig
from lm2_jax.interop import gpt2_names
from lm2_jax.interop.gpt2_names import Place

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


class Style(NamedTuple):
    """Layers of a decoder."""

    norm: Literal["rms", "layer"]
    mlp: Literal["swiglu", "gelu"]
    positions: Literal["rope", "learned"]


LLAMA, GPT2 = Style("rms", "swiglu", "rope"), Style("layer", "gelu", "learned")


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
      style: of its layers.
      epsilon: of its norms, where its config does not say.
      places: where tensors are in files that have them in another form; None: by the common names, one by one.
      fields: the common name of a field -> that of this class.
      without: common fields that its config does not have.
    """

    name: str
    model_type: str
    models: str
    biases: Mapping[bool, Bias]
    qk_norm: bool = False
    fixed: Mapping[str, tuple[Any, ...]] = _NO_WINDOW
    absent: Mapping[str, Any] = {}
    extra: Mapping[str, Any] = {}
    style: Style = LLAMA
    places: Callable[[DecoderConfig], dict[str, Place]] | None = None
    epsilon: float = 1e-6
    fields: Mapping[str, str] = {}
    without: frozenset[str] = frozenset()


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
    Architecture(
        "GPT2LMHeadModel",
        "gpt2",
        "GPT-2",
        {False: "qkvo"},  # always
        fixed={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True, None),
            "scale_attn_by_inverse_layer_idx": (False, None),
            "reorder_and_upcast_attn": (False, None),
            "add_cross_attention": (False, None),
        },
        absent={"tie_word_embeddings": True},
        style=GPT2,
        places=gpt2_names.places,
        epsilon=1e-5,
        fields={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        without=frozenset({"num_key_value_heads", "head_dim", "hidden_act", "rope_theta", "rope_scaling"}),
        extra={"activation_function": "gelu_new"},
    ),
)


def style_of(decoder: DecoderConfig) -> Style:
    """The layers that a decoder has."""
    return Style(decoder.norm, decoder.mlp, "rope" if decoder.max_positions is None else "learned")


def architecture_of(decoder: DecoderConfig) -> Architecture | None:
    """The class that computes what a decoder does; None where `transformers` has none."""
    d, has_plain_heads = decoder, decoder.num_kv_heads * decoder.head_dim == decoder.width
    for known in ARCHITECTURES:
        if (known.style, known.qk_norm) == (style_of(d), d.qk_norm) and d.attention_bias in known.biases.values():
            return known if has_plain_heads or "num_key_value_heads" not in known.without else None
    return None
