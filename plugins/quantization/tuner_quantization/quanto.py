"""8-bit weights by optimum-quanto, made tensor by tensor while a network is read.

quanto's own ``quantize`` and ``freeze`` need the whole network in full precision first. Here the Linear
layers are replaced while they have no storage yet, and each weight is quantised as it arrives.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from optimum.quanto import AbsmaxOptimizer, QLinear, WeightQBytesTensor, qtype, qtypes
from torch import Tensor, nn

from tuner.model import Network

FULL_PRECISION = ("norm", "modulation")
"""Layers inside a block whose path has one of these stay as they are: small, and errors there are not."""


class QuantoSink:
    """Takes the weights of the blocks' Linear layers and keeps them in 8 bits, one scale per output channel.

    Arguments
        network: not yet materialised; its blocks' ``nn.Linear`` become quanto's ``QLinear`` (still an ``nn.Linear``).
        qtype_name: quanto's name of the storage type, ``qint8`` or ``qfloat8_e4m3fn``.
        device: where the quantised weights go.
        dtype: what the layers compute in and give back; the dtype of autocast, if there is any.
    """

    def __init__(self, network: Network, qtype_name: str, *, device: torch.device, dtype: torch.dtype) -> None:
        self._qtype: qtype = qtypes[qtype_name]
        self._device, self._dtype = device, dtype
        names = {module: name for name, module in network.module.named_modules()}
        self._layers = {
            f"{names[block]}.{path}": _replace(block, path, self._qtype)
            for block in network.stack.blocks
            for path in list(_linear_paths(block))
        }

    def take(self, module: nn.Module, name: str, tensor: Tensor) -> bool:
        """Quantise a weight ``tensor`` (out, in) where it is, and keep only the result, on the device."""
        owner, _, leaf = name.rpartition(".")
        layer = self._layers.get(owner)
        if layer is None:
            return False
        if leaf == "weight":
            kept: Tensor = quantise(tensor, self._qtype, device=self._device, dtype=self._dtype)
        else:
            # A bias in another dtype than the product would decide the output's dtype, and backward would fail.
            kept = torch.empty(tensor.shape, dtype=self._dtype, device=self._device).copy_(tensor)
        layer._parameters[leaf] = nn.Parameter(kept, requires_grad=False)
        return True


def quantise(weight: Tensor, kind: qtype, *, device: torch.device, dtype: torch.dtype) -> WeightQBytesTensor:
    """``weight`` (out, in) in 8 bits with a scale (out, 1) in ``dtype`` for each output channel.

    The scale is rounded to ``dtype`` before the weight is divided by it, so that its rounding adds no
    error of its own. The plain tensor class is used on purpose: the optimised fp8 one compiles a CUDA
    extension at the first forward.
    """
    full = weight.float()
    axis = 0 if full.shape[0] > 1 else None
    scale = AbsmaxOptimizer()(full, kind, axis)
    # A channel of zeros would divide by zero, and 0/0 is NaN in fp8.
    scale = scale.clamp_min(torch.finfo(dtype).tiny).to(dtype)
    data = torch.ops.quanto.quantize_symmetric(full, dtype=kind.dtype, axis=axis, scale=scale)
    return WeightQBytesTensor(
        kind, axis, full.size(), full.stride(), data.to(device), scale.to(device), activation_qtype=None
    )


def _linear_paths(block: nn.Module) -> Iterator[str]:
    for path, module in block.named_modules():
        if type(module) is nn.Linear and not any(word in path for word in FULL_PRECISION):
            yield path


def _replace(block: nn.Module, path: str, kind: qtype) -> QLinear:
    """Put a QLinear without storage in the place of the Linear at ``path``."""
    layer: QLinear = QLinear.from_module(block.get_submodule(path), weights=kind)
    # Only quantised activations use these two, but on the meta device they could not be moved.
    layer.input_scale, layer.output_scale = torch.ones(()), torch.ones(())
    layer.train(block.training)
    block.set_submodule(path, layer)
    return layer
