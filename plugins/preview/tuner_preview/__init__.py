"""Previews: what a validation clip looks like while it is being sampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tuner import Plugin, PluginConfig, hookimpl, key
from tuner.errors import ConfigError

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig
    from tuner.model import Model, Transform
    from tuner.run import Run
    from tuner.spec import ModelSpec
    from tuner.validate.results import SamplingStep
    from tuner_preview.making import Maker

EVERY = "validation_preview_steps"
MODEL = "validation_preview_model"


class PreviewConfig(PluginConfig):
    """The keys of previews."""

    validation_preview: bool = key(
        False,
        "Show what each validation clip is becoming while it is sampled, in `output_dir/validation`, in the report and "
        "through webhooks.",
    )
    validation_preview_steps: int = key(1, "Sampling steps from one preview to the next.", ge=1)
    validation_preview_model: str | None = key(
        None,
        "Tiny autoencoder that decodes previews (TAEHV layout, such as `taew2_1.safetensors` for 16 latent channels): "
        "a safetensors file, or `owner/name/file.safetensors` on the hub. Absent, they are a linear projection of the "
        "latents to colours, fitted on the run's own clips.",
    )


class PreviewPlugin(Plugin[PreviewConfig]):
    """Previews of validation clips while they are sampled: by a tiny autoencoder, or by fitted colours."""

    Config = PreviewConfig

    def __init__(self, name: str, config: PreviewConfig) -> None:
        super().__init__(name, config)
        self._maker: Maker | None = None

    def is_active(self, core: CoreConfig) -> bool:
        """Whether previews are wanted."""
        return self.config.validation_preview

    def warnings(self, core: CoreConfig) -> Iterator[str]:
        """The keys that do nothing while there are no previews."""
        if not self.config.validation_preview:
            defaults = {EVERY: 1, MODEL: None}
            for name in (each for each, default in defaults.items() if getattr(self.config, each) != default):
                yield f"{name} does nothing: validation_preview is off"

    @hookimpl
    def configure(self, run: Run) -> None:
        """Refuse previews where no clip is rendered, and a file that is not there or is none of ours."""
        if not self.config.validation_preview:
            return
        if fault := _renders_nothing(run):
            raise ConfigError(
                f"validation_preview shows validation clips while they are sampled, and {fault}",
                where="validation_preview",
                remedy="set validation_prompt or user_prompt_library, or leave validation_preview out",
            )
        if self.config.validation_preview_model is not None:
            from tuner_preview.source import locate

            locate(self.config.validation_preview_model)

    @hookimpl
    def check_model(self, run: Run, spec: ModelSpec) -> None:
        """Hold the autoencoder's file against the model's latents, and the interval against the sampler's steps."""
        if not self.config.validation_preview:
            return
        steps: Any = run.config.validation_num_inference_steps
        if "validation_num_inference_steps" not in run.explicit:
            steps = spec.defaults.get("validation_num_inference_steps", steps)
        if self.config.validation_preview_steps > steps and run.is_main:
            run.log.warning(
                "no preview is made: clips are sampled in %d steps, and %s is %d",
                steps,
                EVERY,
                self.config.validation_preview_steps,
            )
        if self.config.validation_preview_model is not None:
            from tuner_preview.source import locate

            place = locate(self.config.validation_preview_model)
            if place.file is not None:
                self._checked(spec, place.file)

    @hookimpl
    def model_transforms(self, run: Run, model: Model) -> Sequence[Transform]:
        """Nothing to edit. This is where a run begins: the autoencoder is fetched, before any weight is read."""
        if self.config.validation_preview and run.is_main:
            from tuner_preview.making import Maker
            from tuner_preview.source import locate

            wish = self.config.validation_preview_model
            file = None if wish is None else locate(wish).fetch()
            layout = None if file is None else self._checked(model.spec, file)
            self._maker = Maker(file, layout)
        return []

    @hookimpl
    def on_sampling_step(self, run: Run, model: Model, sampling: SamplingStep) -> None:
        """Make a preview where one is due, and tell whoever listens."""
        if self._maker is not None and sampling.step % self.config.validation_preview_steps == 0:
            last = sampling.step + self.config.validation_preview_steps > sampling.steps
            self._maker.make(run, model, sampling, last=last)

    @staticmethod
    def _checked(spec: ModelSpec, file: Any) -> Any:
        """The layout of the autoencoder in ``file``. Raises ModelError where it does not fit the model."""
        from tuner_preview.layout import check_fit, read_layout

        layout = read_layout(file)
        check_fit(layout, spec, file)
        return layout


def _renders_nothing(run: Run) -> str | None:
    """Why no validation clip is rendered; None where some are."""
    if "sampling" not in run.plugins:
        return "what renders them, the plugin sampling, is left out"
    prompts = bool(run.config.validation_prompt) or run.config.user_prompt_library is not None
    # Prompts that come with a plugin, where one has them.
    prompts |= any(getattr(each.config, "validation_prompt_library", False) for each in run.plugins.values())
    prompts |= bool(getattr(run.config, "validation_prompt_library", False))
    return None if prompts else "there is no prompt to render"
