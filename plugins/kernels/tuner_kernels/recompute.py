"""What a checkpointed block does not hold, nor compute to its end again: backward makes it from what is held anyway.

A function whose result can be made again from what it saves has ``again`` on its node: (node) -> the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks


def is_checkpointed() -> bool:
    """Whether somebody takes what autograd saves now: it is computed again in backward, or waits elsewhere."""
    return _hooks() is not None


def _hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def taken(node: Any) -> tuple[Any, ...]:
    """What the node of a function saved. Several may ask: torch's checkpoint gives it only once."""
    if not hasattr(node, "taken"):
        node.taken = node.saved_tensors
    return node.taken  # type: ignore[no-any-return]


def forget(node: Any) -> None:
    """Let go of what :func:`taken` gave: to be called in the node's own backward, which comes last."""
    if hasattr(node, "taken"):
        del node.taken


def maker(tensor: Tensor) -> Any:
    """The node that can make ``tensor`` again, in a block that is checkpointed; else None."""
    node = tensor.grad_fn if is_checkpointed() and tensor.output_nr == 0 else None
    return node if hasattr(node, "again") else None


@contextmanager
def made_again(*tensors: Tensor) -> Iterator[None]:
    """While entered, autograd keeps of those ``tensors`` that can be made again how that is done, and no copy."""
    nodes = {each.untyped_storage()._cdata: node for each in tensors if (node := maker(each)) is not None}
    hooks = _hooks()
    if hooks is None or not nodes:
        yield
        return
    pack, unpack = hooks

    def keep(tensor: Tensor) -> Any:
        node = nodes.get(tensor.untyped_storage()._cdata)
        return pack(tensor) if node is None else _View(node, tensor.shape, tensor.stride(), tensor.storage_offset())

    def give(kept: Any) -> Tensor:
        return kept.made() if isinstance(kept, _View) else unpack(kept)

    with saved_tensors_hooks(keep, give):
        yield


@dataclass(frozen=True)
class _View:
    """A view of what a node gives."""

    node: Any
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    def made(self) -> Tensor:
        """It, made again."""
        result: Tensor = self.node.again(self.node)
        return result.as_strided(self.shape, self.stride, self.offset)


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
        forget(ctx)
        return gradient, *[None] * ctx.others


def keep(rows: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Any]:
    """``rows``, and the node that has saved them with ``tensors``: :func:`taken` gives all, in their order."""
    kept = Kept.apply(rows, *tensors)
    return kept, kept.grad_fn
