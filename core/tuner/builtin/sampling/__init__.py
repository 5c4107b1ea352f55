"""Clips of the validation prompts while training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tuner.builtin.sampling.keys import SamplingConfig
from tuner.errors import ConfigError, PluginError
from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin

if TYPE_CHECKING:
    from tuner.builtin.sampling.clips import Clip
    from tuner.builtin.sampling.prompts import Prompt
    from tuner.data.samples import Prepared, Sample
    from tuner.model import Model, Transform
    from tuner.run import Run
    from tuner.spec import ModelSpec
    from tuner.validate.results import Validation
    from tuner.workload import Workload


class SamplingPlugin(Plugin[SamplingConfig]):
    """Renders the validation prompts to clips and a contact sheet."""

    Config = SamplingConfig

    def __init__(self, name: str, config: SamplingConfig) -> None:
        super().__init__(name, config)
        self._prompts: tuple[Prompt, ...] | None = None
        self._said: set[str] = set()

    @hookimpl
    def configure(self, run: Run) -> None:
        """Read the prompts and the sizes, so that a mistake in them ends the run before any weight is read."""
        from tuner.builtin.sampling.prompts import placeholders
        from tuner.builtin.sampling.settings import RESOLUTION, parse_resolutions

        if self.config.evaluation_type == "clip":
            raise ConfigError(
                "evaluation_type: clip scores single pictures against their prompts, and says nothing of motion",
                where="evaluation_type",
                allowed=("none",),
                remedy="leave it out; held-out loss measures video: set eval_steps_interval",
            )
        prompts = self._all(run)
        for wish in (run.config.validation_resolution, *(prompt.own.get(RESOLUTION) for prompt in prompts)):
            if wish is not None:
                parse_resolutions(wish)
        if not prompts:
            self._say(
                run,
                "validation renders nothing: there is no validation_prompt, no user_prompt_library, and no "
                "validation_prompt_library",
            )
        if unfilled := placeholders(prompts):
            run.log.warning(
                "prompts are rendered with %s as it stands: write the name you trained", ", ".join(unfilled)
            )

    def validates_at(self, step: int, epoch: int) -> bool:
        """At the end of every so many epochs."""
        every = self.config.validation_epoch_interval
        return bool(every and epoch and epoch % every == 0)

    def validates_base(self) -> bool:
        """Unless there is nothing to render, or it is not wanted."""
        return bool(self._prompts) and not self.config.disable_benchmark

    @hookimpl
    def check_model(self, run: Run, spec: ModelSpec) -> None:
        """Say which wishes the model does not allow exactly, and what makes clips worse than they need to be."""
        from tuner.builtin.sampling.advice import advice, refuse

        refuse(self.config, spec)
        clips, notes = self._clips(run, spec)
        for note in (*notes, *advice(clips, spec, self.config, run.explicit)) if clips else ():
            self._say(run, note)
        if run.config.validation_images is not None and not spec.frames_taken:
            self._say(run, f"validation_images does nothing: {spec.flavour} takes no image")

    @hookimpl
    def data_ready(self, run: Run, spec: ModelSpec, data: Prepared) -> None:
        """Say when clips are rendered at a size that is not trained, and what would train it."""
        from tuner.builtin.sampling.trained_sizes import untrained

        for clip in self._clips(run, spec)[0]:
            if note := untrained(run, spec, data, clip.settings):
                self._say(run, note)

    @hookimpl
    def estimate(self, run: Run, spec: ModelSpec, workload: Workload) -> Mapping[str, Any]:
        """The largest clip that validation renders."""
        clips, _ = self._clips(run, spec)
        if not clips:
            return {}
        return {"rendered": max((clip.shape for clip in clips), key=lambda shape: shape[0] * shape[1] * shape[2])}

    @hookimpl
    def model_transforms(self, run: Run, model: Model) -> Iterable[Transform]:
        """None; a guidance that the family does not know is refused here, where nothing is read yet."""
        wanted = {"rescale": self.config.validation_guidance_rescale}
        wanted |= {"layer_skip": len(self.config.validation_guidance_skip_layers or ())}
        keys = {"rescale": "validation_guidance_rescale", "layer_skip": "validation_guidance_skip_layers"}
        for name, value in wanted.items():
            if value and self._all(run) and name not in model.guidance:
                raise PluginError(
                    f"the family {model.spec.family!r} cannot render with {keys[name]}", remedy="leave the key out"
                )
        return ()

    @hookimpl
    def extra_captions(self, run: Run) -> Iterable[str]:
        """The prompts, and their negative prompts."""
        from tuner.builtin.sampling.settings import chosen

        prompts = self._all(run)
        negative = (chosen(run, run.spec, "validation_negative_prompt", prompt.own) for prompt in prompts)
        return list(dict.fromkeys((*(prompt.text for prompt in prompts), *negative)))

    @hookimpl
    def extra_samples(self, run: Run, spec: ModelSpec, data: Prepared) -> Iterable[Sample]:
        """The frames that the clips of an image-to-video model start from."""
        if not self._all(run) or not spec.frames_taken:
            return []
        from tuner.builtin.sampling.clips import by_shape, clips
        from tuner.builtin.sampling.images import starting_samples

        wanted, _ = clips(run, spec, self._all(run))
        found: list[Sample] = []
        for group in by_shape(wanted):
            found += starting_samples(run, spec, data, [each.prompt for each in group], group[0].settings)
        if len(found) < len(wanted):
            self._say(
                run,
                "validation renders nothing: no clip of the datasets is long enough to take its last frame from; set "
                "validation_images, or lower validation_num_video_frames",
            )
        return found

    @hookimpl
    def on_train_start(self, run: Run, model: Model) -> None:
        """Refuse strengths of what has none, before the first step."""
        if self.config.strengths == [1.0] or not self._all(run):
            return
        for network in model.networks.values():
            if network.adapter is not None and network.adapter.scaled is None:
                raise ConfigError(
                    f"what is trained of {network.name} ({network.adapter.kind}) has no other strength",
                    where="validation_adapter_strength",
                    remedy="leave it out, or train a plain LoRA",
                )

    @hookimpl
    def validate(self, run: Run, model: Model) -> Validation | None:
        """Render every prompt."""
        if not self._all(run):
            return None
        clips, notes = self._clips(run, model.spec)
        from tuner.builtin.sampling.render import render
        from tuner.validate.results import Validation

        for note in notes:
            self._say(run, note)
        return Validation(media=render(run, model, clips))

    def _all(self, run: Run) -> tuple[Prompt, ...]:
        """The prompts, read once: a library edited while training does not change the run."""
        from tuner.builtin.sampling.prompts import validation_prompts

        if self._prompts is None:
            self._prompts = validation_prompts(run.config, builtin=self.config.validation_prompt_library)
        return self._prompts

    def _clips(self, run: Run, spec: ModelSpec) -> tuple[list[Clip], list[str]]:
        """The clips at the sizes that are known by now, and what is not quite as asked."""
        from tuner.builtin.sampling.clips import clips

        # The base has no adapter to be strong.
        strengths = [1.0] if run.variant == "base" else self.config.strengths
        return clips(run, spec, self._all(run), strengths)

    def _say(self, run: Run, line: str) -> None:
        """Say a thing once."""
        if line not in self._said and run.is_main:
            self._said.add(line)
            run.log.warning("%s", line)
