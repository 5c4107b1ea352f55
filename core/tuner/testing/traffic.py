"""Counting what a computation moves and dispatches, on any device: what a feature spares is counted without a GPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """While entered, counts operations that compute, and bytes of those that are no products of matrices or attention.

    Bytes are those of every tensor read or written; a broadcast one counts once.
    """

    products = frozenset({"mm", "addmm", "addmm_", "bmm"})
    views = frozenset(
        {
            *("view", "_unsafe_view", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select"),
            *("split", "split_with_sizes", "detach", "alias", "as_strided", "unbind", "_reshape_alias", "device"),
            *("view_as_complex", "view_as_real", "empty_like", "empty", "new_empty", "empty_strided"),
            "new_empty_strided",
        }
    )

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it."""
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in self.views:
            return result
        self.operations[name] += 1
        if name not in self.products and "attention" not in name:
            seen = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)]
            self.bytes += sum(each.untyped_storage().nbytes() if 0 in each.stride() else each.nbytes for each in seen)
        return result
