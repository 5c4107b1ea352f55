"""Tensors that are made of others, such as the moments of an 8-bit optimizer, as plain tensors and JSON and back."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tuner.errors import CheckpointError

MARK = "tensor subclass"


def taken_apart(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(plain tensors, what to put them together by), for ``tensors`` by name."""
    plain: dict[str, Tensor] = {}
    recipes: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if not is_traceable_wrapper_subclass(tensor):
            plain[name] = tensor
            continue
        parts, context = tensor.__tensor_flatten__()
        plain |= {f"{name}/{part}": getattr(tensor, part) for part in parts}
        cls = f"{type(tensor).__module__}:{type(tensor).__qualname__}"
        recipes[name] = {MARK: cls, "parts": parts, "context": [_written(each) for each in context]}
    return plain, recipes


def put_together(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Replace, in place, the parts and recipes of :func:`taken_apart` by the tensors that they were.

    Only classes of modules that are already imported are made: a file cannot have code run that the run would not.
    Raises CheckpointError for any other class.
    """
    for name in [name for name, value in numbers.items() if isinstance(value, dict) and MARK in value]:
        recipe = numbers.pop(name)
        module, _, qualname = recipe[MARK].partition(":")
        cls: Any = getattr(sys.modules.get(module), qualname, None)
        if not (isinstance(cls, type) and issubclass(cls, Tensor) and hasattr(cls, "__tensor_unflatten__")):
            raise CheckpointError(f"the optimizer state has tensors of class {recipe[MARK]}, which is unknown here")
        parts = {part: tensors.pop(f"{name}/{part}") for part in recipe["parts"]}
        tensors[name] = cls.__tensor_unflatten__(parts, [_read(each) for each in recipe["context"]], None, None)


def _written(value: Any) -> Any:
    return str(value) if isinstance(value, torch.dtype) else list(value) if isinstance(value, torch.Size) else value


def _read(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("torch."):
        return getattr(torch, value.removeprefix("torch."))
    return torch.Size(value) if isinstance(value, list) else value
