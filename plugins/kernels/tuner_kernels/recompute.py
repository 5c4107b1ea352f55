"""What a checkpointed block keeps early, so that torch's checkpoint need not compute it to its end again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def is_checkpointed() -> bool:
    """Whether somebody takes what autograd saves now: it is computed again in backward, or waits elsewhere."""
    return torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def taken(node: Any) -> tuple[Tensor | None, ...]:
    """What the node of a function saved. Several may ask: torch's checkpoint gives it only once."""
    if not hasattr(node, "taken"):
        node.taken = node.saved_tensors
    return node.taken  # type: ignore[no-any-return]


class Kept(Function):
    """(rows, *tensors) -> rows: saves them all for the backward of functions after it, before these compute."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, *tensors: Tensor | None) -> Tensor:
        """``rows`` as they are."""
        ctx.save_for_backward(rows, *tensors)
        ctx.others = len(tensors)
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """That of ``rows``, as it is."""
        if hasattr(ctx, "taken"):
            del ctx.taken
        return gradient, *[None] * ctx.others


def keep(rows: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Any]:
    """``rows``, and the node that has saved them with ``tensors``: :func:`taken` gives all, in their order."""
    kept = Kept.apply(rows, *tensors)
    return kept, kept.grad_fn
