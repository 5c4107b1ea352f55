"""Counting the bytes that tensors hold, on any device: what a feature saves is measured where there is no GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While entered, counts the storages that operations give, each once, until they are freed.

    Arguments
        counts: which tensors count; None is all. Views of storages made before it was entered count too.
    """

    def __init__(self, counts: Callable[[Tensor], bool] | None = None) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        """bytes held now, and the most that were held at one instant"""
        self._counts = counts
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation, then count what it gave."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (self._counts is None or self._counts(leaf)):
                self._take(leaf.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _take(self, storage: UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.live -= size
