"""How a weight is taken apart into plain tensors, and put together again on other memory.

A streamed weight lies in a flat buffer, and so do the tensors that a quantised one is made of: its data, its
scales. A quantisation library needs one function here; none where what it stores are plain parameters or buffers, nor
where its tensors say themselves what they are made of (``__tensor_flatten__``, as those of quanto and torchao do).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Build = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Parts:
    """A tensor as plain ones."""

    tensors: tuple[Tensor, ...]
    build: Build
    """Makes the tensor of others of the same shapes and dtypes, by reference; holds on to none of ``tensors``."""


def take_apart(tensor: Tensor) -> Parts | None:
    """``tensor`` as plain tensors; None where no backend knows its class."""
    found = (backend(tensor) for backend in BACKENDS)
    return next((parts for parts in found if parts is not None), None)


def _plain(tensor: Tensor) -> Parts | None:
    if type(tensor) not in (Tensor, nn.Parameter):
        return None
    return Parts((tensor.detach(),), lambda tensors: tensors[0])


def _wrapper(tensor: Tensor) -> Parts | None:
    """Subclasses that follow torch's own protocol; what they are made of may be such a subclass again."""
    if not is_traceable_wrapper_subclass(tensor):
        return None
    names, context = tensor.__tensor_flatten__()
    inner = [take_apart(getattr(tensor, name)) for name in names]
    if any(parts is None for parts in inner):
        return None
    known = [parts for parts in inner if parts is not None]
    kind, size, stride = type(tensor), tensor.size(), tensor.stride()
    shape = [(name, len(parts.tensors), parts.build) for name, parts in zip(names, known, strict=True)]

    def build(tensors: Sequence[Tensor]) -> Tensor:
        rest = iter(tensors)
        made = {name: make([next(rest) for _ in range(count)]) for name, count, make in shape}
        return kind.__tensor_unflatten__(made, context, size, stride)  # type: ignore[attr-defined,no-any-return]

    return Parts(tuple(each for parts in known for each in parts.tensors), build)


BACKENDS: tuple[Callable[[Tensor], Parts | None], ...] = (_plain, _wrapper)
"""One function for each kind of tensor: it answers None for those of others."""
