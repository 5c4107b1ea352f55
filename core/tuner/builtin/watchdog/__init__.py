"""Says which stage of a step became slow, and where the time of a run went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.builtin.watchdog.pace import Pace
from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig, key

if TYPE_CHECKING:
    from tuner.data.order import Order
    from tuner.data.samples import Prepared
    from tuner.model import Model
    from tuner.run import Run
    from tuner.spec import ModelSpec


class WatchdogConfig(PluginConfig):
    """Keys of the watchdog."""

    watchdog_factor: float = key(2.0, "Say so when steps take this many times what they took before; 0 is never.", ge=0)


class WatchdogPlugin(Plugin[WatchdogConfig]):
    """Says which stage (data, forward, backward, optimizer, save, validate) became slow, and where the time went."""

    Config = WatchdogConfig

    def __init__(self, name: str, config: WatchdogConfig) -> None:
        super().__init__(name, config)
        self._plan: Order | None = None
        self._pace = Pace(config.watchdog_factor)
        self._spent: Counter[str] = Counter()

    @hookimpl
    def data_ready(self, run: Run, spec: ModelSpec, data: Prepared, plan: Order) -> None:
        """Steps are compared with steps over as many clips of the same shapes."""
        self._plan = plan

    @hookimpl
    def on_step_end(self, run: Run, model: Model, metrics: Mapping[str, Any]) -> None:
        """Look at what the step took on this process; nothing waits for the device."""
        stages: Mapping[str, float] = metrics["stages"]
        self._spent.update(stages)
        if self._plan is None or not self.config.watchdog_factor:
            return
        mine = self._plan.micro_batches(run.step - 1)[run.replica_index :: run.replica_count]
        shapes = tuple(sorted((each.bucket, len(each.samples)) for each in mine))
        for line in self._pace.after((model.active, shapes), run.step, stages):
            run.log.warning("%s%s", "" if run.process_count == 1 else f"process {run.process_index}: ", line)

    @hookimpl
    def on_run_end(self, run: Run, checkpoint: Path | None, error: BaseException | None) -> None:
        """Where the time went, of a run that trained."""
        spent = sum(self._spent.values())
        if run.is_main and spent:
            shares = ", ".join(f"{stage} {seconds / spent:.0%}" for stage, seconds in self._spent.most_common())
            run.log.info("time of the steps: %s", shares)
