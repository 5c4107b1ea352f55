"""The LTX-Video family: what tuner asks of a model family, answered in the modules beside this one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner import Plugin, PluginConfig, hookimpl, key

if TYPE_CHECKING:
    from tuner.model import Batch, EncodeBatch, Encoded, Loss, Model
    from tuner.run import Run
    from tuner.spec import ModelSpec

UNUSED = (
    "model_flavour",
    "pretrained_transformer_model_name_or_path",
    "pretrained_transformer_subfolder",
    "pretrained_vae_model_name_or_path",
    "pretrained_t5_model_name_or_path",
)
"""Core keys that this family has no use for."""


class LtxConfig(PluginConfig):
    """Keys of the LTX-Video family."""

    ltx_frame_rate: float = key(
        25.0, "Frames per second that the model is told its clips have, in training and when it renders.", gt=0
    )


class LtxPlugin(Plugin[LtxConfig]):
    """LTX-Video: text to video."""

    provides = frozenset({"model-family"})
    Config = LtxConfig

    @hookimpl
    def describe_model(self, run: Run) -> ModelSpec:
        """From the config.json files of the transformer and the VAE."""
        from tuner_ltx.describe import describe

        return describe(run.config, self.config.ltx_frame_rate)

    @hookimpl
    def check_model(self, run: Run, spec: ModelSpec) -> None:
        """Refuse samplers that cannot render it, and say which of the keys that were set do nothing here."""
        from tuner_ltx.describe import check_sampler

        if "validation_noise_scheduler" in run.explicit:
            check_sampler(run.config.validation_noise_scheduler)
        for name in UNUSED:
            if run.is_main and name in run.explicit:
                run.log.warning("%s does nothing: LTX-Video is one folder or repository", name)

    @hookimpl
    def load_model(self, run: Run) -> Model:
        """Fetch what is missing and build the transformer without storage."""
        from tuner_ltx.loading import load

        return load(run, self.config.ltx_frame_rate)

    @hookimpl
    def encode_batch(self, model: Model, batch: EncodeBatch) -> Encoded:
        """Captions by T5, clips by the VAE."""
        from tuner_ltx.encode import encode

        return encode(model, batch)

    @hookimpl
    def compute_loss(self, run: Run, model: Model, batch: Batch) -> Loss:
        """The flow-matching loss of one micro-batch."""
        from tuner import flow

        return flow.loss(run.config, model.predict(batch), batch)
