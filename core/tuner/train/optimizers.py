"""The registry of optimizers: a name, where its class lives, and our defaults for it.

Importing this file costs nothing; torch and the libraries are imported when an optimizer is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tuner.errors import ConfigError, nearest

if TYPE_CHECKING:
    import torch

    from tuner.config.keys import CoreConfig
    from tuner.model import ParameterGroup


INITIAL = "initial"
"""Entry of a parameter group that remembers its values from when it was made."""


@dataclass(frozen=True)
class OptimizerChoice:
    """One entry of the registry."""

    module: str
    cls: str
    package: str
    """What to install when ``module`` is missing."""
    defaults: dict[str, Any] = field(default_factory=dict)


OPTIMIZERS: dict[str, OptimizerChoice] = {
    "adamw": OptimizerChoice("torch.optim", "AdamW", "torch", {"betas": (0.9, 0.999), "weight_decay": 0.01}),
    "sgd": OptimizerChoice("torch.optim", "SGD", "torch"),
    "optimi-adamw": OptimizerChoice("optimi", "AdamW", "torch-optimi", {"weight_decay": 0.01}),
    "optimi-adan": OptimizerChoice("optimi", "Adan", "torch-optimi", {"weight_decay": 0.02}),
    "optimi-lion": OptimizerChoice("optimi", "Lion", "torch-optimi", {"weight_decay": 0.0}),
    "optimi-radam": OptimizerChoice("optimi", "RAdam", "torch-optimi"),
    "optimi-ranger": OptimizerChoice("optimi", "Ranger", "torch-optimi"),
    "optimi-sgd": OptimizerChoice("optimi", "SGD", "torch-optimi"),
    "optimi-stableadamw": OptimizerChoice("optimi", "StableAdamW", "torch-optimi", {"weight_decay": 0.01}),
}


def check(core: CoreConfig) -> None:
    """Refuse an optimizer that is unknown or not installed. Raises ConfigError; imports nothing."""
    choice = OPTIMIZERS.get(core.optimizer)
    if choice is None:
        raise ConfigError(
            f"optimizer is {core.optimizer!r}, which is not known",
            allowed=sorted(OPTIMIZERS),
            nearest=nearest(core.optimizer, OPTIMIZERS),
        )
    if find_spec(choice.module.partition(".")[0]) is None:
        raise ConfigError(
            f"optimizer {core.optimizer!r} needs the package {choice.package!r}, which is not installed",
            remedy=f"pip install {choice.package}",
        )


def make(core: CoreConfig, groups: Sequence[ParameterGroup], device: torch.device) -> torch.optim.Optimizer:
    """The configured optimizer over ``groups``; each group keeps its name and its share of the learning rate.

    Raises ConfigError when ``optimizer_config`` holds an option the optimizer does not take.
    """
    choice = OPTIMIZERS[core.optimizer]
    cls = getattr(import_module(choice.module), choice.cls)
    accepted = inspect.signature(cls).parameters
    for option in core.optimizer_config:
        if option not in accepted or option in {"params", "lr"}:
            raise ConfigError(
                f"optimizer_config holds {option!r}, which {core.optimizer} does not take",
                allowed=[name for name in accepted if name not in {"params", "lr"}],
                nearest=nearest(option, accepted),
            )
    options = {**choice.defaults, **core.optimizer_config}
    if "fused" in accepted and device.type == "cuda":
        options.setdefault("fused", True)
    optimizer: torch.optim.Optimizer = cls(
        [
            {
                "params": list(group.parameters.values()),
                "lr": core.learning_rate * group.rate_scale,
                "name": group.name,
                "rate_scale": group.rate_scale,
                **({} if group.weight_decay or "weight_decay" not in accepted else {"weight_decay": 0.0}),
            }
            for group in groups
        ],
        lr=core.learning_rate,
        **options,
    )
    for values in optimizer.param_groups:
        values[INITIAL] = {name: value for name, value in values.items() if name != "params"}
    return optimizer


def evolved(group: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimizer changed in one of its groups since it was made: state that some libraries keep there.

    The rest of a group follows the config, so that a changed option takes effect on resume.
    """
    initial = group[INITIAL]
    fixed = {"params", "lr", INITIAL}
    return {
        name: value
        for name, value in group.items()
        if name not in fixed and (name not in initial or (initial[name] is not value and initial[name] != value))
    }
