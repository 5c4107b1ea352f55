"""Which layers of a network are quantised, and the sink that does it while their weights are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tuner.model import Network

FULL_PRECISION = ("norm", "modulation")
"""Layers inside a block whose path has one of these stay as they are: small, and errors there are not."""


class LinearSink(ABC):
    """Takes the weights of the Linear layers under some roots and keeps them quantised.

    A subclass makes the layer that stands for a Linear, and fills it. Each weight is quantised as it arrives, so
    that no more than one tensor of the full-precision network is in memory.

    Arguments
        module: not yet materialised; its Linear layers under ``roots`` are replaced.
        device: where the quantised weights go; ``via``: where they are quantised.
        dtype: what the layers compute in and give back; the dtype of autocast, if there is any.
    """

    def __init__(
        self,
        module: nn.Module,
        roots: Iterable[nn.Module],
        *,
        device: torch.device,
        via: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.device, self.via, self.dtype = device, via, dtype
        names = {each: name for name, each in module.named_modules()}
        self.layers = {
            f"{names[root]}.{path}".lstrip("."): self._replaced(root, path)
            for root in roots
            for path in list(linear_paths(root))
        }
        """the layers that took the place of Linear ones, by their full name"""
        self.bytes_read = 0
        """bytes of the weights that were taken, as they were read"""

    @classmethod
    def of(cls, network: Network, *, device: torch.device, via: torch.device, dtype: torch.dtype) -> LinearSink:
        """The sink for the blocks of a denoiser."""
        return cls(network.module, network.stack.blocks, device=device, via=via, dtype=dtype)

    @abstractmethod
    def empty(self, plain: nn.Linear) -> nn.Linear:
        """The layer that stands for ``plain``, without storage."""

    @abstractmethod
    def fill(self, layer: nn.Linear, weight: Tensor) -> None:
        """Quantise ``weight`` (out, in), which lies where it is to be quantised, into ``layer``."""

    def take(self, module: nn.Module, name: str, tensor: Tensor) -> bool:
        """Quantise the weight of one of the layers; keep its bias as it is, on the device."""
        owner, _, leaf = name.rpartition(".")
        layer = self.layers.get(owner)
        if layer is None:
            return False
        if leaf == "weight":
            self.bytes_read += tensor.nbytes
            self.fill(layer, tensor.to(self.via))
        else:
            # A bias in another dtype than the product would decide the output's dtype, and backward would fail.
            kept = torch.empty(tensor.shape, dtype=self.dtype, device=self.device).copy_(tensor)
            layer._parameters[leaf] = nn.Parameter(kept, requires_grad=False)
        return True

    @property
    def bytes_stored(self) -> int:
        """Bytes that the weights have now."""
        return sum(
            stored_bytes(parameter)
            for layer in self.layers.values()
            for name, parameter in layer._parameters.items()
            if parameter is not None and name != "bias"
        )

    def _replaced(self, root: nn.Module, path: str) -> nn.Linear:
        plain = root.get_submodule(path)
        assert isinstance(plain, nn.Linear)
        layer = self.empty(plain).train(plain.training)
        root.set_submodule(path, layer)
        return layer


def linear_paths(root: nn.Module) -> Iterator[str]:
    """Paths in ``root`` of the Linear layers that are quantised."""
    for path, module in root.named_modules():
        if type(module) is nn.Linear and not any(word in path for word in FULL_PRECISION):
            yield path


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor as it is stored, through tensor subclasses that are made of others."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(stored_bytes(getattr(tensor, name)) for name in names)
