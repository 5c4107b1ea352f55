"""Scheduled sampling: train on what the model itself makes of noise, as it will have to when it renders."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Literal

from tuner import Plugin, PluginConfig, hookimpl, key
from tuner.config.warnings import unused
from tuner.errors import ConfigError

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig
    from tuner.model import Batch, Loss, Model
    from tuner.run import Run


class ScheduledSamplingConfig(PluginConfig):
    """The keys of scheduled sampling."""

    scheduled_sampling_max_step_offset: int = key(
        0, "The most sampler steps that the model takes by itself before a sample is trained; 0 is off.", ge=0
    )
    scheduled_sampling_num_inference_steps: int = key(
        50, "Steps of the sampler whose steps these are: more steps are smaller ones.", ge=1
    )
    scheduled_sampling_probability: float = key(
        1.0, "Share of the samples that are rolled out; the others are trained as ever.", ge=0, le=1
    )
    scheduled_sampling_prob_start: float = key(0.0, "That share where a ramp begins.", ge=0, le=1)
    scheduled_sampling_prob_end: float | None = key(
        None, "That share where a ramp ends; `scheduled_sampling_probability` when absent.", ge=0, le=1
    )
    scheduled_sampling_start_step: int = key(0, "Optimizer steps before the first rollout.", ge=0)
    scheduled_sampling_ramp_steps: int = key(0, "Optimizer steps of the ramp; 0 begins at the full share.", ge=0)
    scheduled_sampling_ramp_shape: Literal["linear", "cosine"] = key("linear", "Shape of the ramp.")
    scheduled_sampling_strategy: Literal["uniform", "biased_early", "biased_late"] = key(
        "uniform", "How many steps: evenly, rather few (`biased_early`), or rather many (`biased_late`)."
    )
    scheduled_sampling_sampler: Literal["euler", "unipc"] = key("euler", "The sampler that takes the steps.")


class ScheduledSamplingPlugin(Plugin[ScheduledSamplingConfig]):
    """Rolls samples out with the model itself before they are trained (scheduled sampling, arXiv:1506.03099)."""

    Config = ScheduledSamplingConfig

    def is_active(self, core: CoreConfig) -> bool:
        """Whether anything is rolled out."""
        return self.config.scheduled_sampling_max_step_offset > 0

    def warnings(self, core: CoreConfig) -> Iterable[str]:
        """Settings of rollouts that are off."""
        if not self.is_active(core):
            yield from unused(self.config, "scheduled_sampling_max_step_offset is 0")

    @hookimpl
    def configure(self, run: Run) -> None:
        """Refuse a ramp that is described by its end and has no length."""
        config = self.config
        if config.scheduled_sampling_prob_end is not None and not config.scheduled_sampling_ramp_steps:
            raise ConfigError(
                "scheduled_sampling_prob_end is set and there is no ramp",
                remedy="set scheduled_sampling_ramp_steps, or scheduled_sampling_probability for a share that stays",
            )

    @hookimpl(wrapper=True)
    def compute_loss(self, run: Run, model: Model, batch: Batch) -> Generator[None, Loss, Loss]:
        """Put the point that the model reached in the place of the noisy latents, and what leads from it as target."""
        if not self.is_active(run.config):
            return (yield)
        from tuner_scheduled_sampling.rollout import roll_out, with_cost

        forwards = roll_out(self.config, run, model, batch)
        return with_cost((yield), forwards)
