"""Weights as tensor subclasses of torchao, made tensor by tensor while a network is read."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig, PerRow, quantize_

from tuner_quantization.layers import LinearSink

GROUP = 64
"""Inputs that share a scale of int4."""


class TorchaoSink(LinearSink):
    """Keeps the weights as torchao's weight-only tensors: the layer stays ``nn.Linear``, its weight is written out to
    compute with."""

    settings: Any

    def empty(self, plain: nn.Linear) -> nn.Linear:
        """The layer as it is: only its weight will be of another class."""
        return plain

    def fill(self, layer: nn.Linear, weight: Tensor) -> None:
        """Quantise through a layer that holds only this weight: torchao quantises modules."""
        alone = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        alone.weight = nn.Parameter(weight.to(self.dtype), requires_grad=False)
        quantize_(alone, self.settings())
        layer._parameters["weight"] = nn.Parameter(alone.weight.detach().to(self.device), requires_grad=False)


class Int8Sink(TorchaoSink):
    """int8 with a scale for each output."""

    settings = staticmethod(Int8WeightOnlyConfig)


class Fp8Sink(TorchaoSink):
    """float8_e4m3fn with a scale for each output."""

    # One scale for the whole weight would lose the outputs of small weights.
    settings = staticmethod(lambda: Float8WeightOnlyConfig(granularity=PerRow()))


class Int4Sink(TorchaoSink):
    """int4 in groups of 64 inputs, on CUDA."""

    settings = staticmethod(lambda: Int4WeightOnlyConfig(group_size=GROUP))
