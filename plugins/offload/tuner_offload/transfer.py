"""Copying a group into a buffer of the ring: at once, or on a CUDA stream beside the computation."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Copier(Protocol):
    """Starts copies and waits for them. The device's order of work, not the host's, is what it keeps."""

    def start(self, target: Tensor, source: Tensor) -> Any:
        """Begin ``target[:] = source`` once all work queued so far is done with ``target``; gives a ticket."""

    def wait(self, ticket: Any) -> None:
        """Make what is queued from now on come after the copy."""


class InlineCopier:
    """Copies in the stream that computes (or, on the CPU, at once): order needs no care."""

    @torch.no_grad()
    def start(self, target: Tensor, source: Tensor) -> None:
        """Copy; from pinned memory the host does not wait."""
        target.copy_(source, non_blocking=True)

    def wait(self, ticket: None) -> None:
        """Nothing to wait for."""


class StreamCopier:
    """Copies on a private CUDA stream, ordered against the computing stream by events."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def start(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        """Copy after the kernels queued so far: the last readers of ``target`` are among them."""
        # Asked for anew each time: backward runs in a thread of its own, with its own current stream.
        self._stream.wait_stream(torch.cuda.current_stream(target.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            event: torch.cuda.Event = self._stream.record_event()
        return event

    def wait(self, ticket: torch.cuda.Event) -> None:
        """Order the current stream after the copy; the host does not wait."""
        torch.cuda.current_stream(self._stream.device).wait_event(ticket)
