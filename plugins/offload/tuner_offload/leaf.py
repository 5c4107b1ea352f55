"""Streaming by the layer: each Linear's weights are on the device just while it computes, in forward and in backward.

The ring then holds two layers instead of two blocks: of Wan 14B in bf16 284 MB instead of 1.4 GB. The price is
half as much traffic again: a layer's backward needs its weights after those of the layers behind it have passed
through the ring, so they are copied for forward, for recomputation and for backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tuner.errors import ConfigError
from tuner.model import Network
from tuner_offload.masters import Master, Members, bind
from tuner_offload.ring import Ring


def leaves(network: Network, blocks: Sequence[int]) -> list[Members]:
    """Each frozen Linear layer of ``blocks``, by itself, in the order of the network; all of them before they are read.

    Raises ConfigError where there is none.
    """
    found: list[Members] = [
        [(block, layer)]
        for block in blocks
        for layer in network.stack.blocks[block].modules()
        if isinstance(layer, nn.Linear) and not any(_is_trained(each) for each in layer.parameters(recurse=False))
    ]
    if not found:
        raise ConfigError(
            f"the blocks of network {network.name!r} have no Linear layers that could stream",
            where="group_offload_type: leaf_level",
            remedy="use block_level",
        )
    return found


def _is_trained(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and not parameter.is_meta


class LeafStreaming:
    """Implements :class:`tuner.blocks.Residency`: what the driver says only serves to guess what comes next.

    The layers bring their weights themselves, whoever calls them. A guess that turns out wrong costs time, never
    correctness.

    Arguments
        masters: one for each layer, in the order of the network.
    """

    def __init__(self, masters: Sequence[Master], ring: Ring) -> None:
        self.masters = masters
        self.ring = ring
        self.streamed: Set[int] = {id(value) for master in masters for value in master.values}
        self._first = ring.add(masters)
        self._blocks = [master.entries[0].block for master in masters]
        self._last_entered = -1
        self._backward = False
        for index, master in enumerate(masters):
            _install(master.entries[0].owner, _Leaf(self, index, master))

    def begin(self, differentiated: bool) -> None:
        """A forward starts."""
        self._backward, self._last_entered = False, -1

    def enter(self, index: int) -> None:
        """Block ``index`` is about to compute; the same one again, or one before it, is recomputed for backward."""
        self._backward = self._backward or index <= self._last_entered
        self._last_entered = index

    def leave(self, index: int) -> None:
        """Its layers have released their weights already."""

    def backward_done(self, index: int) -> None:
        """Its layers have released their weights already."""

    def end(self, differentiated: bool) -> None:
        """Start to copy what the next forward begins with."""
        self._prefetch(0, keep=set())

    @contextmanager
    def weights(self, leaf: int, *, backward: bool) -> Iterator[None]:
        """While entered, layer ``leaf`` is bound to its weights on the device, and the next one's are on their way."""
        master = self.masters[leaf]
        if not self.ring.holds(self._first + leaf):
            self.ring.load(self._first + leaf, keep=())
        for entry, value in zip(master.entries, self.ring.values(self._first + leaf), strict=True):
            bind(entry, value)
        self._prefetch(self._next(leaf, backward=backward), keep={self._first + leaf})
        try:
            yield
        finally:
            for entry, value in zip(master.entries, master.values, strict=True):
                bind(entry, value)

    def _next(self, leaf: int, *, backward: bool) -> int | None:
        """The layer that comes after ``leaf``; None where that one is in the ring anyway."""
        block = self._blocks[leaf]
        if not backward:
            following = leaf + 1 if leaf + 1 < len(self._blocks) else None
            turns = following is None or (self._backward and self._blocks[following] != block)
            return None if turns else following
        if leaf and self._blocks[leaf - 1] == block:
            return leaf - 1
        return self._blocks.index(self._blocks[leaf - 1]) if leaf else 0

    def _prefetch(self, leaf: int | None, keep: set[int]) -> None:
        if leaf is not None and not self.ring.holds(self._first + leaf):
            self.ring.load(self._first + leaf, keep=keep)


class _Leaf:
    """One layer that streams."""

    def __init__(self, streaming: LeafStreaming, index: int, master: Master) -> None:
        self._streaming, self._index = streaming, index
        self.layer = master.entries[0].owner
        self.is_plain = type(self.layer) is nn.Linear and all(type(each) is nn.Parameter for each in master.values)
        """Whether the weights are a matrix and a bias; a quantised layer computes in a way of its own."""

    def compute(self, rows: Tensor) -> Tensor:
        """What the layer gives for ``rows`` (..., in): (..., out)."""
        with self._streaming.weights(self._index, backward=False):
            result: Tensor = type(self.layer).forward(self.layer, rows)
            return result

    def differentiate(self, gradient: Tensor, rows: Tensor | None, context: Any) -> Tensor:
        """The gradient of the inputs (..., in), from that of the outputs (..., out)."""
        with self._streaming.weights(self._index, backward=True):
            if rows is None:
                weight = self.layer._parameters["weight"]
                assert weight is not None
                with torch.autocast(gradient.device.type, enabled=False):
                    return (gradient @ weight.to(gradient.dtype)).to(context.dtype)
            enabled, dtype = context.autocast
            with torch.enable_grad(), torch.autocast(gradient.device.type, dtype=dtype, enabled=enabled):
                inputs = rows.detach().requires_grad_()
                (found,) = torch.autograd.grad(type(self.layer).forward(self.layer, inputs), inputs, gradient)
            return found


class _Streamed(torch.autograd.Function):
    """A layer whose weights autograd does not hold on to: they are brought again for backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, leaf: _Leaf) -> Tensor:
        kind = rows.device.type
        ctx.leaf, ctx.dtype = leaf, rows.dtype
        ctx.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        ctx.save_for_backward(*(() if leaf.is_plain else (rows,)))
        return leaf.compute(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.leaf.differentiate(gradient, next(iter(ctx.saved_tensors), None), ctx), None


def _install(layer: nn.Module, leaf: _Leaf) -> None:
    # Plain attributes of the instance, as the block driver's own: class, names and state dict stay.
    object.__setattr__(layer, "_tuner_leaf", leaf)
    object.__setattr__(layer, "forward", MethodType(_streamed_forward, layer))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _streamed_forward(self: nn.Module, rows: Tensor) -> Tensor:
    leaf: _Leaf = self._tuner_leaf  # type: ignore[assignment]
    if torch.is_grad_enabled() and rows.requires_grad:
        result: Tensor = _Streamed.apply(rows, leaf)
        return result
    return leaf.compute(rows)
