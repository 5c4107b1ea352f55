"""Attaching PEFT's LoRA layers to a network, whatever the network is.

Adapters are float32 whatever the base is stored in, live on the training device wherever the base
lives, and are initialised on the CPU: their start depends on neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tuner.builtin.adapter_state import copy_into
from tuner.errors import ConfigError, nearest
from tuner.model import Adapter, Network, ParameterGroup

if TYPE_CHECKING:
    from tuner.builtin.lora import LoraConfig

ADAPTER = "default"
"""PEFT's name for the adapter; it does not appear in any file."""
MATRICES = ("lora_A", "lora_B")
ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
SHOWN = 12
"""How many module suffixes an error lists."""


@dataclass(frozen=True)
class LoraSettings:
    """What decides the shape and start of a LoRA."""

    rank: int
    alpha: float
    dropout: float
    initialisation: str
    targets: tuple[str, ...]

    @classmethod
    def of(cls, config: LoraConfig, alpha: float, targets: tuple[str, ...]) -> LoraSettings:
        """The settings that the plugin's keys give."""
        return cls(config.lora_rank, alpha, config.lora_dropout, config.lora_init_type, targets)

    def peft(self) -> PeftLoraConfig:
        """The same as PEFT's own config."""
        return PeftLoraConfig(
            r=self.rank,
            # An integer where it is one: PEFT declares it so, and file metadata then reads as people expect.
            lora_alpha=int(self.alpha) if self.alpha.is_integer() else self.alpha,
            lora_dropout=self.dropout,
            init_lora_weights=True if self.initialisation == "default" else self.initialisation,
            target_modules=list(self.targets),
        )


def check_targets(network: Network, targets: Sequence[str]) -> None:
    """Raise ConfigError unless every target names a module that LoRA can adapt (PEFT's rule: the name or its end)."""
    modules = dict(network.module.named_modules())
    adaptable = [name for name, module in modules.items() if isinstance(module, ADAPTABLE)]
    suffixes = sorted({suffix for name in adaptable for suffix in _suffixes(name)})
    for target in targets:
        if any(_matches(name, target) for name in adaptable):
            continue
        found = [type(module).__name__ for name, module in modules.items() if _matches(name, target)]
        problem = f"matches only {found[0]} modules, which have no weight to adapt" if found else "matches no module"
        raise ConfigError(
            f"LoRA target {target!r} {problem} of network {network.name!r}",
            where="lora_target_modules",
            allowed=", ".join(suffixes[:SHOWN]) + (f" … ({len(suffixes)} in all)" if len(suffixes) > SHOWN else ""),
            nearest=nearest(target, suffixes),
            remedy="name the ends of module names, or leave the key out for the model's own choice",
        )


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _suffixes(name: str) -> Iterator[str]:
    """The shortest ends of a module name that do not begin with a number: ``to_q``, ``to_out.0``, ``net.0.proj``."""
    parts = name.split(".")
    for start in range(len(parts) - 1, -1, -1):
        if not parts[start].isdigit():
            yield ".".join(parts[start:])
            return


def attach(network: Network, settings: LoraSettings, device: torch.device) -> Adapter:
    """Freeze ``network`` and give its targeted modules LoRA layers on ``device``.

    The network must hold its weights. Torch's global CPU generator is drawn from. Raises ConfigError where
    a target matches no module.
    """
    from diffusers.loaders.peft import PeftAdapterMixin

    check_targets(network, settings.targets)
    module = network.module
    module.requires_grad_(False)
    if isinstance(module, PeftAdapterMixin):
        module.add_adapter(settings.peft(), ADAPTER)
    else:
        inject_adapter_in_model(settings.peft(), module, ADAPTER)
    parameters = dict(_initialise(module, settings, device))
    leave_casts_to_autocast(module)
    return Adapter(
        kind="lora",
        groups=(ParameterGroup("lora", parameters),),
        state=lambda: {name: parameter.detach() for name, parameter in parameters.items()},
        load=lambda state: copy_into(parameters, state, what=f"LoRA of network {network.name!r}"),
        settings=_described(settings),
        disabled=lambda: without_lora(module),
    )


@contextmanager
def without_lora(module: nn.Module) -> Iterator[None]:
    """While entered, the LoRA layers of ``module`` compute their base layers alone; each is then as it was."""
    layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
    before = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            # Not enable_adapters(): it switches off, and then on for all, what requires a gradient.
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def _initialise(module: nn.Module, settings: LoraSettings, device: torch.device) -> Iterator[tuple[str, nn.Parameter]]:
    """Start every LoRA layer in float32; its parameters by name, without PEFT's adapter name in it."""
    for name, layer in module.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        pair: Mapping[str, nn.Module] = {matrix: getattr(layer, matrix)[ADAPTER] for matrix in MATRICES}
        for matrix in pair.values():
            matrix.to("cpu", torch.float32)
        layer.reset_lora_parameters(ADAPTER, settings.peft().init_lora_weights)
        for matrix_name, matrix in pair.items():
            matrix.to(device)
            matrix.requires_grad_(True)
            yield f"{name}.{matrix_name}.weight", matrix.get_parameter("weight")


def leave_casts_to_autocast(module: nn.Module) -> None:
    """Make the LoRA layers in ``module`` take what they are given as it is, under autocast.

    PEFT casts it up to the adapter's type. Autocast casts that down again, to the very numbers that it was made of,
    and backward keeps the copy: one for each of several layers that are given one tensor.
    """
    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            object.__setattr__(layer, "_cast_input_dtype", MethodType(_left_to_autocast, layer))


def _left_to_autocast(self: LoraLayer, rows: Tensor, dtype: torch.dtype) -> Tensor:
    if torch.is_autocast_enabled(rows.device.type):
        return rows
    return type(self)._cast_input_dtype(self, rows, dtype)  # type: ignore[no-any-return]


def _described(settings: LoraSettings) -> dict[str, Any]:
    return {
        "rank": settings.rank,
        "alpha": settings.alpha,
        "dropout": settings.dropout,
        "initialisation": settings.initialisation,
        "targets": list(settings.targets),
        "peft": settings.peft().to_dict(),
    }
