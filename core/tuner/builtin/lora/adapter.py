"""Attaching PEFT's LoRA layers to a network, whatever the network is.

Adapters are float32 (or bfloat16, where that is asked for) whatever the base is stored in, live on the training device
wherever the base lives, and are initialised on the CPU: their start depends on neither.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tuner.builtin.adapter_state import copy_into
from tuner.builtin.lora.begin import MATRICES, check_base, initialise, needs_base
from tuner.builtin.lora.names import Targets, check_used, matches
from tuner.errors import ConfigError
from tuner.model import Adapter, Network, ParameterGroup

if TYPE_CHECKING:
    from tuner.builtin.lora import LoraConfig

ADAPTER = "default"
"""PEFT's name for the adapter; it does not appear in any file."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LoraSettings:
    """What decides the shape and start of a LoRA."""

    rank: int
    alpha: float | None
    """None is each matrix's rank."""
    dropout: float
    initialisation: str
    targets: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    dora: bool = False
    rslora: bool = False
    dtype: str = "fp32"

    @classmethod
    def of(cls, config: LoraConfig, targets: tuple[str, ...]) -> LoraSettings:
        """The settings that the plugin's keys give."""
        return cls(
            config.lora_rank,
            config.lora_alpha,
            config.lora_dropout,
            config.lora_init_type,
            targets,
            tuple(config.lora_exclude_modules),
            config.lora_rank_pattern,
            config.lora_alpha_pattern,
            config.use_dora,
            config.use_rslora,
            config.lora_dtype,
        )

    @property
    def wanted(self) -> Targets:
        """Which matrices, with which rank and alpha."""
        return Targets(self.targets, self.rank, self.alpha, self.exclude, self.ranks, self.alphas)

    def peft(self, modules: Mapping[str, tuple[int, float]] | None = None) -> PeftLoraConfig:
        """The same as PEFT's own config, of ``modules`` by name with their ranks and alphas; their start is ours."""
        ranks = {re.escape(name): rank for name, (rank, _) in (modules or {}).items() if rank != self.rank}
        alpha = float(self.rank if self.alpha is None else self.alpha)
        alphas = {re.escape(name): own for name, (_, own) in (modules or {}).items() if own != alpha}
        return PeftLoraConfig(
            r=self.rank,
            # An integer where it is one: PEFT declares it so, and file metadata then reads as people expect.
            lora_alpha=int(alpha) if alpha.is_integer() else alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.targets if modules is None else modules),
            rank_pattern=ranks,
            alpha_pattern=alphas,
            use_dora=self.dora,
            use_rslora=self.rslora,
        )


def check_targets(network: Network, targets: Sequence[str]) -> None:
    """Raise ConfigError unless every target names a module that LoRA can adapt."""
    modules = dict(network.module.named_modules())
    adaptable = [name for name, module in modules.items() if isinstance(module, ADAPTABLE)]
    for target in targets:
        found = [type(module).__name__ for name, module in modules.items() if matches(target, name)]
        if found and not any(matches(target, name) for name in adaptable):
            raise ConfigError(
                f"LoRA target {target!r} matches only {found[0]} modules of network {network.name!r}, which have no "
                "weight to adapt",
                where="lora_target_modules",
                remedy="name the ends of module names, or leave the key out for the model's own choice",
            )
    check_used("lora_target_modules", targets, adaptable, network.name, "module")


def adapted(network: Network, settings: LoraSettings) -> dict[str, tuple[int, float]]:
    """(rank, alpha) of each module to adapt, by name. The network may be without weights.

    Raises ConfigError where a target or a pattern means no module, or nothing is left to adapt.
    """
    check_targets(network, settings.targets)
    modules = dict(network.module.named_modules())
    adaptable = {name: module for name, module in modules.items() if isinstance(module, ADAPTABLE)}
    blocks = {module for block in network.stack.blocks for module in block.modules()}
    linears = {name for name, each in adaptable.items() if isinstance(each, nn.Linear) and each in blocks}
    found = settings.wanted.among(list(adaptable), linears)
    check_used("lora_exclude_modules", settings.exclude, adaptable, network.name, "module")
    for where, patterns in (("lora_rank_pattern", settings.ranks), ("lora_alpha_pattern", settings.alphas)):
        check_used(where, patterns, found, network.name, "adapted module")
    if not found:
        raise ConfigError(f"lora_exclude_modules leaves nothing to adapt in network {network.name!r}")
    kernels = [name for name in found if not isinstance(adaptable[name], nn.Linear)]
    if kernels and (settings.dora or needs_base(settings.initialisation)):
        raise ConfigError(
            f"{kernels[0]!r} is a convolution, which is not adapted with "
            f"{'use_dora' if settings.dora else f'lora_init_type {settings.initialisation}'}",
            where="lora_target_modules",
        )
    return found


def attach(network: Network, settings: LoraSettings, device: torch.device) -> Adapter:
    """Freeze ``network`` and give its targeted modules LoRA layers on ``device``.

    The network must hold its weights. Torch's global CPU generator is drawn from. Raises ConfigError where
    a target matches no module, or a start needs the base's weights and they are quantised or streamed.
    """
    from diffusers.loaders.peft import PeftAdapterMixin

    modules = adapted(network, settings)
    module = network.module
    module.requires_grad_(False)
    if settings.dora or needs_base(settings.initialisation):
        check_base(network, modules, settings)
    peft = settings.peft(modules)
    if isinstance(module, PeftAdapterMixin):
        module.add_adapter(peft, ADAPTER)
    else:
        inject_adapter_in_model(peft, module, ADAPTER)
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}
    start = {
        name: begun
        for name, layer in layers.items()
        if (begun := initialise(layer, ADAPTER, settings.initialisation)) is not None
    }
    parameters = {key: each for name, layer in layers.items() for key, each in _placed(name, layer, settings, device)}
    leave_casts_to_autocast(module)
    return Adapter(
        kind="lora",
        groups=(ParameterGroup("lora", parameters),),
        state=lambda: {name: parameter.detach() for name, parameter in parameters.items()},
        load=lambda state: copy_into(parameters, state, what=f"LoRA of network {network.name!r}"),
        settings={**_described(settings, modules), "start": start},
        disabled=lambda: base_in_place(parameters, start) if start else without_lora(module),
        # With another start, none of the matrices' strengths but 1 has a meaning.
        scaled=None if start else partial(scaled_lora, layers.values()),
    )


@contextmanager
def scaled_lora(layers: Collection[LoraLayer], strength: float) -> Iterator[None]:
    """While entered, what LoRA layers add counts ``strength`` times."""
    before = [layer.scaling[ADAPTER] for layer in layers]
    try:
        for layer, scale in zip(layers, before, strict=True):
            layer.scaling[ADAPTER] = scale * strength
        yield
    finally:
        for layer, scale in zip(layers, before, strict=True):
            layer.scaling[ADAPTER] = scale


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


@contextmanager
def base_in_place(parameters: Mapping[str, nn.Parameter], start: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """While entered, the LoRA that took its start out of the base's weights is that start: together they are the base.

    Matrices are put in place of the trained ones, which are the same tensors, bit for bit, afterwards.
    """
    trained = {key: parameter.data for key, parameter in parameters.items()}
    try:
        for name, pair in start.items():
            for matrix, begun in zip(MATRICES, pair, strict=True):
                parameter = parameters[f"{name}.{matrix}.weight"]
                parameter.data = begun.to(parameter.device, parameter.dtype)
        yield
    finally:
        for key, parameter in parameters.items():
            parameter.data = trained[key]


def _placed(
    name: str, layer: LoraLayer, settings: LoraSettings, device: torch.device
) -> Iterator[tuple[str, nn.Parameter]]:
    """The layer's parameters on ``device``, trainable, by name without PEFT's adapter name in it."""
    kinds = (*MATRICES, "lora_magnitude_vector") if settings.dora else MATRICES
    for kind in kinds:
        part: nn.Module = getattr(layer, kind)[ADAPTER]
        part.to(device, torch.float32 if kind not in MATRICES else DTYPES[settings.dtype])
        part.requires_grad_(True)
        yield f"{name}.{kind}.weight", part.get_parameter("weight")


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


def _described(settings: LoraSettings, modules: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """What files say of it. Alphas are those of a plain LoRA: alpha over rank is what B·A is multiplied by."""
    return {
        "rank": settings.rank,
        "alpha": settings.rank if settings.alpha is None else settings.alpha,
        "dropout": settings.dropout,
        "initialisation": settings.initialisation,
        "targets": list(settings.targets),
        "alphas": {
            name: alpha * math.sqrt(rank) if settings.rslora else alpha for name, (rank, alpha) in modules.items()
        },
    }
