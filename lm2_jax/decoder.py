"""Sizes of the decoder that a memory is joined to."""

import dataclasses
import fnmatch
from typing import Annotated, Literal, NamedTuple

from lm2_jax.fields import Checked, Range, Since
from lm2_jax.rope import RopeScaling

Width = Annotated[int, Range(1, 2**20)]


PROJECTIONS = (
    *("attention/q_proj", "attention/k_proj", "attention/v_proj", "attention/o_proj"),
    *("mlp/gated", "mlp/up", "mlp/down"),
)


class Adapter(NamedTuple):
    """A low-rank addition to one kernel."""

    rank: int
    scale: float


@dataclasses.dataclass(frozen=True)
class LoraConfig(Checked):
    """Low-rank adapters of the decoder's projections, y = x W + (alpha / r) x A B (LoRA, arXiv:2106.09685).

    B starts at zero, so the first outputs are those without adapters. `optim.freeze=('decoder',)` trains the adapters
    and the memory alone; `export_hf` adds the products to the kernels.
    """

    rank: Annotated[int, Range(0, 2**16)] = 0
    """Rank r of every adapter; 0: there are none."""
    alpha: Annotated[float, Range(0, 1e6, above=True)] = 16.0
    """The product is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("attention/q_proj", "attention/v_proj")
    """Patterns of the projections with an adapter, such as attention/* and mlp/*, in all blocks."""

    def __post_init__(self) -> None:
        for target in self.targets:
            if not fnmatch.filter(PROJECTIONS, target):
                raise ValueError(
                    f"model.decoder.lora.targets: {target!r} matches no projection; there are {', '.join(PROJECTIONS)}"
                )
        if self.rank and not self.targets:
            raise ValueError("model.decoder.lora.targets is empty; name projections, or set model.decoder.lora.rank=0")

    def adapter(self, projection: str) -> Adapter | None:
        """The adapter of one of `PROJECTIONS`, if it has one."""
        chosen = self.rank > 0 and any(fnmatch.fnmatchcase(projection, target) for target in self.targets)
        return Adapter(self.rank, self.alpha / self.rank) if chosen else None


@dataclasses.dataclass(frozen=True)
class DecoderConfig(Checked):
    """A decoder in the style of Llama 3, or with `norm`, `mlp` and `max_positions` in that of GPT-2."""

    width: Width = 64
    """Model width D."""
    num_layers: Annotated[int, Range(1, 10_000)] = 2
    """Decoder blocks L."""
    num_heads: Annotated[int, Range(1, 2**16)] = 4
    """Query heads H."""
    num_kv_heads: Annotated[int, Range(1, 2**16)] = 4
    """Key/value heads G; divides num_heads."""
    head_width: Annotated[int | None, Range(0, 2**16)] = None
    """Width K of one head; None: width / num_heads."""
    mlp_width: Width = 192
    """Hidden width F of the MLP."""
    mlp: Annotated[Literal["swiglu", "gelu"], Since(5)] = "swiglu"
    """The MLP: a SwiGLU without biases, or two kernels with biases and GELU between them (GPT-2)."""
    norm: Annotated[Literal["rms", "layer"], Since(5)] = "rms"
    """Norms before attention and MLP, and the last one: RMSNorm, or LayerNorm with a bias (GPT-2). Those of queries and
    keys are RMSNorms."""
    max_positions: Annotated[int | None, Range(1, 2**24), Since(5)] = None
    """Learned positions in place of RoPE, one vector per position that is added to the embeddings (GPT-2: 1,024).
    Positions count as those of RoPE, and memory tokens in a segment have theirs. None: RoPE."""
    rope_theta: Annotated[float, Range(0, 1e12, above=True)] = 10_000.0
    """Base of the rotary frequencies (Llama 3: 500,000)."""
    rope_scaling: RopeScaling | None = None
    """How the frequencies are stretched to longer texts, or None: not at all."""
    attention_bias: Annotated[Literal["none", "qkv", "qkvo"], Since(4)] = "none"
    """Projections of attention with an added bias: none, of queries, keys and values (Qwen2), or the output's too
    (GPT-2)."""
    qk_norm: Annotated[bool, Since(4)] = False
    """Whether queries and keys have an RMSNorm over each head, before RoPE (Qwen3)."""
    tie_head: bool = True
    """Whether the output head is the transposed embedding."""
    window_tokens: Annotated[int | None, Range(0, 2**24)] = None
    """Sliding attention window in tokens, including the current one; it reaches into the previous segment. None: the
    segment."""
    max_tokens: Annotated[int | None, Range(1, 2**24), Since(3)] = None
    """Full attention: each token sees its document so far, up to this many tokens, whose keys and values are kept; a
    longer document is an error. Excludes window_tokens. None: attention stays in its segment or window."""
    norm_epsilon: Annotated[float, Range(0, 1, above=True)] = 1e-5
    """Added to the mean square, or the variance, in the norms before attention, memory and MLP, of queries and keys,
    and in the last one; norms inside a memory and in join.combine always add 1e-5."""
    lora: Annotated[LoraConfig, Since(3)] = LoraConfig()
    """Low-rank adapters, to fine-tune a pretrained decoder."""
    attention_kernel: Literal["auto", "plain", "splash", "cudnn"] = "auto"
    """Implementation of attention within a segment: plain operations, the TPU kernel (splash attention), cuDNN's fused
    kernel (NVIDIA GPUs, bfloat16), or auto: splash on TPUs wherever it supports the model, else plain. A kernel that is
    chosen by name and does not support the model is an error (docs/tpu.md); off TPUs splash is emulated, slowly."""

    def __post_init__(self) -> None:
        if self.head_width is None and self.width % self.num_heads:
            raise ValueError(
                f"decoder.width={self.width} is not a multiple of decoder.num_heads={self.num_heads}; "
                "change one of them or set decoder.head_width"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"decoder.num_heads={self.num_heads} is not a multiple of decoder.num_kv_heads={self.num_kv_heads}"
            )
        if self.window_tokens is not None and self.max_tokens is not None:
            raise ValueError(
                f"decoder.window_tokens={self.window_tokens} and decoder.max_tokens={self.max_tokens} exclude each "
                "other: attention reaches over a window or over the full document; set one of them to None"
            )
        if self.head_dim < 1 or (self.max_positions is None and self.head_dim % 2):
            raise ValueError(f"RoPE needs an even head width, got {self.head_dim}; set decoder.head_width")
        self._check_positions()
        if self.rope_scaling is not None and self.rope_theta <= 1:
            raise ValueError(f"decoder.rope_theta={self.rope_theta} must be above 1 where decoder.rope_scaling is set")

    def _check_positions(self) -> None:
        """What learned positions exclude."""
        if self.max_positions is None:
            return
        if self.rope_scaling is not None:
            raise ValueError("decoder.rope_scaling is of RoPE, which decoder.max_positions replaces; set one to None")
        if self.window_tokens is not None:
            raise ValueError(
                "decoder.max_positions excludes decoder.window_tokens: a learned position is part of a kept key and "
                "cannot be moved to the segment before; set one of them to None"
            )
        if self.max_tokens is not None and self.max_tokens > self.max_positions:
            raise ValueError(
                f"decoder.max_tokens={self.max_tokens} is more than decoder.max_positions={self.max_positions}, and "
                "later tokens would have no position"
            )

    @property
    def head_dim(self) -> int:
        """Width K of one head."""
        return self.width // self.num_heads if self.head_width is None else self.head_width

    @property
    def carries_keys(self) -> bool:
        """Whether attention takes keys and values across a segment border."""
        return self.max_tokens is not None or (self.window_tokens or 1) > 1
