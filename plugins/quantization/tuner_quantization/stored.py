"""A frozen Linear layer whose weight is stored in fewer bits and written out when it is computed with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tuner_quantization.layers import LinearSink


class Codec(ABC):
    """One way to store a weight. Without state: everything it needs to read a weight is in the tensors."""

    names: tuple[str, ...] = ("weight",)
    """Names of the tensors, as they are parameters of the layer; the first is ``weight``."""

    @abstractmethod
    def encode(self, weight: Tensor) -> Mapping[str, Tensor]:
        """The tensors that ``weight`` (out, in) is stored in, on its device."""

    @abstractmethod
    def decode(self, stored: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in ``dtype``."""


class StoredLinear(nn.Linear):
    """Computes ``x @ weight.T + bias`` with a weight that a codec keeps.

    Written out in forward and again in backward, so that nothing of the full weight is kept in between. What it is
    stored in are plain parameters: they move, stream and are counted like any other.
    """

    def __init__(self, plain: nn.Linear, codec: Codec) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.codec = plain.in_features, plain.out_features, codec
        self.weight, self.bias = plain.weight, plain.bias

    def store(self, weight: Tensor, device: torch.device) -> None:
        """Keep ``weight`` (out, in) on ``device``."""
        for name, tensor in self.codec.encode(weight).items():
            self._parameters[name] = nn.Parameter(tensor.to(device), requires_grad=False)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), written out."""
        return self.codec.decode(self._stored(), (self.out_features, self.in_features), dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(…, in) -> (…, out), in the dtype of autocast or else of ``input``."""
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        shape = (self.out_features, self.in_features)
        product: Tensor = _Product.apply(input.to(dtype), self.bias, self.codec, shape, *self._stored())  # type: ignore[no-untyped-call]
        return product

    def _stored(self) -> list[Tensor]:
        return [self.get_parameter(name) for name in self.codec.names]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, bias: Tensor | None, codec: Codec, shape: tuple[int, int], *stored: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.codec, ctx.shape, ctx.dtype = codec, shape, rows.dtype
        weight = codec.decode(stored, shape, rows.dtype)
        return functional.linear(rows, weight, None if bias is None else bias.to(rows.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        stored = ctx.saved_tensors  # asked for once: under checkpointing a second time is an error
        weight = ctx.codec.decode(stored, ctx.shape, ctx.dtype)
        return gradient.to(ctx.dtype) @ weight, None, None, None, *[None] * len(stored)


class StoredSink(LinearSink):
    """Keeps the weights as ``codec`` stores them."""

    codec: Codec

    def empty(self, plain: nn.Linear) -> nn.Linear:
        """A layer without storage."""
        return StoredLinear(plain, self.codec)

    def fill(self, layer: nn.Linear, weight: Tensor) -> None:
        """Store ``weight``."""
        assert isinstance(layer, StoredLinear)
        layer.store(weight, self.device)
