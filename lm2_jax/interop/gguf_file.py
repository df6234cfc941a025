"""GGUF files of a Llama or a relative of it, through the `gguf` package; quantised tensors are expanded as it does."""

import json
import pathlib
from typing import Any

import numpy as np

from lm2_jax.decoder import DecoderConfig
from lm2_jax.errors import UserError
from lm2_jax.interop.hf_config import DecoderSpec
from lm2_jax.interop.hf_folder import token_name
from lm2_jax.interop.names import Shapes, pair_reader
from lm2_jax.interop.sentencepiece_model import Piece, build_sentencepiece
from lm2_jax.interop.source import Source, TokenizerFiles

# Whether q and k rotate the pairs (2i, 2i + 1) instead of (i, i + K/2).
ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False}
QUANTIZATIONS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Token types of the format, as `sentencepiece_model.TYPES` names them.
_PIECES = {1: "normal", 2: "unknown", 3: "control", 4: "user_defined", 5: "unused", 6: "byte"}
_CONTROL, _USER_DEFINED = 3, 4
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_COMPOSED = {"qwen2"}  # pre-tokenizers before which characters are composed
_SPLITS = {"llama-bpe": _SPLIT.format(digits="{1,3}"), "qwen2": _SPLIT.format(digits="")}


class GgufFile(Source):
    """See the module.

    Args:
      path: of the file.
    Raises:
      UserError: without the package, or for a file that is damaged or holds another model.
    """

    def __init__(self, path: pathlib.Path):
        self.where = str(path)
        self._gguf = _library()
        try:
            reader = self._gguf.GGUFReader(str(path))
        except Exception as error:  # the package raises what its slices of a damaged file happen to raise
            raise UserError(f"{path}: not a GGUF file, or truncated ({error})", status=1) from error
        self._fields = reader.fields
        self._tensors: dict[str, Any] = {}
        for tensor in reader.tensors:
            if tensor.name != "rope_freqs.weight":
                self._tensors[_hf_name(tensor.name)] = tensor
        self._architecture = self._field("general.architecture")
        self._check_files(reader, path)
        self.spec = self._spec()
        in_pairs = ARCHITECTURES[self._architecture]
        self._read = pair_reader(self._read_raw, self.spec.decoder) if in_pairs else self._read_raw

    def _check_files(self, reader: Any, path: pathlib.Path) -> None:
        types = {tensor.tensor_type.name for tensor in reader.tensors}
        unknown = sorted(types - set(QUANTIZATIONS))
        if unknown:
            raise UserError(f"{path}: quantisation {unknown[0]} is not supported; supported: {QUANTIZATIONS}", status=1)
        if self._architecture not in ARCHITECTURES:
            raise UserError(
                f"{path}: architecture {self._architecture!r} is not supported; supported: "
                f"{', '.join(map(repr, ARCHITECTURES))}",
                status=1,
            )
        scaling = self._field(f"{self._architecture}.rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in {tensor.name for tensor in reader.tensors}:
            raise UserError(
                f"{path}: its RoPE is scaled (type {scaling!r}), and GGUF does not say how a config would; import the "
                "Hugging Face folder of this model",
                status=1,
            )

    def _field(self, name: str, default: Any = None) -> Any:
        field = self._fields.get(name)
        return default if field is None else field.contents()

    def _number(self, name: str, default: Any = None) -> Any:
        value = self._field(f"{self._architecture}.{name}", default)
        if not isinstance(value, int | float):
            raise UserError(f"{self.where}: {self._architecture}.{name}: expected a number, got {value!r}", status=1)
        return value

    def _spec(self) -> DecoderSpec:
        width, heads = int(self._number("embedding_length")), int(self._number("attention.head_count"))
        head = int(self._number("attention.key_length", width // max(heads, 1)))
        if int(self._number("rope.dimension_count", head)) != head:
            raise UserError(f"{self.where}: RoPE on a part of each head is not supported", status=1)
        table = self._tensors.get("model.embed_tokens.weight")
        vocabulary = int(table.shape[1]) if table is not None and len(table.shape) == 2 else 0

        def has(name: str) -> bool:
            return f"model.layers.0.self_attn.{name}" in self._tensors

        try:
            decoder = DecoderConfig(
                width=width,
                num_layers=int(self._number("block_count")),
                num_heads=heads,
                num_kv_heads=int(self._number("attention.head_count_kv", heads)),
                head_width=None if head * heads == width else head,
                mlp_width=int(self._number("feed_forward_length")),
                rope_theta=float(self._number("rope.freq_base", 10_000.0)),
                attention_bias="qkvo" if has("o_proj.bias") else "qkv" if has("q_proj.bias") else "none",
                qk_norm=has("q_norm.weight"),
                tie_head="lm_head.weight" not in self._tensors,
                # The file has it in float32; the decimal number that was meant has at most seven digits.
                norm_epsilon=float(f"{self._number('attention.layer_norm_rms_epsilon'):.7g}"),
            )
        except (ValueError, ZeroDivisionError) as error:
            raise UserError(f"{self.where}: {error}", status=1) from error
        eos = self._field("tokenizer.ggml.eos_token_id")
        return DecoderSpec(decoder, vocabulary, int(self._number("context_length", 0)) or None, eos)

    def shapes(self) -> Shapes:
        """See the base class."""
        return {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """See the base class; float32."""
        return self._read(name)

    def _read_raw(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        numbers = self._gguf.dequantize(tensor.data, tensor.tensor_type)
        return np.asarray(numbers, np.float32).reshape([int(n) for n in reversed(tensor.shape)])

    def tokenizer(self) -> TokenizerFiles | None:
        """The vocabulary inside the file as a tokenizer.json or a tokenizer.model."""
        kind, template = self._field("tokenizer.ggml.model"), self._field("tokenizer.chat_template")
        if kind is None:
            return None
        more = {} if template is None else {"chat_template.jinja": template.encode()}
        tokens = list(self._field("tokenizer.ggml.tokens"))
        types = list(self._field("tokenizer.ggml.token_type") or [1] * len(tokens))
        if kind == "llama":
            scores = self._field("tokenizer.ggml.scores")
            pieces = [Piece(*piece) for piece in zip(tokens, scores, (_PIECES[t] for t in types), strict=True)]
            blank = self._field("tokenizer.ggml.add_space_prefix", True)
            return TokenizerFiles("sentencepiece", build_sentencepiece(pieces, blank), None, more)
        if kind != "gpt2":
            raise UserError(f"{self.where}: tokenizer {kind!r} is not supported; supported: 'gpt2', 'llama'", status=1)
        content = self._byte_bpe(tokens, types)
        return TokenizerFiles("json", content, token_name(content, self.spec.eos_id), more)

    def _byte_bpe(self, tokens: list[str], types: list[int]) -> bytes:
        """A byte-level BPE as a tokenizer.json."""
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        splits = {
            "smollm": [pre_tokenizers.Digits(individual_digits=True), byte_level],
            "gpt-2": [byte_level],
        }
        only_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        splits |= {name: [pre_tokenizers.Split(Regex(rule), "isolated"), only_bytes] for name, rule in _SPLITS.items()}
        split = self._field("tokenizer.ggml.pre")
        if split not in splits:
            raise UserError(
                f"{self.where}: pre-tokenizer {split!r} is not supported; supported: {sorted(splits)}", status=1
            )
        merges = [tuple(merge.split(" ")) for merge in self._field("tokenizer.ggml.merges")]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split == "llama-bpe"))
        inner.pre_tokenizer = pre_tokenizers.Sequence(splits[split])
        if split in _COMPOSED:
            inner.normalizer = normalizers.NFC()
        inner.decoder = decoders.ByteLevel()
        for token, kind in zip(tokens, types, strict=True):
            if kind in (_CONTROL, _USER_DEFINED):
                added = AddedToken(token, special=kind == _CONTROL, normalized=False)
                (inner.add_special_tokens if kind == _CONTROL else inner.add_tokens)([added])
        return json.dumps(json.loads(inner.to_str()), ensure_ascii=False).encode()


def _hf_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    return name


def _library() -> Any:
    try:
        import gguf  # pyright: ignore[reportMissingImports]  (an extra)
    except ImportError as error:
        raise UserError("reading GGUF files needs the package gguf: pip install gguf", status=1) from error
    return gguf
