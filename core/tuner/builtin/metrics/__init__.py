"""How fast a run is, for every line of the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig

if TYPE_CHECKING:
    from tuner.data.order import Order
    from tuner.data.samples import Prepared
    from tuner.model import Model
    from tuner.run import Run
    from tuner.spec import ModelSpec


class MetricsPlugin(Plugin[PluginConfig]):
    """Samples and tokens per second, over the steps since the last line of the log."""

    def __init__(self, name: str, config: PluginConfig) -> None:
        super().__init__(name, config)
        self._plan: Order | None = None
        self._samples, self._tokens, self._seconds = 0, 0, 0.0

    @hookimpl
    def data_ready(self, run: Run, spec: ModelSpec, data: Prepared, plan: Order) -> None:
        """Remember what each step trains on."""
        self._plan = plan

    @hookimpl
    def on_step_end(self, run: Run, model: Model, metrics: Mapping[str, Any]) -> None:
        """Count what the step trained on, in all processes; nothing is read from the device."""
        if self._plan is None or not run.is_main:
            return
        network, latents = model.network.spec, model.spec.latents
        for batch in self._plan.micro_batches(run.step - 1):
            shape = latents.shape(batch.bucket.frames, batch.bucket.height, batch.bucket.width)
            self._samples += len(batch.samples)
            self._tokens += len(batch.samples) * network.tokens(*shape[1:])
        self._seconds += metrics["seconds"]

    @hookimpl
    def log_metrics(self, run: Run, line: Mapping[str, Any]) -> Mapping[str, float]:
        """By the clock of training steps alone: validations and checkpoints are not in it."""
        samples, tokens, seconds = self._samples, self._tokens, self._seconds
        self._samples, self._tokens, self._seconds = 0, 0, 0.0
        if not seconds:
            return {}
        return {"metrics/samples_per_second": samples / seconds, "metrics/tokens_per_second": tokens / seconds}
