"""The float32 average of one network's trained tensors, beside them or on the host.

diffusers' ``EMAModel`` keeps its averages in the dtype of the parameters: in bfloat16 an average with a decay near 1
does not move. It also steps on the caller's device alone. So its decay is used here, and its tensors are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

HOST = torch.device("cpu")


class Average:
    """An average where the parameters are; elementwise on what this process holds of them, never waiting for it."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Begin with the values that ``parameters`` have now."""
        self._parameters = dict(parameters)
        with torch.no_grad():
            self._tensors = {name: self._copied(each) for name, each in self._parameters.items()}

    def _copied(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().to(torch.float32, copy=True)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The averages by the names of the parameters, float32: themselves, no copies."""
        self.settle()
        return self._tensors

    @torch.no_grad()
    def follow(self, weight: float) -> None:
        """Move by ``weight`` (1 - decay) from the average towards the parameters."""
        move_towards(self._parts(self._tensors), self._parts(self._parameters), weight)

    def settle(self) -> None:
        """Wait until no update is under way."""

    def close(self) -> None:
        """Let go of what is beside the tensors."""

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """While entered, the parameters have the values of the averages; afterwards their own, bit for bit.

        float32 parameters swap places with their averages, one tensor at a time; others are put aside on the host.
        """
        self.settle()
        with ExitStack() as back:
            for parameter, average in zip(self._parts(self._parameters), self._parts(self._tensors), strict=True):
                _exchange(parameter, average, back)
            yield

    @staticmethod
    def _parts(tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """What this process holds of each: a view of its shard, where it is spread over processes."""
        with torch.no_grad():
            return [_local(each) for each in tensors.values()]


class HostAverage(Average):
    """An average in host memory, for parameters on a device.

    The values are copied behind the step's work into pinned memory, and a thread adds them while the next step runs:
    the step waits only where the update before has not ended yet.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        pinned = torch.cuda.is_available()
        self._stages = [torch.empty_like(each, device=HOST, pin_memory=pinned) for each in self._parts(parameters)]
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="ema")
        self._under_way: Future[None] | None = None

    def _copied(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().to(HOST, torch.float32, copy=True)

    @torch.no_grad()
    def follow(self, weight: float) -> None:
        """Move by ``weight`` towards the values that the parameters have when the work queued so far is done."""
        self.settle()
        values = self._parts(self._parameters)
        for stage, value in zip(self._stages, values, strict=True):
            stage.copy_(value, non_blocking=value.is_cuda)
        self._under_way = self._worker.submit(self._add, _recorded(values), weight)

    def _add(self, copied: Iterable[torch.cuda.Event], weight: float) -> None:
        for event in copied:
            event.synchronize()
        move_towards(self._parts(self._tensors), self._stages, weight)

    def settle(self) -> None:
        """Wait for the thread; raises what went wrong in it."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def close(self) -> None:
        """End the thread."""
        self._worker.shutdown()


def move_towards(averages: list[Tensor], values: list[Tensor], weight: float) -> None:
    """``average += weight * (value - average)`` in place, each float32; values of another dtype one at a time."""
    alike = all(value.dtype == average.dtype for average, value in zip(averages, values, strict=True))
    if alike:
        torch._foreach_lerp_(averages, values, weight)
        return
    for average, value in zip(averages, values, strict=True):
        average.lerp_(value.to(average), weight)


@torch.no_grad()
def _exchange(parameter: Tensor, average: Tensor, back: ExitStack) -> None:
    """Put ``average`` into ``parameter``; what undoes it is left to ``back``."""
    if parameter.dtype == average.dtype:
        _swap(parameter, average)
        back.callback(_swap, parameter, average)
    else:
        own = parameter.to(HOST, copy=True)
        back.callback(_put, parameter, own)
        parameter.copy_(average)


@torch.no_grad()
def _swap(first: Tensor, second: Tensor) -> None:
    held = first.to(second.device, copy=True)
    first.copy_(second)
    second.copy_(held)


@torch.no_grad()
def _put(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()


def _recorded(values: Sequence[Tensor]) -> list[torch.cuda.Event]:
    """An event on the current stream of each CUDA device, behind the copies of ``values`` that nobody waited for."""
    events = []
    for device in {value.device for value in values if value.is_cuda}:
        event = torch.cuda.Event(blocking=True)  # whoever waits sleeps, and leaves the core to the next step
        event.record(torch.cuda.current_stream(device))
        events.append(event)
    return events
