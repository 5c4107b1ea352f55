"""Selective checkpointing: what self-attention gave is kept, the rest of the block is computed again."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from tuner.checkpointing import ATTENTION_OPERATORS, Checkpointing
from tuner.run import log


class Selective(Checkpointing):
    """Also keeps what self-attention gave, its log-sum-exp included, so that it is computed once.

    Attention to as many keys as there are queries is self-attention. A text of exactly as many tokens as the clip
    passes for it: harmless, it is kept too.
    """

    def __init__(self, interval: int = 1) -> None:
        super().__init__(interval)
        self.kept = 0
        """Outputs of attention that forwards kept so far."""
        self._blocks = 0

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Torch's selective checkpointing. Says so, once, where the first block had nothing that can be kept."""
        if self._blocks == 1 and not self.kept:
            log.warning(
                "gradient_checkpointing: selective keeps nothing here: torch cannot take the output of this attention "
                "kernel out of its block (a kernel without an operator, or compiled), so it is computed again"
            )
        self._blocks += 1
        keep, reuse = create_selective_checkpoint_contexts(self._keep)
        return _SelfAttention(keep), _SelfAttention(reuse)

    def _keep(self, *_: Any, **__: Any) -> CheckpointPolicy:
        self.kept += 1
        return CheckpointPolicy.MUST_SAVE


class _SelfAttention(TorchDispatchMode):
    """Shows one of torch's two modes self-attention and nothing else.

    Torch refuses a recomputation with operations that the forward did not have, such as casts that autocast had cached.
    """

    def __init__(self, mode: TorchDispatchMode) -> None:
        super().__init__()
        self._mode = mode

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """As torch's own: compiled blocks stay compiled in it."""
        return True

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        axis = ATTENTION_OPERATORS.get(operator.name())
        if axis is not None and args[0].shape[axis] == args[1].shape[axis]:
            return self._mode.__torch_dispatch__(operator, types, args, kwargs)
        return operator(*args, **(kwargs or {}))
