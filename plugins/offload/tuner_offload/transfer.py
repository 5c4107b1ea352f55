"""Copies between host and device: in line, or on CUDA streams beside the computation."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from tuner_offload.masters import Buffer
from tuner_offload.scattered import copy_into


class Copier(Protocol):
    """Starts copies and waits for them. The device's order of work, not the host's, is what it keeps."""

    def start(self, target: Tensor, source: Buffer) -> Any:
        """Begin ``target[:] = source`` once all work queued so far is done with ``target``; gives a ticket."""

    def wait(self, ticket: Any) -> None:
        """Make what is queued from now on come after the copy."""

    def collect(self, target: Tensor, source: Tensor, *, add: bool) -> None:
        """Begin to bring ``source``, a result of the work queued so far, to ``target`` on the host.

        ``add``: onto what ``target`` holds.
        """

    def finish(self) -> None:
        """Let the host wait until every copy is done."""


class InlineCopier:
    """Copies in the stream that computes (or, on the CPU, at once): order needs no care."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self, target: Tensor, source: Buffer) -> None:
        """Copy; from pinned memory the host does not wait."""
        copy_into(target, source)

    def wait(self, ticket: None) -> None:
        """Nothing to wait for."""

    @torch.no_grad()
    def collect(self, target: Tensor, source: Tensor, *, add: bool) -> None:
        """Copy; sums are made on the device, so that the host need not wait to make them."""
        target.copy_(_sum(target, source) if add else source, non_blocking=True)

    def finish(self) -> None:
        """Wait for the device."""
        _synchronise(self._device)


class StreamCopier:
    """Copies on private CUDA streams, one for each direction, ordered against the computing stream by events."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._back: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, target: Tensor, source: Buffer) -> torch.cuda.Event:
        """Copy after the kernels queued so far: the last readers of ``target`` are among them."""
        # Asked for anew each time: backward runs in a thread of its own, with its own current stream.
        self._stream.wait_stream(torch.cuda.current_stream(target.device))
        with torch.cuda.stream(self._stream):
            copy_into(target, source)
            event: torch.cuda.Event = self._stream.record_event()
        return event

    def wait(self, ticket: torch.cuda.Event) -> None:
        """Order the current stream after the copy; the host does not wait."""
        torch.cuda.current_stream(self._stream.device).wait_event(ticket)

    @torch.no_grad()
    def collect(self, target: Tensor, source: Tensor, *, add: bool) -> None:
        """Copy beside the computation that follows."""
        self._back.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(self._back):
            target.copy_(_sum(target, source) if add else source, non_blocking=True)
        # Its memory goes back to the allocator of the computing stream, which knows nothing of this reader.
        source.record_stream(self._back)

    def finish(self) -> None:
        """Wait for the device."""
        _synchronise(self._stream.device)


def copier_for(device: torch.device, use_stream: bool) -> Copier:
    """Private streams where there are some and they are wanted, else copies in line."""
    return StreamCopier(device) if use_stream and has_streams(device) else InlineCopier(device)


def has_streams(device: torch.device) -> bool:
    """Whether copies may run beside the computation: on CUDA. Not on ROCm, where ordering by events is unproven."""
    return device.type == "cuda" and torch.version.hip is None


def _sum(earlier: Tensor, gradient: Tensor) -> Tensor:
    return earlier.to(gradient.device, non_blocking=True) + gradient


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
