"""Everything the training loop works with, put together once and passed as one argument."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from tuner import flow, variants
from tuner.attention import Attention
from tuner.attention_switch import set_backend
from tuner.blocks import StepContext
from tuner.checkpointing import Checkpointing
from tuner.model import Batch, Model, Network
from tuner.train import optimizers, schedules, state
from tuner.train.engine import Engine
from tuner.train.turns import Turns, hand_over

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from tuner.data.loader import Loader
    from tuner.data.order import Order
    from tuner.manager import Manager
    from tuner.run import Run
    from tuner.train.optimizers import GradientRelease


@dataclass
class Session:
    """One training run, ready to step."""

    run: Run
    manager: Manager
    model: Model
    engine: Engine
    plan: Order
    loader: Loader
    total: int
    """Optimizer steps of the whole run."""
    manifest: Mapping[str, object]
    """What every checkpoint's manifest says beside its step."""
    attention: Attention = field(default_factory=Attention)
    """The kernels of training and of validation."""
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    releases: dict[str, GradientRelease] = field(default_factory=dict)
    """Of the networks that are stepped during backward."""
    unchecked: set[str] = field(default_factory=set)
    """Networks whose gradients were not looked at yet."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of this process's clock since they were last taken, by stage: data, forward, backward, device (waiting for it),
    optimizer, validate, save."""
    skipped: int = 0
    """Steps left out one after the other, because their loss or gradients were no numbers."""
    copied: threading.Event = field(default_factory=threading.Event)
    """Set where no checkpoint is still to be copied: until then no trained weight may change."""
    stepping: bool = False
    """Whether an optimizer is changing the weights, or was when something went wrong."""
    _resident: str | None = None

    def __post_init__(self) -> None:
        names = tuple(network.name for network in self.trained)
        self.turns = Turns(names, self.model.spec.switch_steps or max(1, self.total))
        self.unchecked.update(names)
        self.loader.draw = self.draw
        self.copied.set()
        for name, network in self.model.networks.items():
            if network.adapter is not None:
                made = optimizers.make(self.run, network.adapter.groups, self.engine.device)
                self.optimizers[name] = made
                released = self.manager.hook.gradient_release(run=self.run, network=network, optimizer=made)
                if released is not None:
                    self.releases[name] = released
            if self.attention.training is not None:
                set_backend(network, self.attention.training)

    @property
    def trained(self) -> list[Network]:
        """The networks that have something to train."""
        return [network for network in self.model.networks.values() if network.adapter is not None]

    def take_turn(self) -> Network:
        """Make the network that this step trains the model's active and resident one."""
        name = self.turns.at(self.run.step)
        network = self.model.networks[name]
        if len(self.model.networks) > 1 and self._resident != name:
            hand_over(self.model.networks.get(self._resident or ""), network, self.engine.device)
        self.model.active = self._resident = name
        return network

    def draw(self, step: int, positions: Sequence[int], latents: Tensor) -> tuple[Tensor, Tensor]:
        """Noise levels (B,) and noise of ``latents`` (B, C, F', h, w) in ``step``, as its network has them."""
        spec = self.model.networks[self.turns.at(step)].spec
        tokens = spec.tokens(*latents.shape[2:])
        where: dict[str, Any] = {"step": step, "positions": positions, "latents": latents}
        return flow.draw(self.run.config, **where, tokens=tokens, sigma_range=spec.sigma_range)

    def learning_rate(self, network: str) -> float:
        """The base learning rate of this step, by the network's own count of steps."""
        done, total = (self.turns.steps_of(network, step) for step in (self.run.step, self.total))
        return schedules.learning_rate(self.run, done, total)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the seconds of the block to ``stage``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began

    def take_seconds(self) -> dict[str, float]:
        """The seconds by stage, which begin anew."""
        taken, self.seconds = self.seconds, {}
        return taken

    def context(self, batch: Batch) -> StepContext:
        """What a training forward of ``batch`` is run with."""
        hook, config, network = self.manager.hook.route_tokens, self.run.config, self.model.network
        full = Checkpointing(config.gradient_checkpointing_interval) if config.checkpointing == "full" else None
        return StepContext(
            router=(lambda request: hook(run=self.run, request=request) or ()) if hook.get_hookimpls() else None,
            checkpointing=network.checkpointing or full,
            residency=network.residency,
            sequence=network.sequence,
            keep_at_least=batch.keep_at_least,
            positions=batch.positions,
            forced=batch.forced,
        )

    @property
    def saves_parts(self) -> bool:
        """Whether every process writes its part of a checkpoint."""
        return any(each.sharding is not None and each.sharding.saves_parts for each in self.trained)

    def contents(self, parts: dict[str, Tensor] | None = None) -> dict[str, state.Contents]:
        """Everything a resume needs, by name of its file in the checkpoint; views of what training changes.

        ``parts`` gets, by file and name, what is spread over the processes; without it that is put together.
        """
        contents = state.of_plugins(self.run.plugins, parts)
        for network in self.trained:
            contents |= state.of_network(network, self.optimizers[network.name], parts)
        return contents

    def export_into(self, directory: Path) -> list[Callable[[], object]]:
        """Let the plugins write what people use elsewhere into ``directory``, which the main process has made.

        Returns what is still to be called: it writes what was taken from the weights as they are now.
        """
        found = variants.offered(self.run, self.model, self.manager, "save")
        later: list[Callable[[], object]] = []
        with optimizers.averaged(self.optimizers.values()):
            for name in found:
                if self.run.is_main:
                    (directory / name).mkdir(exist_ok=True)
                with variants.in_place(self.run, found, name):
                    given = self.manager.hook.save(run=self.run, model=self.model, directory=directory / name)
                    later += [each for written in given for each in written if callable(each)]
        return later

    def restore(self, directory: Path) -> None:
        """Take everything back from a whole checkpoint. Raises CheckpointError when it does not fit."""
        for network in self.trained:
            state.load_network(network, self.optimizers[network.name], directory)
        groups = [group for network in self.trained if network.adapter for group in network.adapter.groups]
        trained = {name: each for group in groups for name, each in group.parameters.items()}
        for name in state.load_plugins(self.run.plugins, directory, trained):
            self.run.log.warning("the checkpoint holds state of plugin %r, which is not loaded", name)
