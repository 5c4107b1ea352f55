"""Making the optimizer that a name means in the registry, which plugins fill (the built-in ``optimizers``).

Importing this file costs nothing; torch and the libraries are imported when an optimizer is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from tuner.errors import ConfigError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tuner.model import ParameterGroup
    from tuner.run import Run


INITIAL = "initial"
"""Entry of a parameter group that remembers its values from when it was made."""


@dataclass(frozen=True)
class OptimizerChoice:
    """One entry of the registry (see the hook ``optimizers``)."""

    module: str
    cls: str
    package: str
    """What to install when ``module`` is missing."""
    defaults: dict[str, Any] = field(default_factory=dict)
    state_bytes: float = 8.0
    """Bytes of state per trained float32 parameter."""
    library: str = ""
    """What ``module`` imports that may not be installed; ``module`` itself where empty."""
    needs_all_gradients: bool = False
    """Whether a step of one tensor depends on the others' gradients."""
    steps_shards: bool = True
    """Whether it steps tensors that are spread over the processes as it steps whole ones."""


class GradientRelease(Protocol):
    """Steps each parameter as soon as backward has its gradient (see the hook ``gradient_release``)."""

    @property
    def reached(self) -> Set[Tensor]:
        """Parameters stepped since :meth:`finish` was called."""

    def finish(self) -> Tensor:
        """The global L2 norm of the gradients since the last call, on their device; what was reached is forgotten."""


def check(run: Run) -> OptimizerChoice:
    """The configured optimizer. Raises ConfigError where it is unknown or not installed; imports nothing."""
    name = run.config.optimizer
    choice = run.optimizers.get(name) or run.optimizers.get(name.lower())
    if choice is None:
        known = sorted(run.optimizers)
        raise ConfigError(f"optimizer is {name!r}, which is not known", allowed=known, nearest=nearest(name, known))
    if find_spec((choice.library or choice.module).partition(".")[0]) is None:
        raise ConfigError(
            f"optimizer {name!r} needs the package {choice.package!r}, which is not installed",
            remedy=f"pip install {choice.package}",
        )
    return choice


def make(run: Run, groups: Sequence[ParameterGroup], device: torch.device) -> torch.optim.Optimizer:
    """The configured optimizer over ``groups``; each group keeps its name and its share of the learning rate.

    Raises ConfigError when ``optimizer_config`` holds an option or a value the optimizer does not take, or its library
    cannot be imported.
    """
    from tuner.sharded import is_sharded

    core, choice = run.config, check(run)
    try:
        cls = getattr(import_module(choice.module), choice.cls)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise ConfigError(f"optimizer {core.optimizer!r} cannot be had of {choice.package!r}: {error}") from error
    accepted = inspect.signature(cls).parameters
    for option in core.optimizer_config:
        if option not in accepted or option in {"params", "lr"}:
            raise ConfigError(
                f"optimizer_config holds {option!r}, which {core.optimizer} does not take",
                allowed=[name for name in accepted if name not in {"params", "lr"}],
                nearest=nearest(option, accepted),
            )
    options = {**choice.defaults, **core.optimizer_config}
    # Of torch's fused steps only Adam's knows tensors that are spread over processes.
    spread = any(is_sharded(each) for group in groups for each in group.parameters.values())
    if "fused" in accepted and device.type in ("cuda", "cpu") and not (spread and "betas" not in accepted):
        options.setdefault("fused", True)
    sorted_out = [
        {
            "params": list(group.parameters.values()),
            "lr": core.learning_rate * group.rate_scale,
            "name": group.name,
            "rate_scale": group.rate_scale,
            **({} if group.weight_decay or "weight_decay" not in accepted else {"weight_decay": 0.0}),
        }
        for group in groups
    ]
    try:
        optimizer: torch.optim.Optimizer = cls(sorted_out, lr=core.learning_rate, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer {core.optimizer!r} does not take this: {error}", where=options) from error
    if hasattr(optimizer, "train"):
        optimizer.train()
    for values in optimizer.param_groups:
        values[INITIAL] = {name: value for name, value in values.items() if name != "params"}
    return optimizer


def parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """All that it trains."""
    return [each for group in optimizer.param_groups for each in group["params"]]


def rehearse(run: Run, device: torch.device) -> None:
    """Make the optimizer over one matrix: what :func:`make` refuses is refused before any weight is read."""
    import torch

    from tuner.model import ParameterGroup

    make(run, [ParameterGroup("one", {"weight": torch.nn.Parameter(torch.zeros(2, 2, device=device))})], device)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the learning rate ``rate``; some libraries keep it in a tensor."""
    for group in optimizer.param_groups:
        share = rate * group["rate_scale"]
        if hasattr(group["lr"], "fill_"):
            group["lr"].fill_(share)
        else:
            group["lr"] = share


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


@contextmanager
def averaged(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """While entered, the weights are those that are meant to be used.

    A schedule-free optimizer (arXiv:2405.15682) trains on other weights than it is used with. Going there and back
    rounds, so the training weights are put aside and copied back: a run with a save more is the same run.
    """
    import torch

    switching: list[Any] = [each for each in optimizers if hasattr(each, "train") and hasattr(each, "eval")]
    weights = [each for optimizer in switching for group in optimizer.param_groups for each in group["params"]]
    before = [each.detach().clone() for each in weights]
    for optimizer in switching:
        optimizer.eval()
    try:
        yield
    finally:
        for optimizer in switching:
            optimizer.train()
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
