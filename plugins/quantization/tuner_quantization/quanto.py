"""8-bit and 4-bit weights by optimum-quanto, made tensor by tensor while a network is read.

quanto's own ``quantize`` and ``freeze`` need the whole network in full precision first. Here the Linear
layers are replaced while they have no storage yet, and each weight is quantised as it arrives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, QLinear, WeightQBytesTensor, qint4, qtype, qtypes
from optimum.quanto.tensor.packed import PackedTensor
from torch import Tensor, nn

from tuner_quantization.layers import LinearSink
from tuner_quantization.stored import Codec, StoredSink

GROUP = 64
"""Inputs that share a scale and a zero point of int4."""


class QuantoSink(LinearSink):
    """Keeps the weights in 8 bits, one scale per output channel, in quanto's ``QLinear`` (still an ``nn.Linear``)."""

    kind: qtype

    def empty(self, plain: nn.Linear) -> nn.Linear:
        """A QLinear without storage."""
        layer: nn.Linear = QLinear.from_module(plain, weights=self.kind)
        # Only quantised activations use these two, but on the meta device they could not be moved.
        layer.register_buffer("input_scale", torch.ones(()))
        layer.register_buffer("output_scale", torch.ones(()))
        return layer

    def fill(self, layer: nn.Linear, weight: Tensor) -> None:
        """Quantise ``weight`` (out, in), and keep only the result, on the device."""
        kept: Tensor = quantise(weight, self.kind, device=self.device, dtype=self.dtype)
        layer._parameters["weight"] = nn.Parameter(kept, requires_grad=False)


class Int8Sink(QuantoSink):
    """int8."""

    kind = qtypes["qint8"]


class Fp8Sink(QuantoSink):
    """float8_e4m3fn."""

    kind = qtypes["qfloat8_e4m3fn"]


def quantise(weight: Tensor, kind: qtype, *, device: torch.device, dtype: torch.dtype) -> WeightQBytesTensor:
    """``weight`` (out, in) in 8 bits with a scale (out, 1) in ``dtype`` for each output channel.

    The scale is rounded to ``dtype`` before the weight is divided by it, so that its rounding adds no
    error of its own. The plain tensor class is used on purpose: the optimised fp8 one compiles a CUDA
    extension at the first forward.
    """
    full = weight.float()
    axis = 0 if full.shape[0] > 1 else None
    scale = AbsmaxOptimizer()(full, kind, axis)
    # A channel of zeros would divide by zero, and 0/0 is NaN in fp8.
    scale = scale.clamp_min(torch.finfo(dtype).tiny).to(dtype)
    data = torch.ops.quanto.quantize_symmetric(full, dtype=kind.dtype, axis=axis, scale=scale)
    return WeightQBytesTensor(
        kind, axis, full.size(), full.stride(), data.to(device), scale.to(device), activation_qtype=None
    )


class Int4(Codec):
    """``weight`` (rows / 2, columns) uint8, two values each, ``weight_scale`` and ``weight_shift`` (groups, 1) float32.

    quanto's own 4-bit tensor compiles a C++ extension into its package when it is first read; here its two values a
    byte are taken apart by torch.
    """

    names = ("weight", "weight_scale", "weight_shift")

    def encode(self, weight: Tensor) -> Mapping[str, Tensor]:
        """quanto's affine quantisation in groups of 64 inputs."""
        full = weight.float()
        size = GROUP if full.shape[1] % GROUP == 0 else full.shape[1]
        scale, shift = MaxOptimizer()(full, qint4, 0, size)
        data = torch.ops.quanto.quantize_affine(full, bits=4, axis=0, group_size=size, scale=scale, shift=shift)
        return {"weight": PackedTensor.pack(data, 4)._data, "weight_scale": scale, "weight_shift": shift}

    def decode(self, stored: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Both halves of each byte, scaled and shifted in float32."""
        packed, scale, shift = stored
        values = torch.cat([packed & 15, packed >> 4])[: len(scale)]
        return (values * scale - shift).to(dtype).view(shape)


class Int4Sink(StoredSink):
    """Keeps the weights in int4."""

    codec = Int4()
