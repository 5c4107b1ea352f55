"""Copies from memory that is not pinned, such as a mapped file: through two pinned buffers, by a thread."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from tuner_offload.host import host_buffer
from tuner_offload.masters import Buffer
from tuner_offload.scattered import copy_into
from tuner_offload.transfer import Copier, InlineCopier, StreamCopier, has_streams

STAGES = 2
"""Pinned buffers: one is filled while the other is copied to the device."""


class StagedCopier(StreamCopier):
    """Fills a pinned buffer in a thread of its own, which may have to read a disk, and copies that on a stream."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="offload")
        self._stages: list[Tensor] = [torch.empty(0, dtype=torch.uint8) for _ in range(STAGES)]
        self._copied: list[torch.cuda.Event | None] = [None] * STAGES
        self._started = 0

    def start(self, target: Tensor, source: Buffer) -> Future[torch.cuda.Event]:  # type: ignore[override]
        """Copy after the kernels queued so far: the last readers of ``target`` are among them."""
        read: torch.cuda.Event = torch.cuda.current_stream(target.device).record_event()
        return self._worker.submit(self._copy, target, source, read)

    def wait(self, ticket: Future[torch.cuda.Event]) -> None:  # type: ignore[override]
        """Let the host wait until the copy is queued, and order the current stream after it."""
        super().wait(ticket.result())

    def finish(self) -> None:
        """Wait for the thread and for the device."""
        self._worker.submit(lambda: None).result()
        super().finish()

    @torch.no_grad()
    def _copy(self, target: Tensor, source: Buffer, read: torch.cuda.Event) -> torch.cuda.Event:
        slot = self._started % STAGES
        self._started += 1
        copied = self._copied[slot]
        if copied is not None:
            copied.synchronize()
        if self._stages[slot].nbytes < target.nbytes:
            self._stages[slot] = host_buffer(target.nbytes, pinned=True)
        stage = self._stages[slot][: target.nbytes]
        copy_into(stage, source)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(read)
            target.copy_(stage, non_blocking=True)
            event: torch.cuda.Event = self._stream.record_event()
        self._copied[slot] = event
        return event


def staged_copier(device: torch.device, use_stream: bool) -> Copier:
    """Staged copies where there are streams and they are wanted; else in line, straight from where the source is."""
    return StagedCopier(device) if use_stream and has_streams(device) else InlineCopier(device)
