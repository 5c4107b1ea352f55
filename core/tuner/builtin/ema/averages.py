"""The averages of all networks, each by its own count of steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tuner.builtin.adapter_state import copy_into
from tuner.builtin.ema.average import Average, HostAverage
from tuner.builtin.ema.decay import decay_at, decay_over
from tuner.errors import CheckpointError
from tuner.model import Model, Network
from tuner.train.turns import Turns

if TYPE_CHECKING:
    from tuner.builtin.ema import EmaConfig
    from tuner.run import Run

SEPARATOR = "/"
"""Between a network's name and a tensor's."""


@dataclass
class _Kept:
    """A network's average and where it stands, in steps of that network."""

    average: Average
    origin: int = 0
    """The step from which the decay's warm-up counts."""
    updated: int = 0
    """The step of the last update; 0 before the first, which gives the average the weights of its step."""


class Averages:
    """Averages of what is trained, for as long as a run trains it."""

    def __init__(self, run: Run, model: Model, config: EmaConfig) -> None:
        self._config = config
        self._networks = {each.name: each for each in model.networks.values() if each.adapter is not None}
        self._turns = Turns(tuple(self._networks), model.spec.switch_steps or max(1, run.total_steps))
        # All memory is taken now: where there is too little, that is known before the first step.
        self._kept = {name: _Kept(self._new(network)) for name, network in self._networks.items()}

    @property
    def began(self) -> bool:
        """Whether there is an average of at least one network."""
        return any(kept.updated for kept in self._kept.values())

    def follow(self, step: int) -> None:
        """Update the average of the network that was trained last, if that is due after ``step`` steps of the run."""
        name, own = self._trained(step)
        config = self._config
        if own <= config.ema_start_step or own % config.ema_update_interval:
            return
        kept, decay = self._kept[name], 0.0
        if kept.updated:
            decay = decay_over(kept.updated, own, kept.origin, config.ema_decay)
        else:
            # Later than it should have begun where the run goes on from a checkpoint that had none.
            kept.origin = max(config.ema_start_step, own - config.ema_update_interval) + 1
        kept.average.follow(1 - decay)
        kept.updated = own

    def decay(self, step: int) -> float | None:
        """The decay at ``step`` of the run, of the network it trained; None where that has no average."""
        name, own = self._trained(step)
        kept = self._kept[name]
        return decay_at(own, kept.origin, self._config.ema_decay) if kept.updated else None

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """While entered, every network that has an average computes with it; bit for bit as before afterwards."""
        with ExitStack() as stack:
            for kept in self._kept.values():
                if kept.updated:
                    stack.enter_context(kept.average.exchanged())
            yield

    def state(self) -> dict[str, Any]:
        """Averages as tensors and where they stand, by names that begin with the network's."""
        state: dict[str, Any] = {}
        for name, kept in self._kept.items():
            if not kept.updated:
                continue
            state[name] = {"origin": kept.origin, "updated": kept.updated}
            state |= {f"{name}{SEPARATOR}{each}": tensor for each, tensor in kept.average.tensors.items()}
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on with what :meth:`state` gave. Raises CheckpointError where it is of other tensors."""
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        for name in state.keys() - tensors.keys():
            if name not in self._networks:
                raise CheckpointError(
                    f"the checkpoint has averages of network {name!r}, which is not trained",
                    allowed=list(self._networks),
                    remedy="resume with the model that the run was started with, or without use_ema",
                )
            kept, start = self._kept[name], name + SEPARATOR
            own = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
            copy_into(kept.average.tensors, own, what=f"averages of network {name!r}")
            kept.origin, kept.updated = state[name]["origin"], state[name]["updated"]

    def notes(self, step: int, total: int) -> Iterator[str]:
        """What a run of ``total`` steps that goes on at ``step`` will not have, a line each."""
        start, interval = self._config.ema_start_step, self._config.ema_update_interval
        for name in self._networks:
            own, last = (self._turns.steps_of(name, each) for each in (step, total))
            if last // interval * interval <= start:
                yield (
                    f"no average of {name} is kept: it begins after ema_start_step {start}, every {interval} steps, "
                    f"and the run trains it for {last}"
                )
            elif own // interval * interval > start and not self._kept[name].updated:
                yield f"the checkpoint has no average of {name}: it begins anew after step {step}"
        if self._config.ema_device == "cpu" and any(each.sharding for each in self._networks.values()):
            yield "ema_device cpu does nothing: averages of a sharded network are sharded like it, beside the weights"

    def close(self) -> None:
        """End what works in the background."""
        for kept in self._kept.values():
            kept.average.close()

    def _trained(self, step: int) -> tuple[str, int]:
        """The network that was trained last after ``step`` steps of the run, and its own count of steps."""
        name = self._turns.at(step - 1)
        return name, self._turns.steps_of(name, step)

    def _new(self, network: Network) -> Average:
        parameters = trained(network)
        there = any(each.device.type != "cpu" for each in parameters.values())
        host = self._config.ema_device == "cpu" and there and network.sharding is None
        return (HostAverage if host else Average)(parameters)


def trained(network: Network) -> dict[str, nn.Parameter]:
    """Everything that is trained on ``network``, by name."""
    assert network.adapter is not None
    return {name: each for group in network.adapter.groups for name, each in group.parameters.items()}
