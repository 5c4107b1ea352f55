"""Weights stored by bitsandbytes: 4-bit NormalFloat (arXiv:2305.14314) with scales that are quantised too, or int8.

Only what the library stores and reads is used, not its layers: the stored tensors are then plain parameters, which
stream, are counted and are adapted by LoRA like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from tuner_quantization.stored import Codec, StoredSink

BLOCK = 64
"""Weights that share a scale."""
SCALES = 256
"""Scales that share a scale."""


@cache
def _codes(device: torch.device) -> tuple[Tensor, Tensor]:
    """The tables of NormalFloat 4 and of the 8-bit scales."""
    return bnb.get_4bit_type("nf4", device=device), bnb.create_dynamic_map().to(device)


class Nf4(Codec):
    """``weight`` (out * in / 2, 1) uint8; ``absmax`` uint8 for each 64 weights; ``absmax_scale`` float32 for each 256
    of those; ``absmax_offset`` float32, their mean."""

    names = ("weight", "absmax", "absmax_scale", "absmax_offset")

    def encode(self, weight: Tensor) -> Mapping[str, Tensor]:
        """bitsandbytes' own double quantisation."""
        packed, state = bnb.quantize_4bit(
            weight.float().contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        tensors = packed, state.absmax, state.state2.absmax, state.offset.reshape(1)
        return dict(zip(self.names, tensors, strict=True))

    def decode(self, stored: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """bitsandbytes' own reading of it."""
        packed, absmax, scale, offset = stored
        code, scale_code = _codes(packed.device)
        inner = bnb.QuantState(absmax=scale, code=scale_code, blocksize=SCALES, dtype=torch.float32)
        state = bnb.QuantState(
            absmax=absmax,
            shape=torch.Size(shape),
            code=code,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=offset[0],
            state2=inner,
        )
        weight: Tensor = bnb.dequantize_4bit(packed, state)
        return weight


class Int8(Codec):
    """``weight`` (out, in) int8 and ``weight_scale`` (out,) float32: the largest magnitude of each output."""

    names = ("weight", "weight_scale")

    def encode(self, weight: Tensor) -> Mapping[str, Tensor]:
        """bitsandbytes' row-wise quantisation, without its outliers: weights have none that matter."""
        stored, scale, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
        return {"weight": stored, "weight_scale": scale.float()}

    def decode(self, stored: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Scaled in float32, rounded to ``dtype``."""
        weight, scale = stored
        exact = weight.to(dtype)  # bfloat16 holds every int8
        return torch.mul(exact, scale.unsqueeze(1) / 127, out=torch.empty_like(exact))


class Nf4Sink(StoredSink):
    """Keeps the weights in NormalFloat 4."""

    codec = Nf4()


class Int8Sink(StoredSink):
    """Keeps the weights in int8."""

    codec = Int8()
