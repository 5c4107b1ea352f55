"""A backward for kernels that have none: that of exact attention, recomputed.

The output is the kernel's own, the gradients are those of exact attention at the same queries, keys and values. They
are thus not the gradients of the output, which differs by the kernel's error; they cost one more exact forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from tuner.attention import Kernel


def with_exact_backward(kernel: Kernel) -> Kernel:
    """``kernel`` with the backward of exact attention; without a gradient to come it is called as it is."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        wanted = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
        if not wanted:
            return kernel(query, key, value)
        return _ExactBackward.apply(query, key, value, kernel)  # type: ignore[no-any-return,no-untyped-call]

    return run


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Exact attention of torch; everything (B, tokens, heads, head_dim)."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return scaled_dot_product_attention(query, key, value).transpose(1, 2)


class _ExactBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return kernel(query, key, value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        rows = [each.detach().requires_grad_() for each in ctx.saved_tensors]
        with torch.enable_grad():
            out = exact(*rows)
        query, key, value = torch.autograd.grad(out, rows, gradient.to(out.dtype))
        return query, key, value, None
