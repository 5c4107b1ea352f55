"""DeepSpeed-Ulysses (arXiv:2309.14509): tokens are divided among processes, for attention the heads are.

The blocks run over a part of the tokens. Self-attention exchanges parts of the tokens with all heads for all tokens
with some heads, and back. Every exchange is an all-to-all of torch, whose gradient is the exchange the other way; so
the gradients of a group's processes, each of a share of the loss, add up to those of one process.

diffusers' own Ulysses takes some kernels only, and no number of tokens that the processes do not divide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from tuner.attention_switch import register, set_backend
from tuner.blocks import Stream
from tuner.model import Network

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from tuner.run import Run


def group_of(run: Run) -> ProcessGroup:
    """The group of neighbouring processes that this one shares its samples with. Every process must call it."""
    from torch.distributed.device_mesh import init_device_mesh

    shape = (run.replica_count, run.sharing)
    mesh = init_device_mesh(run.device.type, shape, mesh_dim_names=("replica", "sequence"))
    return mesh["sequence"].get_group()


def has_place(network: Network) -> bool:
    """Whether the attentions of ``network`` tell the dispatcher which of them are between its own tokens."""
    processors = list(network.attention_processors())
    return bool(processors) and all(hasattr(each, "_parallel_config") for each in processors)


def attach(network: Network, group: ProcessGroup) -> None:
    """Divide the tokens of ``network`` among the processes of ``group``."""
    network.sequence = sequence = Ulysses(group)
    for processor in network.attention_processors():
        processor._parallel_config = sequence  # diffusers hands it on in self-attention only
    set_backend(network, None)


class Ulysses:
    """The tokens of this process, and what it exchanges with the others of its group."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group, self._index, self._count = group, group.rank(), group.size()
        # Of the forward under way, and of its backward: both end before there is a forward of another size.
        self._sizes: list[int] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Ulysses:
        """The copy of a network is divided among the same processes."""
        return self

    def split(self, stream: Stream) -> Stream:
        """This process's part of tokens and companions, in the order of the tokens."""
        tokens = stream.tokens.shape[1]
        self._sizes = [(tokens + rank) // self._count for rank in range(self._count)]
        start, size = sum(self._sizes[: self._index]), self._sizes[self._index]
        return replace(
            stream,
            tokens=stream.tokens.narrow(1, start, size),
            per_token={
                name: (tensor.narrow(axis, start, size), axis) for name, (tensor, axis) in stream.per_token.items()
            },
            forced=None if stream.forced is None else stream.forced.narrow(1, start, size),
        )

    def gather(self, tokens: Tensor) -> Tensor:
        """All tokens (B, S, D) of the part (B, s, D): each process sends its own to all."""
        rows = tokens.transpose(0, 1).expand(self._count, -1, -1, -1).flatten(0, 1)
        return self._exchanged(rows, [tokens.shape[1]] * self._count, self._sizes).transpose(0, 1)

    def kernel(self, name: Any) -> Any:
        """The dispatcher's name of its kernel ``name`` (None is its default) with the exchange around it."""
        return exchanging(name)

    def attend(self, attention: Callable[..., Tensor], *parts: Tensor) -> Tensor:
        """``attention`` of query, key and value (B, s, heads, head_dim) of this process, over all tokens."""
        local, heads = self._sizes[self._index], parts[0].shape[2]
        rows = [
            part.unflatten(2, (self._count, heads // self._count)).permute(2, 1, 0, 3, 4).flatten(0, 1)
            for part in parts
        ]
        there = self._exchanged(torch.stack(rows, 1), [local] * self._count, self._sizes)  # (S, 3, B, own heads, E)
        attended = attention(*(each.transpose(0, 1).contiguous() for each in there.unbind(1)))
        back = self._exchanged(attended.transpose(0, 1), self._sizes, [local] * self._count)
        gathered: Tensor = back.unflatten(0, (self._count, local)).permute(2, 1, 0, 3, 4).flatten(2, 3)
        return gathered

    def _exchanged(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Rows by the process that they are for, as rows by the process that they are from."""
        flat = rows.flatten(1).contiguous()
        taken = all_to_all_single_autograd(flat, received, sent, self._group)
        return taken.reshape(-1, *rows.shape[1:])


@cache
def exchanging(inner: Any) -> Any:
    """A kernel of the dispatcher that runs ``inner``, with the exchange around it in self-attention."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    inner = inner or AttentionBackendName.NATIVE

    def run(query: Tensor, key: Tensor, value: Tensor, _parallel_config: Ulysses | None = None, **more: Any) -> Tensor:
        attention: Callable[..., Tensor] = partial(dispatch_attention_fn, backend=inner, **more)
        if _parallel_config is None:
            return attention(query, key, value)
        if more.get("attn_mask") is not None:
            raise ValueError("self-attention with a mask is not divided among processes")
        return _parallel_config.attend(attention, query, key, value)

    arguments = ("attn_mask", "dropout_p", "is_causal", "scale", "_parallel_config")
    return register(f"exchanging.{inner.value}", run, arguments)
