"""Offloaded checkpointing: block inputs wait for backward in host memory.

One input a block is a fortieth of what a block saves, so that its copies hide behind the computation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tuner.checkpointing import Checkpointing

ALIGNMENT = 256
SLAB = 8
"""Fewer buffers than this are cut from one piece of pinned memory."""


class Offload(Checkpointing):
    """Keeps block inputs in host memory, and brings each back while the block behind it computes its backward.

    On CUDA the copies run on a stream of their own; elsewhere at once. The last input of a forward stays on the device
    until backward begins with it or another forward begins: the turn waits for nothing.
    """

    def __init__(self, device: torch.device, interval: int = 1) -> None:
        super().__init__(interval)
        self.device = device
        self.pool = HostPool(pinned=device.type == "cuda")
        self.copied_out = self.copied_back = 0
        """Block inputs copied to the host, and back to the device, so far."""
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._latest: ReferenceType[HostInput] | None = None

    def run(self, block: Callable[[Tensor], Any], tokens: Tensor) -> Any:
        """``block(tokens)``, checkpointed. Only the input goes to the host: inside the block torch's hooks hold."""
        with saved_tensors_hooks(self._pack, HostInput.take):
            return super().run(block, tokens)

    def _pack(self, tokens: Tensor) -> HostInput:
        before = self._latest
        if before is not None and (last := before()) is not None:
            last.let_go()
        packed = HostInput(self, self.pool.take(tokens.nbytes), tokens.detach(), before)
        self._latest = ref(packed)
        return packed

    @torch.no_grad()
    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Start ``target[:] = source``, after the work queued so far; gives what :meth:`wait` takes."""
        if self._stream is None:
            target.copy_(source)
            return None
        # Asked for anew each time: backward runs in a thread of its own, with its own current stream.
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, event: Any) -> None:
        """Order the work queued from now on after a copy; the host does not wait."""
        if event is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(event)


class HostInput:
    """A block's input in host memory: what autograd holds in its place. Its buffer is free again when this dies.

    The copy on the device, while there is one, is let go of only once its queue waits for the transfer that reads or
    writes it: the allocator cannot hand its memory out too early.
    """

    def __init__(
        self, offload: Offload, buffer: Tensor, tokens: Tensor, before: ReferenceType[HostInput] | None
    ) -> None:
        self._offload, self._buffer, self._before = offload, buffer, before
        self._host = buffer[: tokens.nbytes].view(tokens.dtype).view(tokens.shape)
        self._device: Tensor | None = tokens
        self._event = offload.copy(self._host, tokens)
        offload.copied_out += 1

    def let_go(self) -> None:
        """Leave it on the host alone."""
        if self._device is not None:
            self._offload.wait(self._event)
            self._device = None

    def fetch(self) -> Tensor:
        """Start to bring it back, unless it is on the device or on its way there."""
        if self._device is None:
            self._device = torch.empty_like(self._host, device=self._offload.device)
            self._event = self._offload.copy(self._device, self._host)
            self._offload.copied_back += 1
        return self._device

    def take(self) -> Tensor:
        """It, on the device: its block's backward starts. The input of the block before it is sent for."""
        tokens = self.fetch()
        self.let_go()
        if self._before is not None and (before := self._before()) is not None:
            before.fetch()
        return tokens

    def __del__(self) -> None:
        self.let_go()
        self._offload.pool.give(self._buffer)


class HostPool:
    """Buffers in host memory, pinned where a GPU copies them. Each is used again, from step to step.

    There are as many as were ever used at once: one that is too small makes room for the one that replaces it.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self.free: list[Tensor] = []
        """Those that nobody uses, (N,) uint8."""

    def take(self, nbytes: int) -> Tensor:
        """The smallest free buffer of at least ``nbytes``, or a new one."""
        sizes = [each.nbytes for each in self.free]
        fitting = [index for index, size in enumerate(sizes) if size >= nbytes]
        if fitting:
            return self.free.pop(min(fitting, key=sizes.__getitem__))
        if sizes:
            self.free.pop(sizes.index(max(sizes)))
        buffer, *spare = self._cut(-(-nbytes // ALIGNMENT) * ALIGNMENT)
        self.free += spare
        return buffer

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back. Copies of it may still be queued: those to come are queued behind them."""
        # Called by garbage collection too, in the midst of anything: the places of the others must not change.
        self.free.append(buffer)

    def _cut(self, nbytes: int) -> list[Tensor]:
        # Torch rounds pinned memory up to a power of two: several buffers in one piece waste less of it.
        count = max(range(1, SLAB), key=lambda n: n * nbytes / (1 << (n * nbytes - 1).bit_length()))
        pieces = count if self._pinned else 1
        return list(torch.empty(pieces * nbytes, dtype=torch.uint8, pin_memory=self._pinned).split(nbytes))
