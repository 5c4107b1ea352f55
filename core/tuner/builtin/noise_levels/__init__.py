"""Which noise levels were trained, and what was lost at each: a histogram in the log."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig, key

if TYPE_CHECKING:
    from tuner.builtin.noise_levels.histogram import Histogram
    from tuner.model import Batch, Loss
    from tuner.run import Run
    from tuner.validate.results import Validation


class NoiseLevelsConfig(PluginConfig):
    """The keys of the histogram."""

    noise_levels_interval: int = key(
        100,
        "Log the histogram of trained noise levels, and the loss at each, every n optimizer steps; 0 logs none.",
        ge=0,
    )


class NoiseLevelsPlugin(Plugin[NoiseLevelsConfig]):
    """Logs a histogram of the noise levels that were trained, with the mean loss at each."""

    Config = NoiseLevelsConfig

    def __init__(self, name: str, config: NoiseLevelsConfig) -> None:
        super().__init__(name, config)
        self._histogram: Histogram | None = None

    def validates_at(self, step: int, epoch: int) -> bool:
        """At the interval of its own."""
        interval = self.config.noise_levels_interval
        return interval > 0 and step % interval == 0

    # The outermost wrapper: what is counted is what the optimizer gets.
    @hookimpl(wrapper=True, tryfirst=True)
    def compute_loss(self, run: Run, batch: Batch) -> Generator[None, Loss, Loss]:
        """Count the samples of a micro-batch; nothing is read from the device."""
        loss = yield
        if run.process_index % run.sharing == 0:  # of processes that share a sample, one counts it
            self._counted().add(batch.sigmas, loss.per_sample)
        return loss

    @hookimpl
    def validate(self, run: Run) -> Validation | None:
        """The histogram since the last time, which then begins anew; at its own steps alone.

        A run that ends and goes on later would else log one at its end that an undisturbed run does not.
        """
        if not self.validates_at(run.step, 0):
            return None
        from tuner.validate.results import Validation

        return Validation(metrics=self._counted().take(), of_weights=False)

    def state_dict(self) -> dict[str, Any]:
        """What was counted since the last time."""
        return self._counted().state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        if state:
            self._counted().load(state)

    def _counted(self) -> Histogram:
        if self._histogram is None:
            from tuner.builtin.noise_levels.histogram import Histogram

            self._histogram = Histogram()
        return self._histogram
