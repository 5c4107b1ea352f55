"""Tensors on their way to the device, without the host waiting for it."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

T = TypeVar("T")


def sent(given: T, device: torch.device) -> T:
    """A tensor, or all in a dict or tuple, on ``device``: by way of page-locked memory where that is a GPU."""

    def one(tensor: Tensor) -> Tensor:
        pinned = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
        return pinned.to(device, non_blocking=True)

    return tree_map_only(Tensor, one, given)  # type: ignore[no-any-return]


class Lane:
    """Copies to a CUDA device on a stream of their own, beside what is computed there."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, given: T) -> T:
        """As :func:`sent`; :meth:`receive` is to be called before anything is computed with it."""
        with torch.cuda.stream(self._stream):
            return sent(given, self.device)

    def receive(self, there: Any) -> None:
        """Order what is queued from now on after all copies; their memory is not given away before it is done."""
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        tree_map_only(Tensor, lambda each: each.record_stream(current), there)
