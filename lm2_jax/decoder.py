"""Sizes of the decoder that a memory joins."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3's stretching of the low RoPE frequencies."""

    factor: float = 8.0
    """By how much the longest wavelengths grow."""
    low_frequency_factor: float = 1.0
    """Wavelengths above original_tokens / this are stretched fully."""
    high_frequency_factor: float = 4.0
    """Wavelengths below original_tokens / this are left alone."""
    original_tokens: int = 8192
    """Context length the unscaled frequencies were made for."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The Llama-3 style decoder that a memory joins."""

    width: int = 64
    """Model width D."""
    num_layers: int = 2
    """Decoder blocks L."""
    num_heads: int = 4
    """Query heads H."""
    num_kv_heads: int = 4
    """Key/value groups G; divides num_heads."""
    head_width: int | None = None
    """Width K of one head; None: width / num_heads."""
    mlp_width: int = 192
    """Hidden width F of the SwiGLU."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies (Llama 3: 500,000)."""
    rope_scaling: RopeScaling | None = None
    """Llama-3 frequency scaling, or none."""
    tie_head: bool = True
    """Whether the head is the embedding's transpose."""
    window_tokens: int | None = None
    """Sliding attention window in tokens, this one included, reaching into the segment before; None: the segment."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in the RMSNorms before attention, memory and MLP, and in the last one; those inside a
    memory and in join.combine always add 1e-5."""
    attention_kernel: Literal["auto", "plain", "splash", "cudnn"] = "auto"
    """Implementation of attention within a segment: plain operations, the TPU kernel (splash attention), cuDNN's fused
    kernel (NVIDIA GPUs, bfloat16), or auto: splash on TPUs wherever it supports the model, else plain. A kernel that is
    chosen by name and does not support the model is an error (docs/tpu.md); off TPUs splash is emulated, slowly."""

    def __post_init__(self) -> None:
        for name in ("width", "num_layers", "num_heads", "num_kv_heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"decoder.{name} must be at least 1, got {getattr(self, name)}")
        if self.head_width is None and self.width % self.num_heads:
            raise ValueError(
                f"decoder.width={self.width} is not a multiple of decoder.num_heads={self.num_heads}; "
                "change one of them or set decoder.head_width"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"decoder.num_heads={self.num_heads} is not a multiple of decoder.num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"RoPE needs an even head width, got {self.head_dim}; set decoder.head_width")
        if self.rope_theta <= 0:
            raise ValueError(f"decoder.rope_theta must be positive, got {self.rope_theta}")

    @property
    def head_dim(self) -> int:
        """Width K of one head."""
        return self.width // self.num_heads if self.head_width is None else self.head_width
