"""Hugging Face's `config.json` as a `DecoderConfig`, and back. What differs in arithmetic is refused by name."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lm2_jax.decoder import DecoderConfig, RopeScaling
from lm2_jax.errors import UserError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
_MODEL_TYPES = ("llama", "mistral")
_ROPE_TYPES = ("default", "llama3")
# Fields with the one value that the decoder computes; absent means this value.
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "qkv_bias": (False, None),
    "use_qk_norm": (False, None),
    "qk_norm": (False, None),
    "sliding_window": (None,),
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1, 1.0, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "is_encoder_decoder": (False, None),
}


class LlamaSpec(NamedTuple):
    """A model of the Llama architecture, without its weights."""

    decoder: DecoderConfig
    vocab_size: int
    max_tokens: int | None  # longest text that the model was trained for
    eos_id: int | None  # the token that ends a text


def read_hf_config(plain: Any, where: str) -> LlamaSpec:
    """The model that a `config.json` describes.

    Args:
      plain: content of the file.
      where: path of the file, for messages.
    Raises:
      UserError: the model computes something that the decoder does not, or a field is missing or wrong.
    """
    if not isinstance(plain, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(plain).__name__}", status=1)
    _check_architecture(plain, where)
    for name, allowed in _FIXED.items():
        if name in plain and plain[name] not in allowed:
            raise UserError(
                f"{where}: {name}={plain[name]!r} is not supported; the decoder computes {name}={allowed[0]!r}",
                status=1,
            )
    heads = _integer(plain, "num_attention_heads", where)
    theta, scaling = _rope(plain, where)
    try:
        decoder = DecoderConfig(
            width=_integer(plain, "hidden_size", where),
            num_layers=_integer(plain, "num_hidden_layers", where),
            num_heads=heads,
            num_kv_heads=_integer(plain, "num_key_value_heads", where, heads),
            head_width=_integer(plain, "head_dim", where, 0) or None,
            mlp_width=_integer(plain, "intermediate_size", where),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_head=bool(plain.get("tie_word_embeddings", False)),
            norm_epsilon=_number(plain, "rms_norm_eps", where, 1e-6),
        )
    except ValueError as error:
        raise UserError(f"{where}: {error}", status=1) from error
    eos = plain.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    longest = _integer(plain, "max_position_embeddings", where, 0) or None
    return LlamaSpec(decoder, _integer(plain, "vocab_size", where), longest, eos if isinstance(eos, int) else None)


def _check_architecture(plain: Mapping[str, Any], where: str) -> None:
    if plain.get("auto_map"):
        raise UserError(
            f"{where}: auto_map asks for code that comes with the checkpoint, which is never run; expected a model of "
            f"{' or '.join(ARCHITECTURES)} without it",
            status=1,
        )
    named = plain.get("architectures") or []
    found = named[0] if isinstance(named, list) and len(named) == 1 else named
    is_known = found in ARCHITECTURES if named else plain.get("model_type") in _MODEL_TYPES
    if not is_known:
        raise UserError(
            f"{where}: architecture {found or plain.get('model_type')!r} is not supported; supported: "
            f"{', '.join(ARCHITECTURES)} (Llama 1 to 3, SmolLM2, TinyLlama, Mistral without a sliding window)",
            status=1,
        )


def _rope(plain: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base frequency and scaling; version 5 of transformers writes `rope_parameters` for both."""
    table = plain.get("rope_parameters") or plain.get("rope_scaling") or {}
    if not isinstance(table, dict):
        raise UserError(f"{where}: rope_scaling: expected a table, got {table!r}", status=1)
    theta = _number(table, "rope_theta", where, _number(plain, "rope_theta", where, 10_000.0))
    kind = table.get("rope_type", table.get("type", "default"))
    if kind not in _ROPE_TYPES:
        raise UserError(
            f"{where}: RoPE type {kind!r} is not supported; supported: {', '.join(_ROPE_TYPES)}",
            status=1,
        )
    if table.get("partial_rotary_factor", 1) not in (1, 1.0):
        raise UserError(f"{where}: partial_rotary_factor={table['partial_rotary_factor']} is not supported", status=1)
    if kind == "default":
        return theta, None
    return theta, RopeScaling(
        factor=_number(table, "factor", where),
        low_frequency_factor=_number(table, "low_freq_factor", where),
        high_frequency_factor=_number(table, "high_freq_factor", where),
        original_tokens=_integer(table, "original_max_position_embeddings", where),
    )


def _integer(plain: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    value = plain.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"{where}: {name}: expected a positive integer, got {value!r}", status=1)
    return value


def _number(plain: Mapping[str, Any], name: str, where: str, default: float | None = None) -> float:
    value = plain.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"{where}: {name}: expected a number, got {value!r}", status=1)
    return float(value)


def write_hf_config(spec: LlamaSpec, dtype: str) -> dict[str, Any]:
    """The `config.json` of a decoder.

    Args:
      spec: of the model.
      dtype: of the weights in the files.
    """
    d = spec.decoder
    plain: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": d.width,
        "intermediate_size": d.mlp_width,
        "num_hidden_layers": d.num_layers,
        "num_attention_heads": d.num_heads,
        "num_key_value_heads": d.num_kv_heads,
        "head_dim": d.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_tokens,
        "rms_norm_eps": d.norm_epsilon,
        "rope_theta": d.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": d.tie_head,
        "torch_dtype": dtype,
        "eos_token_id": spec.eos_id,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    if d.rope_scaling is not None:
        s = d.rope_scaling
        plain["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_frequency_factor,
            "high_freq_factor": s.high_frequency_factor,
            "original_max_position_embeddings": s.original_tokens,
        }
    return plain
