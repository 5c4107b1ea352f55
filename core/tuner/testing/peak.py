"""Counting what a training step would hold on a CUDA device, without one: the truth that the memory model is held to.

Tensors are torch's fakes: shapes, types and storages as in a real step, autograd and autocast included, and no memory,
so that networks of real dimensions are counted in seconds. They pass for CPU tensors. Where CUDA has another kernel,
its way of holding memory is put in the place of the CPU's: root-mean-square norms are one operation, in float32 under
autocast (torch's own list), and the backward of fused attention accumulates the queries' gradient in float32
(FlashAttention-2, arXiv:2307.08691).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from tuner.testing.live_bytes import LiveBytes


class StepBytes(LiveBytes):
    """While entered, counts what a step holds beside the parameters of ``module``.

    Bytes in ``uint8`` storages are taken for host memory, where offloaded block inputs wait, and not counted; neither
    are the tensors ``on_host``.
    """

    def __init__(self, module: nn.Module, on_host: Iterable[Tensor] = ()) -> None:
        super().__init__(self._on_device)
        # Held: the number of a storage that is freed is given to another.
        self._pools = [each.untyped_storage() for each in (*module.parameters(), *module.buffers(), *on_host)]
        self._elsewhere = {each._cdata for each in self._pools}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run the operation and count what it gave, and what its CUDA kernel works in."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if "scaled_dot_product" in func.name() and "backward" in func.name():
            queries = args[1]
            self.peak = max(self.peak, self.live + queries.numel() * torch.float32.itemsize)
        return result

    def _on_device(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        if tensor.dtype == torch.uint8 and storage._cdata not in self._elsewhere:
            self._elsewhere.add(storage._cdata)
            self._pools.append(storage)
        return storage._cdata not in self._elsewhere


def without_storage(module: nn.Module) -> nn.Module:
    """``module`` with fakes in the place of its parameters and buffers. Call it within :func:`fakes`."""
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                each._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return module


def step_bytes(module: nn.Module, loss: Callable[[], Tensor], mixed_precision: torch.dtype | None) -> int:
    """Most bytes that a forward and a backward hold beside the parameters: activations, gradients, autocast's copies.

    Arguments
        module: made by :func:`without_storage`.
        loss: makes the scalar loss from fakes of its own; called under autocast.
        mixed_precision: what autocast computes in; None is no autocast.
    """
    with kernels_of_cuda(), StepBytes(module) as held:
        with torch.autocast("cpu", mixed_precision, enabled=mixed_precision is not None):
            value = loss()
        torch.autograd.backward(value)
    peak: int = held.peak
    return peak


def inference_bytes(module: nn.Module, call: Callable[[], object], mixed_precision: torch.dtype | None) -> int:
    """Most bytes that ``call`` holds beside the parameters of ``module``, without gradients."""
    autocast = torch.autocast("cpu", mixed_precision, enabled=mixed_precision is not None)
    with kernels_of_cuda(), StepBytes(module) as held, torch.no_grad(), autocast:
        call()
    peak: int = held.peak
    return peak


def fakes() -> FakeTensorMode:
    """The mode in which tensors have no storage."""
    return FakeTensorMode()


@contextmanager
def kernels_of_cuda() -> Iterator[None]:
    """While entered, norms hold what CUDA's kernels hold."""
    with mock.patch.object(functional, "rms_norm", _rms_norm):
        yield


def _rms_norm(tokens: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Any:
    del shape, eps
    if torch.is_autocast_enabled("cpu"):
        tokens, weight = tokens.float(), None if weight is None else weight.float()
    return _FusedNorm.apply(tokens, weight)


class _FusedNorm(torch.autograd.Function):
    """``aten::_fused_rms_norm``: keeps its input and one number for each row. Computes nothing."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(tokens, weight, tokens.new_empty((*tokens.shape[:-1], 1)))
        return torch.empty_like(tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight, _ = ctx.saved_tensors
        return torch.empty_like(tokens), torch.empty_like(weight) if ctx.needs_input_grad[1] else None
