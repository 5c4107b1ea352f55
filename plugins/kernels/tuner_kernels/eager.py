"""The row-wise work of a block in torch's own operations: what the Triton kernels are held against.

Rows are tokens (B, S, D). All arithmetic is float32; results have the type of what came in. ``weight``, ``bias`` and
``gate`` are float32 and broadcast: (1 or B, 1 or S, D). Statistics are float32, (B, S, 1).

Results are written where they go (``out=``), in the type that they are kept in: computing in float32 then costs no
float32 tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

Table = tuple[Tensor, Tensor]
"""Cosines and sines (1 or B, S, 1, E / 2), float32, for the pairs of a head of width E."""


def norm(rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm of ``rows``, times ``weight``, plus ``bias``; also the mean and the inverse deviation."""
    normed, mean, inverse = torch.native_layer_norm(rows.float(), (rows.shape[-1],), None, None, eps)
    return torch.addcmul(bias, normed, weight, out=torch.empty_like(rows)), mean, inverse


def norm_backward(
    gradient: Tensor, rows: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, residual: Tensor | None
) -> Tensor:
    """Gradient of ``rows``, with ``residual``, that of what went past the norm, added."""
    inner = torch.ops.aten.native_layer_norm_backward(
        gradient * weight, rows.float(), (rows.shape[-1],), mean, inverse, None, None, [True, False, False]
    )[0]
    return inner.to(rows.dtype) if residual is None else torch.add(inner, residual, out=torch.empty_like(rows))


def turned_norm(rows: Tensor, weight: Tensor, table: Table | None, eps: float) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm over D, times ``weight``, then each head's pairs turned by ``table``; also the inverse."""
    square = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float32).square_()
    inverse = square.div_(rows.shape[-1]).add_(eps).rsqrt_()
    normed = rows * inverse
    if table is None:
        return torch.mul(normed, weight, out=torch.empty_like(rows)), inverse
    return _turn(normed.mul_(weight), table, back=False).to(rows.dtype), inverse


def turned_norm_backward(
    gradient: Tensor, rows: Tensor, weight: Tensor, inverse: Tensor, table: Table | None
) -> Tensor:
    """Gradient of ``rows``."""
    if gradient.stride(-1) != 1:  # what torch's plain attention gives: pairs must lie side by side to be turned
        gradient = gradient.contiguous()
    turned = gradient if table is None else _turn(gradient.float(), table, back=True)
    wide = turned * weight.float()
    # A product of matrices of one row and one column: a sum that writes no product of all elements.
    along = (wide.unsqueeze(-2) @ rows.float().unsqueeze(-1)).squeeze(-1)
    wide.addcmul_(rows, inverse.square().mul_(along), value=-1 / rows.shape[-1])
    return torch.mul(wide, inverse, out=torch.empty_like(rows))


def _turn(wide: Tensor, table: Table, *, back: bool) -> Tensor:
    """``wide`` (B, S, D) float32 with its pairs turned, or turned back."""
    cos, sin = table
    turns = torch.complex(cos, -sin if back else sin)
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, cos.shape[-1], 2)))
    return torch.view_as_real(pairs * turns).flatten(2)


def gated_add(rows: Tensor, change: Tensor, gate: Tensor) -> Tensor:
    """``rows + change * gate``."""
    return torch.addcmul(rows, change, gate, out=torch.empty_like(rows))


def gated_backward(gradient: Tensor, gate: Tensor) -> Tensor:
    """Gradient of ``change``."""
    return torch.mul(gradient, gate, out=torch.empty_like(gradient))
