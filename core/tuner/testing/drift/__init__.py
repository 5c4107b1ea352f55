"""How far training has moved the weights from where they began."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tuner import Plugin, PluginConfig, hookimpl, key

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.config.keys import CoreConfig
    from tuner.model import Model
    from tuner.run import Run


class DriftConfig(PluginConfig):
    """The plugin's keys in the flat config."""

    drift_interval: int = key(
        0,
        "Steps between two measurements of how far the weights have moved; 0 is none.",
        ge=0,
    )


class DriftPlugin(Plugin[DriftConfig]):
    """Logs how far training has moved the trained weights from where they began."""

    api = 1
    Config = DriftConfig

    def __init__(self, name: str, config: DriftConfig) -> None:
        super().__init__(name, config)
        self._start: dict[str, Tensor] = {}
        self._measured: dict[str, float] = {}

    def is_active(self, core: CoreConfig) -> bool:
        """Only where an interval is set."""
        return self.config.drift_interval > 0

    @hookimpl
    def on_train_start(self, run: Run, model: Model) -> None:
        """Keep the weights as they are; a resumed run has those of its beginning from the checkpoint."""
        if self.is_active(run.config) and run.is_main and not self._start:
            self._start = {name: weight.cpu().clone() for name, weight in _trained(model)}

    @hookimpl
    def on_step_end(self, run: Run, model: Model) -> None:
        """Measure, after the optimizer has stepped."""
        if not self._start or run.step % self.config.drift_interval:
            return
        import torch  # heavy imports stand in the bodies of hooks, or in a module beside this one

        moved = [weight.cpu() - self._start[name] for name, weight in _trained(model)]
        self._measured = {"drift/distance": float(torch.stack([each.norm() for each in moved]).norm())}

    @hookimpl
    def log_metrics(self, run: Run, line: Mapping[str, Any]) -> Mapping[str, float]:
        """Add the measurement to the line of its step: the log, the trackers and the report have it from there."""
        measured, self._measured = self._measured, {}
        return measured

    def state_dict(self) -> dict[str, Any]:
        """The weights of the beginning."""
        return dict(self._start)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._start = dict(state)


def _trained(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Name and value of everything that is trained, in float32."""
    for network in model.networks.values():
        if network.adapter is not None:
            for name, weight in network.adapter.state().items():
                yield f"{network.name}/{name}", weight.detach().float()
