"""Where the weights of a group of blocks live: one flat buffer in host memory.

One buffer a group means one copy a group. Each tensor in it begins at a 256-byte boundary, so that a view
in any dtype is legal, copies are coalesced, and (on the CPU) kernels see the alignment that they see
without offload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tuner.errors import ConfigError
from tuner.model import Network
from tuner_offload.parts import Build, take_apart

ALIGNMENT = 256


Members = Sequence[tuple[int, nn.Module]]
"""What moves together: modules, each with the index of its block."""


class Buffer(Protocol):
    """Host memory (N,) uint8: a tensor, or what gives the parts of one that lies in several places."""

    @property
    def nbytes(self) -> int:
        """N."""

    def __getitem__(self, place: Any, /) -> Tensor:
        """The bytes at ``place``, by reference."""


@dataclass(frozen=True)
class Piece:
    """One plain tensor in a group's buffer."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, without padding."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def view(self, buffer: Buffer) -> Tensor:
        """The tensor in ``buffer``."""
        flat = buffer[self.offset : self.offset + self.nbytes].view(self.dtype)
        return flat.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Entry:
    """One parameter or buffer of a block: whose it is, and the pieces it is made of."""

    name: str
    """full name in the network"""
    block: int
    owner: nn.Module
    leaf: str
    """its name in ``owner``"""
    is_buffer: bool
    pieces: tuple[Piece, ...]
    build: Build

    def value(self, buffer: Buffer) -> Tensor:
        """The tensor in ``buffer``; a parameter is a frozen leaf."""
        made = self.build([piece.view(buffer) for piece in self.pieces])
        if self.is_buffer or isinstance(made, nn.Parameter):
            return made
        return nn.Parameter(made, requires_grad=False)

    @property
    def bound(self) -> Tensor | None:
        """What the owner computes with at the moment."""
        return (self.owner._buffers if self.is_buffer else self.owner._parameters).get(self.leaf)


@dataclass(frozen=True)
class Plan:
    """What a group's buffer is to hold."""

    entries: tuple[Entry, ...]
    tensors: tuple[Tensor, ...]
    """The plain tensors of all entries' pieces, in order."""

    @property
    def pieces(self) -> Iterator[tuple[str, Piece, Tensor]]:
        """(name, where it goes, what it is) of every plain tensor; the name tells the pieces of an entry apart."""
        rest = iter(self.tensors)
        for entry in self.entries:
            for number, piece in enumerate(entry.pieces):
                yield f"{entry.name}.{number}" if len(entry.pieces) > 1 else entry.name, piece, next(rest)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return max((_aligned(each.offset + each.nbytes) for entry in self.entries for each in entry.pieces), default=0)


Store = Callable[[Plan], Buffer]
"""Puts what a plan names somewhere in host memory: gives a buffer that holds it."""


class Master:
    """One group's weights on the host, and the tensors that are bound while it is not on the device."""

    def __init__(self, entries: Sequence[Entry], buffer: Buffer) -> None:
        self.entries = tuple(entries)
        self.buffer = buffer
        self.values = tuple(entry.value(buffer) for entry in entries)

    @property
    def nbytes(self) -> int:
        """Bytes that are copied for this group."""
        return self.buffer.nbytes

    @property
    def trained(self) -> bool:
        """Whether any of it gets a gradient."""
        return any(value.requires_grad for value in self.values)


def bind(entry: Entry, value: Tensor) -> None:
    """Make ``value`` the one that the entry's owner computes with: by reference, nothing is copied."""
    # Past nn.Module.__setattr__: this runs for every tensor of every block of every step.
    if entry.is_buffer:
        entry.owner._buffers[entry.leaf] = value
    else:
        entry.owner._parameters[entry.leaf] = value  # type: ignore[assignment]


def make_master(network: Network, members: Members, store: Store) -> Master:
    """The master of ``members``: their frozen parameters and their buffers, which are then bound to it.

    Buffers that fit into the padding of one tensor stay on the device. Raises ConfigError for weights of a class
    that cannot be taken apart.
    """
    plan = _plan(network, members)
    master = Master(plan.entries, store(plan))
    for entry, value in zip(master.entries, master.values, strict=True):
        bind(entry, value)
    return master


def _plan(network: Network, members: Members) -> Plan:
    names = {module: name for name, module in network.module.named_modules()}
    entries: list[Entry] = []
    tensors: list[Tensor] = []
    offset = 0
    for block, module in members:
        for owner, leaf, tensor, is_buffer in _streamed(module):
            name = f"{names[owner]}.{leaf}"
            parts = take_apart(tensor)
            if parts is None:
                raise ConfigError(
                    f"group offload does not know how to stream weights of class {type(tensor).__name__}",
                    where=f"{name} of network {network.name!r}",
                    remedy="leave enable_group_offload out, or choose another base_model_precision",
                )
            pieces = []
            for each in parts.tensors:
                # Dense strides stay as they are: some kernels want their weights column by column.
                stride = torch.empty_like(each, device="meta").stride()
                pieces.append(Piece(offset, tuple(each.shape), stride, each.dtype))
                offset = _aligned(offset + pieces[-1].nbytes)
            entries.append(Entry(name, block, owner, leaf, is_buffer, tuple(pieces), parts.build))
            tensors += parts.tensors
    return Plan(tuple(entries), tuple(tensors))


def _streamed(member: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor, bool]]:
    """(owner, name in it, tensor, whether it is a buffer) of all that streams of a module."""
    for owner in member.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                yield owner, leaf, parameter, False
        for leaf, buffer in owner._buffers.items():
            if buffer is not None and buffer.nbytes > ALIGNMENT:
                yield owner, leaf, buffer, True


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
