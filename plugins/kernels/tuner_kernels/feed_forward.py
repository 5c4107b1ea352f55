"""The feed-forward of a checkpointed block, from its norm to its gated residual, as one function.

A block is computed again until torch's checkpoint has the last tensor that was saved. Here all that backward needs is
saved before the feed-forward, and backward makes its intermediates itself, some thousand tokens at a time: the
recomputation of the block ends before the feed-forward, whose second product is then computed once and whose first is
computed as often as ever. Intermediates of all tokens are never held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tuner_kernels import functions, linears, recompute
from tuner_kernels.costs import PIECE_TOKENS

OF_A_MATRIX = 4
"""Tensors that make a matrix: W (O, I), b (O,) or None, A (r, I) or None, B (O, r) or None."""


def applies(module: nn.Module, rows: Tensor) -> list[linears.Parts] | None:
    """The two matrices of ``module``, a feed-forward on ``rows`` (B, S, D), where this file can compute it; else None.

    It can where nothing else is in it than two plain matrices, with or without LoRA, and GELU, and where the block is
    computed again in backward: elsewhere keeping the intermediates is what was asked for.
    """
    graph = torch.is_grad_enabled() and rows.requires_grad and recompute.is_checkpointed()
    if not graph or type(module) is not FeedForward:
        return None
    net: Any = module.net
    first, dropout, second, *more = net
    if more or type(first) is not GELU or first.approximate != "tanh" or (dropout.training and dropout.p):
        return None
    if not all(map(linears._is_bare, (module, first, dropout))):
        return None
    found = [linears.parts_of(each, rows) for each in (first.proj, second)]
    plain = [each for each in found if type(each) is linears.Parts]
    return plain if len(plain) == len(found) else None


def apply(matrices: Sequence[linears.Parts], rows: Tensor, modulation: Sequence[Tensor], eps: float) -> Tensor:
    """``rows + gate * feed_forward(norm(rows) * weight + bias)`` for rows (B, S, D).

    Arguments
        matrices: as :func:`applies` gave them.
        modulation: weight, bias and gate, float32, (1 or B, 1 or S, D).
        eps: of the norm.
    """
    tensors = [tensor for each in matrices for tensor in (each.weight, each.bias, each.down, each.up)]
    rows, node = recompute.keep(rows, *modulation, *tensors)
    scales = [each.scale for each in matrices]
    return _FeedForward.apply(node, eps, scales, rows, *modulation, *tensors)  # type: ignore[no-any-return]


class _FeedForward(Function):
    """(node, eps, scales, rows, weight, bias, gate, W, b, A, B, W, b, A, B) -> the result; ``node`` keeps the rest."""

    @staticmethod
    def forward(ctx: Any, node: Any, eps: float, scales: Sequence[float], *tensors: Tensor | None) -> Tensor:
        """See :func:`apply`."""
        ctx.node, ctx.eps, ctx.scales = node, eps, tuple(scales)
        work = _Work(tensors, eps, ctx.scales)
        with torch.autocast(work.rows.device.type, enabled=False):
            result = torch.empty_like(work.rows)
            for piece in work.pieces():
                piece.forward(result[:, piece.place])
        return result

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of the rows, and of every A and B."""
        work = _Work(recompute.taken(ctx.node), ctx.eps, ctx.scales)
        into = torch.empty_like(work.rows) if ctx.needs_input_grad[3] else None
        with torch.autocast(gradient.device.type, enabled=False):
            for piece in work.pieces():
                piece.backward(gradient[:, piece.place], None if into is None else into[:, piece.place])
        first, second = ((None, None, each.of_down, each.of_up) for each in work.matrices)
        return None, None, None, into, None, None, None, *first, *second


class _Matrix:
    """A frozen matrix with LoRA, in the type that it is multiplied in."""

    def __init__(self, tensors: Sequence[Any], scale: float) -> None:
        weight, bias, down, up = tensors
        kind = weight.dtype
        self.weight: Tensor = weight
        self.bias: Tensor | None = None if bias is None else bias.to(kind)
        self.down: Tensor | None = None if down is None else down.to(kind)
        self.scale = scale
        self.up = functions._scaled(up, scale, kind)
        self.of_down: Tensor | None = None
        self.of_up: Tensor | None = None
        """gradients of A and B, as far as they are summed"""

    def of(self, rows: Tensor) -> Tensor:
        """``rows`` (N, I) times the matrix: (N, O)."""
        weight = self.weight.T
        result = rows @ weight if self.bias is None else torch.addmm(self.bias, rows, weight)
        if self.down is not None and self.up is not None:
            result.addmm_(rows @ self.down.T, self.up.T)
        return result

    def learn(self, gradient: Tensor, rows: Tensor | None) -> Tensor | None:
        """Add what ``gradient`` (N, O) at ``rows`` (N, I) gives A and B; returns gradient · B, (N, r)."""
        if self.down is None or self.up is None or rows is None:
            return None
        inner = gradient @ self.up
        self.of_down = _sum(self.of_down, inner.T @ rows)
        self.of_up = _sum(self.of_up, functions._product(gradient.T, rows @ self.down.T, self.scale))
        return inner

    def into(self, gradient: Tensor, inner: Tensor | None) -> Tensor:
        """Gradient (N, I) of what was multiplied."""
        result = gradient @ self.weight
        return result if inner is None or self.down is None else result.addmm_(inner, self.down)


def _sum(so_far: Tensor | None, more: Tensor) -> Tensor:
    # A single piece is what the product gave; several are added up in float32.
    return more if so_far is None else so_far.float().add_(more)


class _Work:
    """What the feed-forward is computed from."""

    rows: Tensor
    weight: Tensor
    bias: Tensor
    gate: Tensor

    def __init__(self, tensors: Sequence[Any], eps: float, scales: Sequence[float]) -> None:
        self.rows, self.weight, self.bias, self.gate = tensors[:4]
        self.eps = eps
        parts = (tensors[4 : 4 + OF_A_MATRIX], tensors[4 + OF_A_MATRIX :])
        self.matrices = [_Matrix(each, scale) for each, scale in zip(parts, scales, strict=True)]

    def pieces(self) -> Iterator[_Piece]:
        """All of it, a part of the tokens at a time, parts as equal as can be."""
        tokens = self.rows.shape[1]
        size = -(-tokens // -(-tokens // PIECE_TOKENS))
        for start in range(0, tokens, size):
            yield _Piece(self, slice(start, min(tokens, start + size)))


@dataclass(frozen=True)
class _Piece:
    """A part of the tokens."""

    work: _Work
    place: slice

    def forward(self, result: Tensor) -> None:
        """Write the result (B, S', D)."""
        first, second = self.work.matrices
        normed, _, _ = self._norm()
        wide = first.of(_flat(normed, first.weight.dtype))
        fed = second.of(functional.gelu(wide, approximate="tanh")).view(result.shape)
        rows = self._row(self.work.rows)
        result.copy_(self._rows_of().gated_add(rows, fed.to(rows.dtype), self._row(self.work.gate)))

    def backward(self, gradient: Tensor, into: Tensor | None) -> None:
        """Add to the gradients of every A and B, and write that of the rows, (B, S', D)."""
        first, second = self.work.matrices
        functions_of_rows, rows, weight = self._rows_of(), self._row(self.work.rows), self._row(self.work.weight)
        normed, mean, inverse = self._norm()
        flat = _flat(normed, first.weight.dtype)
        wide = first.of(flat)
        fed = _flat(functions_of_rows.gated_backward(gradient, self._row(self.work.gate)), first.weight.dtype)
        active = None if second.down is None else functional.gelu(wide, approximate="tanh")
        of_active = second.into(fed, second.learn(fed, active))
        del active, fed
        of_wide = torch.ops.aten.gelu_backward(of_active, wide, approximate="tanh")
        del of_active, wide
        inner = first.learn(of_wide, flat)
        if into is not None:
            of_normed = first.into(of_wide, inner).view(gradient.shape).to(normed.dtype)
            into.copy_(functions_of_rows.norm_backward(of_normed, rows, weight, mean, inverse, gradient))

    def _norm(self) -> tuple[Tensor, Tensor, Tensor]:
        work = self.work
        rows, weight, bias = (self._row(each) for each in (work.rows, work.weight, work.bias))
        return self._rows_of().norm(rows, weight, bias, work.eps)  # type: ignore[no-any-return]

    def _row(self, tensor: Tensor) -> Tensor:
        """Of what each token has of its own, these tokens'; else what all share."""
        return tensor if tensor.shape[1] == 1 else tensor[:, self.place]

    def _rows_of(self) -> Any:
        return functions.rows_of(self.work.rows.device)


def _flat(rows: Tensor, kind: torch.dtype) -> Tensor:
    return rows.reshape(-1, rows.shape[-1]).to(kind)
