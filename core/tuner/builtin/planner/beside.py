"""The predicted peak of device memory beside the measured one, after the first step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tuner.builtin.planner.memory import CONTEXT, Memory, predict
from tuner.workload import Workload

if TYPE_CHECKING:
    import torch

OFF = 0.1
"""Relative difference from which on it is said where the prediction may be wrong."""
GIB = 2**30


class Beside:
    """The peak of one step, predicted, and counted by the device where it counts."""

    def __init__(self, device: torch.device, workloads: Sequence[Workload], *, first: bool) -> None:
        """Count from now on. That forgets the device's earlier peak, such as that of the encoders.

        Arguments
            workloads: of the step's micro-batches.
            first: whether the optimizer has no state yet.
        """
        import torch

        self.device = device
        self.predicted = max((predict(each, first=first) for each in workloads), key=lambda each: each.on_device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def measured(self) -> int | None:
        """Bytes of tensors at the peak, where the device counts them; it is not waited for."""
        import torch

        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def record(self, measured: int | None) -> dict[str, Any]:
        """What is kept of it: bytes by component as predicted, without CUDA's context, and the peak ``measured``."""
        parts = {name: round(size) for name, size in self.predicted.device.items() if name != "CUDA context" and size}
        return {"predicted": parts, "measured": measured, "device": self.device.type}

    def lines(self, measured: int | None) -> Iterator[str]:
        """What to say after the step."""
        return compared(self.predicted, measured, self.device.type)


def compared(predicted: Memory, measured: int | None, device: str) -> Iterator[str]:
    """One line with both peaks; where they differ much, another with the largest part of what was predicted.

    The context of CUDA is left out: the allocator counts tensors.
    """
    parts = {name: size for name, size in predicted.device.items() if name != "CUDA context"}
    expected = predicted.on_device - CONTEXT
    line = f"device memory of the first step: {expected / GIB:.2f} GiB predicted"
    if measured is None:
        yield f"{line}; not measured: {device} does not count what its tensors take"
        return
    difference = measured / expected - 1
    yield f"{line}, {measured / GIB:.2f} GiB measured ({difference:+.1%})"
    if abs(difference) > OFF:
        name, size = max(parts.items(), key=lambda part: part[1])
        yield (
            f"the prediction is off by more than {OFF:.0%}; its largest part is {name!r} with {size / GIB:.2f} GiB; "
            "what is not in it: docs/memory-model.md"
        )
