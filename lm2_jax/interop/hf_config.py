"""Hugging Face's `config.json` as a `DecoderConfig`, and back. What differs in arithmetic is refused by name."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lm2_jax.decoder import DecoderConfig
from lm2_jax.errors import UserError
from lm2_jax.interop.architectures import ARCHITECTURES, FIXED, Architecture, architecture_of
from lm2_jax.interop.hf_rope import read_rope, write_rope
from lm2_jax.interop.plain_values import a_number, an_integer


class DecoderSpec(NamedTuple):
    """A decoder, without its weights."""

    decoder: DecoderConfig
    vocab_size: int
    max_tokens: int | None  # longest text that the model was trained for
    eos_id: int | None  # the token that ends a text


def read_hf_config(plain: Any, where: str) -> DecoderSpec:
    """The model that a `config.json` describes.

    Args:
      plain: content of the file.
      where: path of the file, for messages.
    Raises:
      UserError: the model computes something that the decoder does not, or a field is missing or wrong.
    """
    if not isinstance(plain, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(plain).__name__}", status=1)
    architecture = _architecture(plain, where)
    plain = {**architecture.absent, **plain}
    _check_fixed(architecture, plain, where)

    def size(name: str, default: int | None = None) -> int:
        return an_integer(plain, architecture.fields.get(name, name), where, default)

    heads, width, longest = size("num_attention_heads"), size("hidden_size"), size("max_position_embeddings", 0) or None
    is_learned, epsilon = architecture.style.positions == "learned", "rms_norm_eps"
    usual = 4 * width if architecture.style.mlp == "gelu" else None  # n_inner is null in GPT-2's own configs
    if is_learned:
        longest = size("max_position_embeddings")
    try:
        theta, scaling = read_rope(plain, where)
        decoder = DecoderConfig(
            width=width,
            num_layers=size("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=size("num_key_value_heads", heads),
            head_width=size("head_dim", 0) or None,
            mlp_width=size("intermediate_size", usual),
            mlp=architecture.style.mlp,
            norm=architecture.style.norm,
            max_positions=longest if is_learned else None,
            rope_theta=theta,
            rope_scaling=scaling,
            attention_bias=architecture.biases[bool(plain.get("attention_bias"))],
            qk_norm=architecture.qk_norm,
            tie_head=bool(plain.get("tie_word_embeddings", False)),
            norm_epsilon=a_number(plain, architecture.fields.get(epsilon, epsilon), where, architecture.epsilon),
        )
    except ValueError as error:
        raise UserError(f"{where}: {error}", status=1) from error
    eos = plain.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    return DecoderSpec(decoder, size("vocab_size"), longest, eos if isinstance(eos, int) else None)


def _architecture(plain: Mapping[str, Any], where: str) -> Architecture:
    names = ", ".join(known.name for known in ARCHITECTURES)
    if plain.get("auto_map"):
        raise UserError(
            f"{where}: auto_map asks for code that comes with the checkpoint, which is never run; expected a model of "
            f"{names} without it",
            status=1,
        )
    named = plain.get("architectures") or []
    found = named[0] if isinstance(named, list) and len(named) == 1 else named
    for known in ARCHITECTURES:
        if found == known.name or (not named and plain.get("model_type") == known.model_type):
            return known
    raise UserError(
        f"{where}: architecture {found or plain.get('model_type')!r} is not supported; supported: {names} "
        f"({'; '.join(known.models for known in ARCHITECTURES)})",
        status=1,
    )


def _check_fixed(architecture: Architecture, plain: Mapping[str, Any], where: str) -> None:
    """Refuses what the decoder does not compute, by the name of the field."""
    allowed_bias = {"attention_bias": (*architecture.biases, None)}
    for name, allowed in {**FIXED, **architecture.fixed, **allowed_bias}.items():
        if name in plain and plain[name] not in allowed:
            raise UserError(
                f"{where}: {name}={plain[name]!r} is not supported; the decoder computes {name}={allowed[0]!r}",
                status=1,
            )
    kinds = plain.get("layer_types") or []
    other = [kind for kind in kinds if kind != "full_attention"] if isinstance(kinds, list) else [kinds]
    if other:
        raise UserError(
            f"{where}: layer_types has {other[0]!r}, which is not supported; the decoder computes 'full_attention' in "
            "all layers",
            status=1,
        )


def write_hf_config(spec: DecoderSpec, dtype: str) -> dict[str, Any]:
    """The `config.json` of a decoder, for which `transformers` must have a class (`architecture_of`).

    Args:
      spec: of the model.
      dtype: of the weights in the files.
    """
    d, architecture = spec.decoder, architecture_of(spec.decoder)
    assert architecture is not None
    biases = {value: bias for value, bias in architecture.biases.items() if bias == d.attention_bias}
    chosen = {"attention_bias": next(iter(biases))} if biases != architecture.biases else {}
    longest = spec.max_tokens if d.rope_scaling is None else d.rope_scaling.max_tokens or spec.max_tokens
    common = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": spec.vocab_size,
        "hidden_size": d.width,
        "intermediate_size": d.mlp_width,
        "num_hidden_layers": d.num_layers,
        "num_attention_heads": d.num_heads,
        "num_key_value_heads": d.num_kv_heads,
        "head_dim": d.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": d.max_positions or longest,
        "rms_norm_eps": d.norm_epsilon,
        "rope_theta": d.rope_theta,
        "rope_scaling": None if d.rope_scaling is None else write_rope(d.rope_scaling),
        "tie_word_embeddings": d.tie_head,
        "torch_dtype": dtype,
        "eos_token_id": spec.eos_id,
        "bos_token_id": None,
        "pad_token_id": None,
        **chosen,
    }
    named = {architecture.fields.get(k, k): value for k, value in common.items() if k not in architecture.without}
    return named | dict(architecture.extra)
