"""What a block computes between its matrices and attention, with backward passes of their own.

Each keeps the little that its backward needs. Under autocast they choose their types themselves: what a row-wise
function gives has the type of what it got, and matrices are multiplied in the type of their weight.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tuner_kernels import eager, recompute
from tuner_kernels.eager import Table


def rows_of(device: torch.device) -> ModuleType:
    """The implementation of row-wise work for ``device``: Triton's kernels on a GPU that has it, else torch's own."""
    wanted = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return _triton() if wanted and _triton() is not None else eager  # type: ignore[return-value]


@cache
def _triton() -> ModuleType | None:
    try:
        from tuner_kernels import triton_rows
    except ImportError:
        return None
    return triton_rows


class Norm(Function):
    """(rows, weight, bias, eps) -> (normed, rows): the second goes past the norm, and backward adds both gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See :func:`tuner_kernels.eager.norm`."""
        with torch.autocast(rows.device.type, enabled=False):
            normed, mean, inverse = rows_of(rows.device).norm(rows, weight, bias, eps)
        ctx.save_for_backward(rows, weight, bias, mean, inverse)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.again = eps, _normed
        return normed, rows

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, gradient: Tensor | None, past: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of the rows alone."""
        rows, weight, _, mean, inverse = recompute.taken(ctx)
        recompute.forget(ctx)
        if gradient is None:
            return past, None, None, None
        with torch.autocast(rows.device.type, enabled=False):
            return rows_of(rows.device).norm_backward(gradient, rows, weight, mean, inverse, past), None, None, None


def _normed(node: Any) -> Tensor:
    rows, weight, bias, _, _ = recompute.taken(node)
    with torch.autocast(rows.device.type, enabled=False):
        return rows_of(rows.device).norm(rows, weight, bias, node.eps)[0]  # type: ignore[no-any-return]


class TurnedNorm(Function):
    """(rows, weight, cos, sin, eps) -> normed and turned rows; without a table they are only normed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
        """See :func:`tuner_kernels.eager.turned_norm`."""
        table: Table | None = None if cos is None or sin is None else (cos, sin)
        implementation = rows_of(rows.device)
        with torch.autocast(rows.device.type, enabled=False):
            turned, inverse = implementation.turned_norm(rows, weight, table, eps)
        ctx.save_for_backward(rows, weight, inverse, cos, sin)
        ctx.eps = eps
        if implementation is not eager:  # in torch's own operations to turn again would be a sixth of all traffic
            ctx.again = _turned
        return turned  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of the rows alone."""
        rows, weight, inverse, cos, sin = recompute.taken(ctx)
        recompute.forget(ctx)
        table = None if cos is None else (cos, sin)
        with torch.autocast(rows.device.type, enabled=False):
            result = rows_of(rows.device).turned_norm_backward(gradient, rows, weight, inverse, table)
        return result, None, None, None, None


def _turned(node: Any) -> Tensor:
    rows, weight, _, cos, sin = recompute.taken(node)
    table = None if cos is None else (cos, sin)
    with torch.autocast(rows.device.type, enabled=False):
        return rows_of(rows.device).turned_norm(rows, weight, table, node.eps)[0]  # type: ignore[no-any-return]


class GatedAdd(Function):
    """(rows, change, gate) -> rows + change * gate."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, change: Tensor, gate: Tensor) -> Tensor:
        """See :func:`tuner_kernels.eager.gated_add`."""
        ctx.save_for_backward(gate)
        with torch.autocast(rows.device.type, enabled=False):
            return rows_of(rows.device).gated_add(rows, change.to(rows.dtype), gate)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of the rows and the change."""
        (gate,) = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            return gradient, rows_of(gradient.device).gated_backward(gradient, gate), None


class Linears(Function):
    """Several frozen matrices with LoRA on the same rows: (rows, scales, W, b, A, B, W, b, A, B, …) -> results.

    Products are added into results and gradients, so that no tensor is read or written for an addition: h = rows · Aᵀ
    for all at once, then rows · Wᵀ + b + scale · h · Bᵀ. Where a matrix has no LoRA, A and B are None.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scales: Sequence[float], *parts: Tensor | None) -> tuple[Tensor, ...]:
        """``rows`` (B, S, I); ``parts``: for each W (O, I), b (O,) or None, A (r, I) or None, B (O, r) or None."""
        kind = parts[0].dtype  # type: ignore[union-attr]
        with torch.autocast(rows.device.type, enabled=False):
            flat = rows.reshape(-1, rows.shape[-1]).to(kind)
            ups = [_scaled(up, scale, kind) for up, scale in zip(parts[3::4], scales, strict=True)]
            downs = [each for each in parts[2::4] if each is not None]
            ranks = [0 if down is None else down.shape[0] for down in parts[2::4]]
            down = (torch.cat(downs) if len(downs) > 1 else downs[0]).to(kind) if downs else None
            hidden = None if down is None else flat @ down.T
            inner = [None] * len(ranks) if hidden is None else hidden.split(ranks, dim=1)
            results = []
            for weight, bias, up, own in zip(parts[0::4], parts[1::4], ups, inner, strict=True):
                assert weight is not None
                result = flat @ weight.T if bias is None else torch.addmm(bias.to(kind), flat, weight.T)
                if up is not None:
                    result.addmm_(own, up.T)
                results.append(result.view(*rows.shape[:-1], -1))
        trained = any(ctx.needs_input_grad[2:])
        ctx.source = recompute.maker(rows)
        ctx.save_for_backward(
            flat if trained and ctx.source is None else None, hidden if trained else None, down, *parts[0::4], *ups
        )
        ctx.scales, ctx.ranks, ctx.shape, ctx.kind = tuple(scales), ranks, rows.shape, rows.dtype
        return tuple(results)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Of the rows, and of every A and B."""
        flat, hidden, down, *rest = ctx.saved_tensors
        weights, ups = rest[: len(gradients)], rest[len(gradients) :]
        into: Tensor | None = None
        inner: list[Tensor] = []
        own: list[Tensor | None] = []
        with torch.autocast(gradients[0].device.type, enabled=False):
            hiddens = [None] * len(ups) if hidden is None else hidden.split(ctx.ranks, dim=1)
            for each, weight, up, part, scale in zip(gradients, weights, ups, hiddens, ctx.scales, strict=True):
                gradient = each.reshape(-1, each.shape[-1]).to(weight.dtype)
                if ctx.needs_input_grad[0]:
                    into = gradient @ weight if into is None else into.addmm_(gradient, weight)
                if up is not None:
                    inner.append(gradient @ up)
                own.append(None if up is None or part is None else _product(gradient.T, part, scale))
            if hidden is not None and ctx.source is not None:
                flat = ctx.source.again(ctx.source).reshape(-1, ctx.shape[-1]).to(weights[0].dtype)
            down_gradients = _of_downs(inner, flat, down, into)
        found = iter(down_gradients)
        parts: list[Any] = []
        for up, gradient_up in zip(ups, own, strict=True):
            parts += [None, None, next(found) if up is not None and down_gradients else None, gradient_up]
        shaped = None if into is None else into.view(ctx.shape).to(ctx.kind)
        return shaped, None, *_wanted(ctx, parts)


def _scaled(up: Tensor | None, scale: float, kind: torch.dtype) -> Tensor | None:
    """B times its scale: what it is multiplied by, forward and backward."""
    return None if up is None else (up if scale == 1 else up * scale).to(kind)


def _product(one: Tensor, other: Tensor, scale: float) -> Tensor:
    """``scale * one @ other`` in one operation."""
    return torch.addmm(one.new_empty(1, 1), one, other, beta=0, alpha=scale)


def _of_downs(inner: list[Tensor], flat: Tensor | None, down: Tensor | None, into: Tensor | None) -> list[Tensor]:
    """Gradients of every A; what goes through them to the rows is added to ``into``."""
    if not inner:
        return []
    joined = torch.cat(inner, dim=1) if len(inner) > 1 else inner[0]
    if into is not None and down is not None:
        into.addmm_(joined, down)
    if flat is None:
        return []
    return list((joined.T @ flat).split([each.shape[1] for each in inner]))


def _wanted(ctx: Any, parts: list[Any]) -> list[Any]:
    """Those gradients that are wanted, in float32 where autograd casts them to the parameter's type itself."""
    return [each if ctx.needs_input_grad[2 + place] else None for place, each in enumerate(parts)]
