"""The row-wise work of a block as Triton kernels: one program a token, one read and one write for each tensor.

The functions are those of :mod:`tuner_kernels.eager`, with the same arguments and results.
"""

# Triton has no types; its functions are no functions of Python's.
# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call,untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuner_kernels.eager import Table


@triton.jit
def _norm(x, weight, bias, y, means, inverses, tokens, width, per_batch, per_token, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    own = (row // tokens) * per_batch + (row % tokens) * per_token + at
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, 0) / width
    centred = tl.where(inside, value - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    scale = tl.load(weight + own, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + own, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + at, (centred * inverse * scale + shift).to(y.dtype.element_ty), mask=inside)
    tl.store(means + row, mean)
    tl.store(inverses + row, inverse)


@triton.jit
def _norm_backward(
    dy, x, weight, means, inverses, residual, dx, tokens, width, per_batch, per_token,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    own = (row // tokens) * per_batch + (row % tokens) * per_token + at
    inverse = tl.load(inverses + row)
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    normed = tl.where(inside, (value - tl.load(means + row)) * inverse, 0.0)
    scale = tl.load(weight + own, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(dy + row * width + at, mask=inside, other=0.0).to(tl.float32) * scale
    inner = gradient - tl.sum(gradient, 0) / width - normed * (tl.sum(gradient * normed, 0) / width)
    result = inner * inverse
    if ADD:
        result += tl.load(residual + row * width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row * width + at, result.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _turned(
    x, weight, cos, sin, y, inverses, tokens, width, half, per_batch, eps,
    TURN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    inside = pair < width // 2
    at = x + row * width + 2 * pair
    left = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(at + 1, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(left * left + right * right, 0) / width + eps)
    left = left * inverse * tl.load(weight + 2 * pair, mask=inside, other=0.0).to(tl.float32)
    right = right * inverse * tl.load(weight + 2 * pair + 1, mask=inside, other=0.0).to(tl.float32)
    to = y + row * width + 2 * pair
    if TURN:
        where = (row // tokens) * per_batch + (row % tokens) * half + pair % half
        c = tl.load(cos + where, mask=inside, other=0.0)
        s = tl.load(sin + where, mask=inside, other=0.0)
        tl.store(to, (left * c - right * s).to(y.dtype.element_ty), mask=inside)
        tl.store(to + 1, (left * s + right * c).to(y.dtype.element_ty), mask=inside)
    else:
        tl.store(to, left.to(y.dtype.element_ty), mask=inside)
        tl.store(to + 1, right.to(y.dtype.element_ty), mask=inside)
    tl.store(inverses + row, inverse)


@triton.jit
def _turned_backward(
    dy, x, weight, cos, sin, inverses, dx, tokens, width, half, per_batch,
    TURN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    inside = pair < width // 2
    offset = row * width + 2 * pair
    inverse = tl.load(inverses + row)
    left = tl.load(dy + offset, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(dy + offset + 1, mask=inside, other=0.0).to(tl.float32)
    if TURN:
        where = (row // tokens) * per_batch + (row % tokens) * half + pair % half
        c = tl.load(cos + where, mask=inside, other=0.0)
        s = tl.load(sin + where, mask=inside, other=0.0)
        left, right = left * c + right * s, right * c - left * s
    left = left * tl.load(weight + 2 * pair, mask=inside, other=0.0).to(tl.float32)
    right = right * tl.load(weight + 2 * pair + 1, mask=inside, other=0.0).to(tl.float32)
    one = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x + offset + 1, mask=inside, other=0.0).to(tl.float32)
    along = tl.sum(left * one + right * other, 0) * inverse * inverse / width
    tl.store(dx + offset, ((left - one * along) * inverse).to(dx.dtype.element_ty), mask=inside)
    tl.store(dx + offset + 1, ((right - other * along) * inverse).to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _gated(x, change, gate, y, tokens, width, per_batch, per_token, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    own = (row // tokens) * per_batch + (row % tokens) * per_token + at
    value = tl.load(change + row * width + at, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.load(gate + own, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + at, value.to(y.dtype.element_ty), mask=inside)


def norm(rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`tuner_kernels.eager.norm`."""
    rows, result = rows.contiguous(), torch.empty_like(rows, memory_format=torch.contiguous_format)
    mean, inverse = _statistic(rows), _statistic(rows)
    weight, bias = weight.contiguous(), bias.contiguous()
    grid, tokens, width, block = _launch(rows)
    _norm[grid](rows, weight, bias, result, mean, inverse, tokens, width, *_steps(weight), eps, **block)
    return result, mean, inverse


def norm_backward(
    gradient: Tensor, rows: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, residual: Tensor | None
) -> Tensor:
    """As :func:`tuner_kernels.eager.norm_backward`."""
    gradient, rows, weight = gradient.contiguous(), rows.contiguous(), weight.contiguous()
    past = gradient if residual is None else residual.contiguous()
    result = torch.empty_like(rows)
    grid, tokens, width, block = _launch(rows)
    sizes = (tokens, width, *_steps(weight))
    add = residual is not None
    _norm_backward[grid](gradient, rows, weight, mean, inverse, past, result, *sizes, ADD=add, **block)
    return result


def turned_norm(rows: Tensor, weight: Tensor, table: Table | None, eps: float) -> tuple[Tensor, Tensor]:
    """As :func:`tuner_kernels.eager.turned_norm`."""
    rows, result = rows.contiguous(), torch.empty_like(rows, memory_format=torch.contiguous_format)
    inverse = _statistic(rows)
    weight = weight.contiguous()
    cos, sin, half, per_batch = _flat(table, weight)
    grid, tokens, width, block = _launch(rows, pairs=True)
    sizes = (tokens, width, half, per_batch, eps)
    _turned[grid](rows, weight, cos, sin, result, inverse, *sizes, TURN=table is not None, **block)
    return result, inverse


def turned_norm_backward(
    gradient: Tensor, rows: Tensor, weight: Tensor, inverse: Tensor, table: Table | None
) -> Tensor:
    """As :func:`tuner_kernels.eager.turned_norm_backward`."""
    gradient, rows, weight = gradient.contiguous(), rows.contiguous(), weight.contiguous()
    result = torch.empty_like(rows)
    cos, sin, half, per_batch = _flat(table, weight)
    grid, tokens, width, block = _launch(rows, pairs=True)
    sizes = (tokens, width, half, per_batch)
    given = (gradient, rows, weight, cos, sin, inverse, result)
    _turned_backward[grid](*given, *sizes, TURN=table is not None, **block)
    return result


def gated_add(rows: Tensor, change: Tensor, gate: Tensor) -> Tensor:
    """As :func:`tuner_kernels.eager.gated_add`."""
    rows, change, gate = rows.contiguous(), change.contiguous(), gate.contiguous()
    result = torch.empty_like(rows)
    grid, tokens, width, block = _launch(rows)
    _gated[grid](rows, change, gate, result, tokens, width, *_steps(gate), ADD=True, **block)
    return result


def gated_backward(gradient: Tensor, gate: Tensor) -> Tensor:
    """As :func:`tuner_kernels.eager.gated_backward`."""
    gradient, gate = gradient.contiguous(), gate.contiguous()
    result = torch.empty_like(gradient)
    grid, tokens, width, block = _launch(gradient)
    _gated[grid](gradient, gradient, gate, result, tokens, width, *_steps(gate), ADD=False, **block)
    return result


def _statistic(rows: Tensor) -> Tensor:
    return torch.empty((*rows.shape[:-1], 1), dtype=torch.float32, device=rows.device)


def _launch(rows: Tensor, *, pairs: bool = False) -> tuple[tuple[int], int, int, dict[str, Any]]:
    """Grid, tokens of a sample, width of a row, and the sizes of a program."""
    batch, tokens, width = rows.shape
    block = triton.next_power_of_2(width // 2 if pairs else width)
    return (batch * tokens,), tokens, width, {"BLOCK": block, "num_warps": 4 if block <= 2048 else 8}


def _steps(each: Tensor) -> tuple[int, int]:
    """Elements from one sample to the next, and from one token to the next; 0 where they share."""
    batch, tokens, width = each.shape
    return (tokens * width if batch > 1 else 0), (width if tokens > 1 else 0)


def _flat(table: Table | None, stand_in: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Cosines, sines, half the width of a head, and elements from one sample to the next."""
    if table is None:
        return stand_in, stand_in, 1, 0
    cos, sin = (each.contiguous() for each in table)
    return cos, sin, cos.shape[-1], (cos[0].numel() if cos.shape[0] > 1 else 0)
