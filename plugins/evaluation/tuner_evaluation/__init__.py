"""Held-out loss: what the model has learnt of clips that it was never trained on, at fixed noise and noise levels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner import Plugin, PluginConfig, hookimpl, key

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig
    from tuner.data.samples import Prepared
    from tuner.model import Model
    from tuner.run import Run
    from tuner.validate.results import Validation


class EvaluationConfig(PluginConfig):
    """The keys of held-out loss."""

    eval_timesteps: int = key(
        4,
        "Noise levels that each held-out sample is measured at: the quantiles (i + 0.5) / n of the levels that the "
        "network is trained on.",
        ge=1,
    )
    eval_steps_interval: int = key(
        0, "Measure every n optimizer steps too; 0 measures with every validation and at the end alone.", ge=0
    )
    eval_epoch_interval: int = key(0, "Measure at the end of every n-th epoch too; 0 does not.", ge=0)
    eval_max_samples: int = key(
        64, "The most held-out samples that are measured, shared out evenly among the datasets.", ge=1
    )


class EvaluationPlugin(Plugin[EvaluationConfig]):
    """The loss on datasets of type `eval`, which are never trained on, at fixed noise and noise levels."""

    Config = EvaluationConfig

    def __init__(self, name: str, config: EvaluationConfig) -> None:
        super().__init__(name, config)
        self._said: set[str] = set()

    def validates_at(self, step: int, epoch: int) -> bool:
        """At the intervals of its own."""
        steps, epochs = self.config.eval_steps_interval, self.config.eval_epoch_interval
        return (steps > 0 and step % steps == 0) or (epochs > 0 and epoch > 0 and epoch % epochs == 0)

    @hookimpl
    def data_ready(self, run: Run, data: Prepared) -> None:
        """Say what is measured and when, or that there is nothing to measure; refuse an id that a number would have."""
        from tuner_evaluation.choice import check_ids, chosen

        if not data.held_out:
            self._say(run, "held-out loss is not measured: there is no dataset with dataset_type eval")
            return
        check_ids(data.held_out)
        measured, held_out = len(chosen(data.held_out, self.config.eval_max_samples)), len(data.held_out)
        samples = (
            f"{held_out} samples" if measured == held_out else f"{measured} of {held_out} samples (eval_max_samples)"
        )
        levels = f"{self.config.eval_timesteps} noise level{'s' * (self.config.eval_timesteps > 1)}"
        self._say(run, f"held-out loss: {samples} at {levels}, {self._moments(run.config)}")

    @hookimpl
    def validate(self, run: Run, model: Model) -> Validation | None:
        """Measure the held-out samples."""
        if run.cached is None or not run.cached.prepared.held_out:
            return None
        from tuner.validate.results import Validation
        from tuner_evaluation.choice import chosen
        from tuner_evaluation.measure import means, measure

        samples = chosen(run.cached.prepared.held_out, self.config.eval_max_samples)
        metrics = means(measure(run, model, samples, self.config.eval_timesteps))
        if run.is_main:
            run.log.info("step %d: held-out loss %.5f", run.step, metrics["loss"])
        return Validation(metrics=metrics)

    def _moments(self, core: CoreConfig) -> str:
        """When it is measured, in words."""
        steps = sorted({core.validation_step_interval, self.config.eval_steps_interval} - {0})
        moments = ["every step" if interval == 1 else f"every {interval} steps" for interval in steps]
        if epochs := self.config.eval_epoch_interval:
            moments.append("every epoch" if epochs == 1 else f"every {epochs} epochs")
        return ", ".join([*moments, "at the end"])

    def _say(self, run: Run, line: str) -> None:
        """Say a thing once: the hook is called again where files could not be encoded."""
        if line not in self._said and run.is_main:
            self._said.add(line)
            run.log.info("%s", line)
