"""Which blocks are on the device when: the block driver's residency for a frozen base.

In a forward the groups come in ascending order, in backward in descending order. The last groups of a
forward stay in the ring, where backward begins, and the last ones of backward are where the next forward
begins: both turns cost nothing. A guess that turns out wrong costs time, never correctness: a group that
is entered and not in the ring is copied then and there.
"""

from __future__ import annotations

from collections.abc import Sequence

from tuner.errors import TrainingError
from tuner_offload.masters import Master, bind
from tuner_offload.ring import Ring


class BlockStreaming:
    """Implements :class:`tuner.blocks.Residency`.

    A block is bound to the ring's parameters from ``enter`` to its release and to the master's at all
    other times, so that whoever reads the network between steps finds its weights.
    """

    def __init__(self, masters: Sequence[Master], ring: Ring, *, blocks: int, blocks_per_group: int) -> None:
        self.masters = masters
        self.ring = ring
        self._blocks_per_group = blocks_per_group
        self._entries: list[list[int]] = [[] for _ in range(blocks)]
        for master in masters:
            for index, entry in enumerate(master.entries):
                self._entries[entry.block].append(index)
        self._bound: set[int] = set()
        self._last_entered = -1
        self._differentiated = False
        self._backward = False

    def begin(self, differentiated: bool) -> None:
        """A forward starts. Blocks that an interrupted one left bound are released."""
        self._release_all()
        self._differentiated, self._backward, self._last_entered = differentiated, False, -1

    def enter(self, index: int) -> None:
        """Bind block ``index`` to its weights on the device, and start to copy those that come next.

        Raises TrainingError when every buffer of the ring is in use: blocks are then not released after
        their forward, because they are not checkpointed.
        """
        # A forward only ascends: the same block again, or one before it, is backward's recomputation.
        self._backward = self._backward or index <= self._last_entered
        self._last_entered = index
        group = index // self._blocks_per_group
        if not self.ring.holds(group) and not self.ring.load(group, keep=self._in_use()):
            raise TrainingError(
                f"block {index} does not fit beside the blocks {sorted(self._bound)} that are still in use",
                where="enable_group_offload",
                remedy="set gradient_checkpointing to true: only checkpointed blocks are released after their forward",
            )
        self._bind(index, on_device=True)
        self._prefetch(group)

    def leave(self, index: int) -> None:
        """Release block ``index`` after its forward."""
        self._release(index)

    def backward_done(self, index: int) -> None:
        """Release block ``index`` after its backward."""
        self._release(index)

    def end(self, differentiated: bool) -> None:
        """Release what is left: the first trained block's end of backward is never announced."""
        self._release_all()
        if differentiated:
            self._differentiated, self._backward = True, False
            self._prefetch(0)

    def _release(self, index: int) -> None:
        self._bind(index, on_device=False)
        following = index - 1 if self._backward else index + 1
        self._prefetch(following // self._blocks_per_group)

    def _release_all(self) -> None:
        for index in tuple(self._bound):
            self._bind(index, on_device=False)

    def _bind(self, index: int, *, on_device: bool) -> None:
        group = index // self._blocks_per_group
        master = self.masters[group]
        parameters = self.ring.parameters(group) if on_device else master.parameters
        for entry in self._entries[index]:
            bind(master.entries[entry], parameters[entry])
        (self._bound.add if on_device else self._bound.discard)(index)

    def _in_use(self) -> set[int]:
        return {index // self._blocks_per_group for index in self._bound}

    def _prefetch(self, group: int) -> None:
        """Start to copy ``group`` and those after it in the current direction, as far as the ring has room."""
        ahead = self._ahead(group)
        for wanted in ahead:
            if not self.ring.holds(wanted):
                self.ring.load(wanted, keep={*ahead, *self._in_use()})

    def _ahead(self, group: int) -> list[int]:
        """The groups that the ring should hold, from ``group`` on. Rendering starts over where a forward ends."""
        step = -1 if self._backward else 1
        window = range(group, group + step * len(self.ring.buffers), step)
        if self._differentiated or self._backward:
            return [each for each in window if 0 <= each < len(self.masters)]
        return [each % len(self.masters) for each in window]
