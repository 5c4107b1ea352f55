"""Which matrices can be multiplied together with their LoRA, and which are left to their own modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tuner_kernels.functions import Linears


@dataclass(frozen=True)
class Parts:
    """A frozen matrix, its bias, and its LoRA where it has one."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 1.0


def apply(modules: Sequence[nn.Module], rows: Tensor) -> list[Tensor]:
    """What each of ``modules`` makes of ``rows`` (B, S, I): together where that is the same, else one by one."""
    found = [parts_of(module, rows) for module in modules]
    if any(each is None for each in found):
        return [module(rows) for module in modules]
    parts = [each for each in found if each is not None]
    tensors = [tensor for each in parts for tensor in (each.weight, each.bias, each.down, each.up)]
    return list(Linears.apply(rows, [each.scale for each in parts], *tensors))


def parts_of(module: nn.Module, rows: Tensor) -> Parts | None:
    """The parts of a plain linear layer, or of PEFT's LoRA on one; None where it does anything else.

    Anything else: quantised, sharded or moved weights, hooks, a trained base, dropout, DoRA, several adapters.
    """
    from peft.tuners.lora import Linear as LoraLinear

    if type(module) is nn.Linear:
        return _plain(module, rows)
    if type(module) is not LoraLinear or not _is_bare(module):
        return None
    layer: Any = module
    base = layer.get_base_layer()
    found = _plain(base, rows) if type(base) is nn.Linear else None
    if found is None or layer.merged:
        return None
    return found if layer.disable_adapters else _with_lora(layer, found)


def _with_lora(layer: Any, base: Parts) -> Parts | None:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or layer.lora_variant or layer.fan_in_fan_out:
        return None
    [name] = names
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    quiet = isinstance(dropout, nn.Identity) or not dropout.training or dropout.p == 0
    if not quiet or down.bias is not None or up.bias is not None or not (_is_bare(down) and _is_bare(up)):
        return None
    return Parts(base.weight, base.bias, down.weight, up.weight, float(layer.scaling[name]))


def _plain(linear: nn.Linear, rows: Tensor) -> Parts | None:
    weight, bias = linear.weight, linear.bias
    kind = torch.get_autocast_dtype(rows.device.type) if torch.is_autocast_enabled(rows.device.type) else rows.dtype
    if not _is_bare(linear) or type(weight) not in (Tensor, nn.Parameter) or weight.requires_grad:
        return None
    if weight.dtype != kind or weight.device != rows.device or (bias is not None and bias.requires_grad):
        return None
    return Parts(weight, bias)


def _is_bare(module: nn.Module) -> bool:
    """Whether calling ``module`` is calling its class's forward, and nothing else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)
