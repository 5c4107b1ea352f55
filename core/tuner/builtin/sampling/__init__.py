"""Clips of the validation prompts while training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig

if TYPE_CHECKING:
    from tuner.builtin.sampling.prompts import Prompt
    from tuner.data.samples import Prepared, Sample
    from tuner.model import Model
    from tuner.run import Run
    from tuner.spec import ModelSpec
    from tuner.validate.results import Validation
    from tuner.workload import Workload


class SamplingPlugin(Plugin[PluginConfig]):
    """Renders the validation prompts to clips and a contact sheet."""

    def __init__(self, name: str, config: PluginConfig) -> None:
        super().__init__(name, config)
        self._prompts: tuple[Prompt, ...] | None = None
        self._said: set[str] = set()

    @hookimpl
    def configure(self, run: Run) -> None:
        """Read the prompts and the size, so that a mistake in them ends the run before any weight is read."""
        from tuner.builtin.sampling.prompts import placeholders
        from tuner.builtin.sampling.settings import parse_resolution

        if run.config.validation_resolution is not None:
            parse_resolution(run.config.validation_resolution)
        prompts = self._all(run)
        if not prompts:
            self._say(run, "validation renders nothing: there is no validation_prompt and no user_prompt_library")
        if unfilled := placeholders(prompts):
            run.log.warning(
                "prompts are rendered with %s as it stands: write the name you trained", ", ".join(unfilled)
            )

    @hookimpl
    def check_model(self, run: Run, spec: ModelSpec) -> None:
        """Say which wishes the model does not allow exactly."""
        from tuner.builtin.sampling.settings import settings_for

        if self._all(run):
            for note in settings_for(run, spec)[1]:
                self._say(run, note)
        if run.config.validation_images is not None and not spec.frames_taken:
            self._say(run, f"validation_images does nothing: {spec.flavour} takes no image")

    @hookimpl
    def data_ready(self, run: Run, spec: ModelSpec, data: Prepared) -> None:
        """Say when clips are rendered at a size that is not trained, and what would train it."""
        from tuner.builtin.sampling.trained_sizes import untrained

        if self._all(run) and (note := untrained(run, spec, data)):
            self._say(run, note)

    @hookimpl
    def estimate(self, run: Run, spec: ModelSpec, workload: Workload) -> Mapping[str, Any]:
        """What validation renders."""
        from tuner.builtin.sampling.settings import settings_for

        if not self._all(run):
            return {}
        settings, _ = settings_for(run, spec)
        return {"rendered": (settings.frames, settings.height, settings.width)}

    @hookimpl
    def extra_captions(self, run: Run) -> Iterable[str]:
        """The prompts, and the negative prompt of them all."""
        from tuner.builtin.sampling.settings import chosen

        prompts = self._all(run)
        if not prompts:
            return []
        negative: str = chosen(run, run.spec, "validation_negative_prompt")
        return [*(prompt.text for prompt in prompts), negative]

    @hookimpl
    def extra_samples(self, run: Run, spec: ModelSpec, data: Prepared) -> Iterable[Sample]:
        """The frames that the clips of an image-to-video model start from."""
        prompts = self._all(run)
        if not prompts or not spec.frames_taken:
            return []
        from tuner.builtin.sampling.images import starting_samples
        from tuner.builtin.sampling.settings import settings_for

        found = starting_samples(run, spec, data, prompts, settings_for(run, spec)[0])
        if len(found) < len(prompts):
            self._say(
                run,
                "validation renders nothing: no clip of the datasets is long enough to take its last frame from; set "
                "validation_images, or lower validation_num_video_frames",
            )
        return found

    @hookimpl
    def validate(self, run: Run, model: Model) -> Validation | None:
        """Render every prompt."""
        prompts = self._all(run)
        if not prompts:
            return None
        from tuner.builtin.sampling.render import render
        from tuner.builtin.sampling.settings import settings_for
        from tuner.validate.results import Validation

        settings, notes = settings_for(run, model.spec)
        for note in notes:
            self._say(run, note)
        return Validation(media=render(run, model, prompts, settings))

    def _all(self, run: Run) -> tuple[Prompt, ...]:
        """The prompts, read once: a library edited while training does not change the run."""
        from tuner.builtin.sampling.prompts import validation_prompts

        if self._prompts is None:
            self._prompts = validation_prompts(run.config)
        return self._prompts

    def _say(self, run: Run, line: str) -> None:
        """Say a thing once."""
        if line not in self._said and run.is_main:
            self._said.add(line)
            run.log.warning("%s", line)
