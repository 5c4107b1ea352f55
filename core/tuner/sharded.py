"""Tensors that are spread over the processes (torch's DTensor): put together, and cut again. Others pass through."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of ``tensor``."""
    return hasattr(tensor, "full_tensor")


def whole_of(tensor: Any) -> Tensor:
    """``tensor`` whole, in every process. Every process must call it."""
    whole: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return whole


def gathered(tensor: Tensor) -> Tensor:
    """``tensor`` whole, on the host of the main process; empty in the others. Every process must call it."""
    if not is_sharded(tensor):
        return tensor
    from torch import distributed

    whole = whole_of(tensor.detach())
    # A copy: where parts are of unequal size it is a view into more memory.
    return whole.to("cpu", copy=True) if distributed.get_rank() == 0 else whole.new_empty(0, device="cpu")


def cut_like(tensor: Tensor, other: Any) -> Tensor:
    """This process's part of ``tensor``, which every process has whole, as ``other`` is spread. Nothing is sent."""
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
