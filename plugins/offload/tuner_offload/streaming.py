"""Which blocks are on the device when: the block driver's residency for weights that stream.

In a forward the groups come in ascending order, in backward in descending order. The last groups of a
forward stay in the ring, where backward begins, and the last ones of backward are where the next forward
begins: both turns cost nothing. A guess that turns out wrong costs time, never correctness: a group that
is entered and not in the ring is copied then and there.

Weights that are trained live on the host, where the optimizer changes them: each forward copies them anew.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch

from tuner.errors import TrainingError
from tuner_offload.masters import Master, bind
from tuner_offload.ring import Ring


class BlockStreaming:
    """Implements :class:`tuner.blocks.Residency`.

    A block is bound to the ring's tensors from ``enter`` to its release and to the master's at all
    other times, so that whoever reads the network between steps finds its weights.

    Arguments
        masters: of the streamed groups, in the order of their blocks.
        blocks: how many the network has; those in no master are on the device for good.
    """

    def __init__(self, masters: Sequence[Master], ring: Ring, *, blocks: int) -> None:
        self.masters = masters
        self.ring = ring
        self.streamed: Set[int] = {id(value) for master in masters for value in master.values}
        self._first = ring.add(masters)
        self._group_of: dict[int, int] = {}
        self._entries: list[list[int]] = [[] for _ in range(blocks)]
        for group, master in enumerate(masters):
            for index, entry in enumerate(master.entries):
                self._group_of[entry.block] = group
                self._entries[entry.block].append(index)
        self._trained = any(master.trained for master in masters)
        self._bound: set[int] = set()
        self._last_entered = -1
        self._differentiated = False
        self._backward = False

    def begin(self, differentiated: bool) -> None:
        """A forward starts. Blocks that an interrupted one left bound are released."""
        self._release_all()
        self._differentiated, self._backward, self._last_entered = differentiated, False, -1
        if self._trained:
            self.ring.forget(range(self._first, self._first + len(self.masters)))
            self._prefetch(0)

    def enter(self, index: int) -> None:
        """Bind block ``index`` to its weights on the device, and start to copy those that come next.

        Raises TrainingError when every buffer of the ring is in use: blocks are then not released after
        their forward, because they are not checkpointed.
        """
        # A forward only ascends: the same block again, or one before it, is backward's recomputation.
        self._backward = self._backward or index <= self._last_entered
        self._last_entered = index
        group = self._group_of.get(index)
        if group is not None:
            if not self._is_here(group) and not self._load(group, keep=self._in_use()):
                raise TrainingError(
                    f"block {index} does not fit beside the blocks {sorted(self._bound)} that are still in use",
                    where="enable_group_offload",
                    remedy="set gradient_checkpointing to true: "
                    "only checkpointed blocks are released after their forward",
                )
            self._bind(index, on_device=True)
        self._prefetch(self._next_group(index))

    def leave(self, index: int) -> None:
        """Release block ``index`` after its forward."""
        self._release(index)

    def backward_done(self, index: int) -> None:
        """Release block ``index`` after its backward."""
        self._release(index)

    def end(self, differentiated: bool) -> None:
        """Release what is left: the first trained block's end of backward is never announced."""
        self._release_all()
        if self._trained:
            # The optimizer reads the gradients that are on their way, and changes what is being copied.
            self.ring.copier.finish()
        elif differentiated:
            self._differentiated, self._backward = True, False
            self._prefetch(0)

    def _release(self, index: int) -> None:
        if index in self._group_of:
            self._bind(index, on_device=False)
        if self._trained:
            # It would keep the low-precision copy of every trained weight until the forward is over.
            torch.clear_autocast_cache()  # type: ignore[no-untyped-call]
        self._prefetch(self._next_group(index - 1 if self._backward else index + 1))

    def _release_all(self) -> None:
        for index in tuple(self._bound):
            self._bind(index, on_device=False)

    def _bind(self, index: int, *, on_device: bool) -> None:
        group = self._group_of[index]
        master = self.masters[group]
        values = self.ring.values(self._first + group) if on_device else master.values
        for entry in self._entries[index]:
            bind(master.entries[entry], values[entry])
        (self._bound.add if on_device else self._bound.discard)(index)

    def _in_use(self) -> set[int]:
        return {self._group_of[index] for index in self._bound}

    def _is_here(self, group: int) -> bool:
        return self.ring.holds(self._first + group)

    def _load(self, group: int, keep: set[int]) -> bool:
        return self.ring.load(self._first + group, keep={self._first + each for each in keep})

    def _next_group(self, index: int) -> int:
        """The group of block ``index``, or of the next one in the current direction that streams."""
        if self._backward:
            return next((self._group_of[each] for each in range(index, -1, -1) if each in self._group_of), -1)
        blocks = range(index, len(self._entries))
        return next((self._group_of[each] for each in blocks if each in self._group_of), len(self.masters))

    def _prefetch(self, group: int) -> None:
        """Start to copy ``group`` and those after it in the current direction, as far as the ring has room."""
        ahead = self._ahead(group)
        for wanted in ahead:
            if not self._is_here(wanted):
                self._load(wanted, keep={*ahead, *self._in_use()})

    def _ahead(self, group: int) -> list[int]:
        """The groups that the ring should hold, from ``group`` on. Rendering starts over where a forward ends."""
        step = -1 if self._backward else 1
        window = range(group, group + step * len(self.ring.buffers), step)
        if self._differentiated or self._backward or self._trained:
            return [each for each in window if 0 <= each < len(self.masters)]
        return [each % len(self.masters) for each in window]
