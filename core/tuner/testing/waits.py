"""Counting where the host waits for a device, without one.

What was made on the device, or of anything that was, is marked; reading a marked tensor is a wait. On the CPU every
tensor is on the host, so a ``torch.device`` stands for the device, as the engine passes it, and the name ``"cpu"`` for
the host.
"""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READING = frozenset(
    {
        *("_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "masked_select"),
        *("_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount"),
    }
)
"""Operators whose result, or its shape, the host has to know."""
COPIED = frozenset({"tolist", "numpy", "cpu", "__array__"})
"""Methods that read memory without an operator."""
OWN = ("/torch/", "/tuner/testing/waits.py", "/contextlib.py")


class HostWaits:
    """While entered, lists every place where the host of a GPU would wait for it: ``waits``, as "file:line function".

    A wait is a read of a tensor of the device, and a copy to it that is not told to be ``non_blocking``. It sees this
    thread alone, and with it the backward of tensors on the CPU.

    Arguments
        there: tensors that are on the device when it is entered, such as a network's parameters.
    """

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        self.waits: list[str] = []
        self._marked: set[int] = set()
        self._stack = ExitStack()
        for each in there:
            self.mark(each)

    @classmethod
    def of(cls, *modules: nn.Module) -> HostWaits:
        """One for which all parameters and buffers of ``modules`` are on the device."""
        return cls(each for module in modules for each in (*module.parameters(), *module.buffers()))

    def __enter__(self) -> HostWaits:
        self._stack.enter_context(_Calls(self))
        self._stack.enter_context(_Operators(self))
        return self

    def __exit__(self, *given: object) -> None:
        self._stack.close()

    def mark(self, tensor: Tensor) -> None:
        """From now on ``tensor``'s memory is the device's, until it is freed."""
        for storage in _storages(tensor):
            if storage._cdata not in self._marked:
                self._marked.add(storage._cdata)
                weakref.finalize(storage, self._marked.discard, storage._cdata)

    def is_there(self, value: object) -> bool:
        """Whether ``value`` is a tensor of the device."""
        return isinstance(value, Tensor) and any(each._cdata in self._marked for each in _storages(value))

    def note(self) -> None:
        """The host waits here."""
        frames = [each for each in traceback.extract_stack() if not any(own in each.filename for own in OWN)]
        self.waits.append(f"{frames[-1].filename}:{frames[-1].lineno} {frames[-1].name}")


def _storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The memory of ``tensor``, or of the tensors that it wraps."""
    if hasattr(tensor, "__tensor_flatten__"):
        return [storage for name in tensor.__tensor_flatten__()[0] for storage in _storages(getattr(tensor, name))]
    return [tensor.untyped_storage()]


class _Operators(TorchDispatchMode):
    """Passes the mark on, and sees operators that read."""

    def __init__(self, found: HostWaits) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found, given = self._found, (args, kwargs or {})
        there = any(map(found.is_there, tree_leaves(given)))
        if there and self._reads(function, args):
            found.note()
        result = function(*args, **given[1])
        if there:
            written = [each for each, fact in zip(args, function._schema.arguments, strict=False) if _written(fact)]
            for each in tree_leaves((result, written)):
                if isinstance(each, Tensor):
                    found.mark(each)
        return result

    def _reads(self, function: Any, args: tuple[Any, ...]) -> bool:
        name = function.overloadpacket.__name__
        if name in ("index", "index_put", "index_put_"):  # by a mask: how many places that is has to be read
            return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
        if name == "copy_":
            return self._found.is_there(args[1]) and not self._found.is_there(args[0]) and not any(args[2:])
        return name in READING


def _written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


class _Calls(TorchFunctionMode):
    """Sees copies from and to the device, and tensors that are made there."""

    def __init__(self, found: HostWaits) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found, named = self._found, kwargs or {}
        name = getattr(function, "__name__", "")
        here = any(map(found.is_there, tree_leaves((args, named))))
        if here and (name in COPIED or (name == "to" and "cpu" in args[1:])):
            found.note()
        elif not here and name == "to" and _device_of(args[1:], named) is not None:
            if not named.get("non_blocking"):
                found.note()
            # To another device would be a copy; to this one it is not.
            result = function(*args, **named).clone()
            found.mark(result)
            return result
        result = function(*args, **named)
        if not here and isinstance(result, Tensor) and isinstance(named.get("device"), torch.device):
            if name in ("tensor", "as_tensor"):
                found.note()  # its values come from the host's own memory
            found.mark(result)
        return result


def _device_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
    """The device that ``Tensor.to`` was given: a ``torch.device``, or that of another tensor."""
    given = [*args, *kwargs.values()]
    return next((each for each in given if isinstance(each, torch.device | Tensor)), None)
