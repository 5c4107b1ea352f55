"""Frozen Linear layers that multiply in 8 bits, forward and for the gradient of their input.

The weight never changes, so it is quantised once; rows of tokens are quantised as they come, each by its own largest
magnitude. There is no gradient of the weight, so two products are all there is.

int8 keeps one copy of W: its scales belong to outputs, and for the gradient dX = dY W they go into dY before that is
quantised. fp8 keeps W and, quantised by its own rows, W transposed: the device's product takes its second matrix by
columns only.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tuner_quantization.stored import Codec, StoredLinear, StoredSink

INT8, FP8 = 127.0, torch.finfo(torch.float8_e4m3fn).max
TINY = 1e-12
"""The smallest scale: a row of zeros would be divided by zero."""
INT8_ROWS = 32
"""At least so many rows are multiplied: CUDA's int8 product refuses 16 and fewer."""
MULTIPLE = 16
"""Of both sides of a weight, for CUDA's products; other weights are written out."""


def int8_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``rows`` (N, K) as int8 (N, K), and float32 scales (N, 1)."""
    wide = rows.float()
    scales = (wide.abs().amax(1, keepdim=True) / INT8).clamp_min(TINY)
    return (wide / scales).round_().to(torch.int8), scales


def fp8_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``rows`` (N, K) as float8_e4m3fn (N, K), and float32 scales (N, 1)."""
    wide = rows.float()
    scales = (wide.abs().amax(1, keepdim=True) / FP8).clamp_min(TINY)
    return (wide / scales).clamp_(-FP8, FP8).to(torch.float8_e4m3fn), scales


def int8_product(rows: Tensor, matrix: Tensor) -> Tensor:
    """``rows`` (N, K) int8 times ``matrix`` (K, M) int8: (N, M) int32, exact."""
    missing = max(0, INT8_ROWS - len(rows)) if rows.is_cuda else 0
    if missing:
        padded: Tensor = torch._int_mm(torch.nn.functional.pad(rows, (0, 0, 0, missing)), matrix)
        return padded[: len(rows)]
    product: Tensor = torch._int_mm(rows, matrix)
    return product


def fp8_product(rows: Tensor, row_scales: Tensor, columns: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``rows`` (N, K) times ``columns`` (M, K) turned, float8, with scales (N, 1) and (M, 1): (N, M) in ``dtype``."""
    if rows.is_cuda:
        product: Tensor = torch._scaled_mm(
            rows, columns.t(), scale_a=row_scales, scale_b=scales.t(), out_dtype=torch.bfloat16
        )
        return product.to(dtype)
    return ((rows.float() @ columns.float().t()) * row_scales * scales.t()).to(dtype)


class Products(Codec):
    """A codec whose weight can be multiplied with as it is stored."""

    @abstractmethod
    def forward(self, rows: Tensor, stored: Sequence[Tensor]) -> Tensor:
        """``rows @ weight.T``: (N, in) -> (N, out), in the dtype of ``rows``."""

    @abstractmethod
    def backward(self, gradient: Tensor, stored: Sequence[Tensor]) -> Tensor:
        """``gradient @ weight``: (N, out) -> (N, in), in the dtype of ``gradient``."""


class Int8Products(Products):
    """``weight`` (out, in) int8 and ``weight_scale`` (out, 1) float32."""

    names = ("weight", "weight_scale")

    def encode(self, weight: Tensor) -> Mapping[str, Tensor]:
        """Each output by its largest magnitude over 127."""
        stored, scales = int8_rows(weight)
        return {"weight": stored, "weight_scale": scales}

    def decode(self, stored: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The scale is applied in float32, and only the product rounded to ``dtype``."""
        weight, scales = stored
        return (weight.float() * scales).to(dtype)

    def forward(self, rows: Tensor, stored: Sequence[Tensor]) -> Tensor:
        """See :class:`Products`."""
        weight, scales = stored
        small, row_scales = int8_rows(rows)
        return int8_product(small, weight.t()).float().mul_(row_scales).mul_(scales.t()).to(rows.dtype)

    def backward(self, gradient: Tensor, stored: Sequence[Tensor]) -> Tensor:
        """See :class:`Products`. The weight's scales go into the gradient: its one copy serves here too."""
        weight, scales = stored
        small, row_scales = int8_rows(gradient.float() * scales.t())
        return int8_product(small, weight).float().mul_(row_scales).to(gradient.dtype)


class Fp8Products(Products):
    """``weight`` (out, in) and ``weight_turned`` (in, out) float8_e4m3fn, each with a float32 scale for each row."""

    names = ("weight", "weight_scale", "weight_turned", "weight_turned_scale")

    def encode(self, weight: Tensor) -> Mapping[str, Tensor]:
        """Each output, and in the turned copy each input, by its largest magnitude over 448."""
        stored, scales = fp8_rows(weight)
        turned, turned_scales = fp8_rows(weight.t().contiguous())
        return {
            "weight": stored,
            "weight_scale": scales,
            "weight_turned": turned,
            "weight_turned_scale": turned_scales,
        }

    def decode(self, stored: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The scale is applied in float32, and only the product rounded to ``dtype``."""
        return (stored[0].float() * stored[1]).to(dtype)

    def forward(self, rows: Tensor, stored: Sequence[Tensor]) -> Tensor:
        """See :class:`Products`."""
        return fp8_product(*fp8_rows(rows), stored[0], stored[1], rows.dtype)

    def backward(self, gradient: Tensor, stored: Sequence[Tensor]) -> Tensor:
        """See :class:`Products`."""
        return fp8_product(*fp8_rows(gradient), stored[2], stored[3], gradient.dtype)


class ProductLinear(StoredLinear):
    """Computes ``x @ weight.T + bias`` in 8 bits where the device's products take the shape, else written out."""

    codec: Products

    def forward(self, input: Tensor) -> Tensor:
        """(…, in) -> (…, out), in the dtype of autocast or else of ``input``."""
        if input.is_cuda and (self.in_features % MULTIPLE or self.out_features % MULTIPLE):
            return super().forward(input)
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        product: Tensor = _Product.apply(input.to(dtype), self.bias, self.codec, *self._stored())  # type: ignore[no-untyped-call]
        return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor | None, codec: Products, *stored: Tensor) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.codec, ctx.dtype = codec, rows.dtype
        with torch.autocast(rows.device.type, enabled=False):
            product = codec.forward(rows.reshape(-1, rows.shape[-1]), stored)
        product = product if bias is None else product.add_(bias.to(product.dtype))
        return product.view(*rows.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        stored = ctx.saved_tensors  # asked for once: under checkpointing a second time is an error
        with torch.autocast(gradient.device.type, enabled=False):
            flat = gradient.reshape(-1, gradient.shape[-1]).to(ctx.dtype)
            result = ctx.codec.backward(flat, stored)
        return result.view(*gradient.shape[:-1], -1), None, None, *[None] * len(stored)


class _ProductSink(StoredSink):
    codec: Products

    def empty(self, plain: nn.Linear) -> nn.Linear:
        """A layer without storage."""
        return ProductLinear(plain, self.codec)


class Int8ProductSink(_ProductSink):
    """Keeps the weights in int8, and multiplies in it."""

    codec = Int8Products()


class Fp8ProductSink(_ProductSink):
    """Keeps the weights in float8, twice, and multiplies in it."""

    codec = Fp8Products()
