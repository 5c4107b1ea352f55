"""The Wan family: what the core asks of a model family, answered in the modules beside this one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner import Plugin, PluginConfig, hookimpl

if TYPE_CHECKING:
    from tuner.data.samples import Prepared
    from tuner.model import Batch, EncodeBatch, Encoded, Loss, Model
    from tuner.run import Run
    from tuner.spec import ModelSpec

MASKS = ("mask", "segmentation")
"""Roles of files that weigh the loss."""


class WanConfig(PluginConfig):
    """Keys of the Wan family: none beside the core's own."""


class WanPlugin(Plugin[WanConfig]):
    """Wan 2.1 text to video, 1.3B and 14B, in the diffusers layout."""

    provides = frozenset({"model-family"})
    Config = WanConfig

    @hookimpl
    def describe_model(self, run: Run) -> ModelSpec:
        """From config.json files, or from the table of flavours."""
        from tuner_wan.describe import describe

        return describe(run.config)

    @hookimpl
    def data_ready(self, run: Run, data: Prepared) -> None:
        """Warn of masked loss, which people who tried it on Wan found to do harm."""
        masked = sum(any(sample.companion(role) for role in MASKS) for sample in data.samples)
        if masked and run.is_main:
            run.log.warning(
                "%d of %d samples have a mask: people who trained Wan with masked loss found it harmful; "
                "compare with a run without conditioning_data",
                masked,
                len(data.samples),
            )

    @hookimpl
    def load_model(self, run: Run) -> Model:
        """Fetch what is missing and build the denoiser without storage."""
        from tuner_wan.loading import load

        return load(run)

    @hookimpl
    def encode_batch(self, model: Model, batch: EncodeBatch) -> Encoded:
        """Captions by UMT5, clips by the VAE."""
        from tuner_wan.encode import encode

        return encode(model, batch)

    @hookimpl
    def compute_loss(self, run: Run, model: Model, batch: Batch) -> Loss:
        """The flow-matching loss of one micro-batch."""
        from tuner import flow

        return flow.loss(run.config, model.predict(batch), batch)
