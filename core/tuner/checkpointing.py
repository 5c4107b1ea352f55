"""What is kept of a block between its forward and its backward.

Here is what is always there: the block's input alone. A plugin may put another policy on a network, in the stage
``CHECKPOINT``; the block driver calls it for each block that it checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

_TORCHS_OWN = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
ATTENTION_OPERATORS = {f"aten::_scaled_dot_product_{name}": -2 for name in _TORCHS_OWN}
"""Operators that compute attention whole, by the name torch dispatches them under, with the token axis of their first
two arguments, query and key. A plugin adds that of its kernel, so that a policy may keep what it gives."""


class Checkpointing:
    """Full checkpointing: every ``interval``-th block keeps its input alone, and is computed again in backward.

    Gradients are bit for bit those without it. One policy serves all forwards of a run, also several before a backward.
    """

    def __init__(self, interval: int = 1) -> None:
        self.interval = interval

    def run(self, block: Callable[[Tensor], Any], tokens: Tensor) -> Any:
        """``block(tokens)``, tokens (B, S, D), to be computed again in backward. Raises what ``block`` raises."""
        return checkpoint(block, tokens, use_reentrant=False)

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """What the block itself is computed in: in this forward, and in its recomputation."""
        return nullcontext(), nullcontext()
