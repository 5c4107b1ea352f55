"""Learning-rate curves as pure functions of the step: resuming is arithmetic, there is no state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner.errors import ConfigError, nearest

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig
    from tuner.data.order import Order
    from tuner.run import Run


def warmup_steps(core: CoreConfig, total: int) -> int:
    """Steps of linear warm-up; none where the configured warm-up is as long as the run (users have such configs)."""
    if core.lr_scheduler == "constant" or core.lr_warmup_steps >= total:
        return 0
    return core.lr_warmup_steps


def check(run: Run) -> None:
    """Raise ConfigError for a learning-rate curve that no plugin offers."""
    name = run.config.lr_scheduler
    if name not in run.lr_curves:
        known = sorted(run.lr_curves)
        raise ConfigError(f"lr_scheduler is {name!r}, which is not known", allowed=known, nearest=nearest(name, known))


def learning_rate(run: Run, step: int, total: int) -> float:
    """The base learning rate of optimizer step ``step`` (from 0) of ``total``.

    Linear warm-up from 0 over ``warmup_steps``; then a curve from the base rate (1) to ``lr_end`` (0) over the rest.
    """
    core, warmup = run.config, warmup_steps(run.config, total)
    if step < warmup:
        return core.learning_rate * step / warmup
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return core.lr_end + (core.learning_rate - core.lr_end) * run.lr_curves[core.lr_scheduler](share)


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
