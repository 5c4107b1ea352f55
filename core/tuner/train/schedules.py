"""Learning-rate curves as pure functions of the step: resuming is arithmetic, there is no state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tuner.errors import ConfigError

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig
    from tuner.data.order import Order


def warmup_steps(core: CoreConfig, total: int) -> int:
    """Steps of linear warm-up; none where the configured warm-up is as long as the run (users have such configs)."""
    if core.lr_scheduler == "constant" or core.lr_warmup_steps >= total:
        return 0
    return core.lr_warmup_steps


def learning_rate(core: CoreConfig, step: int, total: int) -> float:
    """The base learning rate of optimizer step ``step`` (from 0) of ``total``.

    Linear warm-up from 0 over ``warmup_steps``; then a curve from the base rate (1) to ``lr_end`` (0) over the rest.
    """
    warmup = warmup_steps(core, total)
    if step < warmup:
        return core.learning_rate * step / warmup
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return core.lr_end + (core.learning_rate - core.lr_end) * _curve(core, share)


def _curve(core: CoreConfig, share: float) -> float:
    """Height in [0, 1] of the curve when ``share`` of it is over."""
    match core.lr_scheduler:
        case "linear":
            return 1 - share
        case "cosine":
            return (1 + math.cos(math.pi * share)) / 2
        case "cosine_with_restarts":
            return 0.0 if share == 1 else (1 + math.cos(math.pi * (share * core.lr_num_cycles % 1))) / 2
        case "sine":
            return (1 + math.cos(2 * math.pi * share * core.lr_num_cycles)) / 2
        case "polynomial":
            return float((1 - share) ** core.lr_power)
        case _:
            return 1.0


def total_steps(core: CoreConfig, plan: Order) -> int:
    """Optimizer steps of the whole run, from ``max_train_steps`` and ``num_train_epochs``.

    With both given the shorter ends the run, unless ``ignore_final_epochs``. Raises ConfigError with neither,
    DataError where no dataset is trained on before the end.
    """
    if not core.max_train_steps and not core.num_train_epochs:
        raise ConfigError(
            "max_train_steps and num_train_epochs are both 0: the run has no length",
            remedy="set one of them, for example max_train_steps: 2000",
        )
    if not core.num_train_epochs or (core.max_train_steps and core.ignore_final_epochs):
        plan.check_until(core.max_train_steps)
        return core.max_train_steps
    return plan.steps_until(core.num_train_epochs, core.max_train_steps or None)
