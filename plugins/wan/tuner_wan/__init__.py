"""The Wan family: what the core asks of a model family, answered in the modules beside this one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tuner import Plugin, PluginConfig, hookimpl, key

if TYPE_CHECKING:
    from tuner.data.samples import Prepared
    from tuner.model import Batch, EncodeBatch, Encoded, Loss, Model, Transform
    from tuner.run import Run
    from tuner.spec import ModelSpec
    from tuner.workload import Workload

MASKS = ("mask", "segmentation")
"""Roles of files that weigh the loss."""


LEAN_TRAFFIC = 1.21
"""Elementwise traffic of lean blocks beside that of plain ones, LoRA r16, checkpointed, as `make bench` counts it."""


class WanConfig(PluginConfig):
    """Keys of the Wan family beside the core's own."""

    pretrained_transformer_2_model_name_or_path: str | None = key(
        None, "Take the low-noise expert from here instead: a folder, a hub repository or a single `.safetensors` file."
    )
    wan_force_2_1_time_embedding: bool = key(
        False, "Give the network one time per clip where Wan 2.2 5B would give one per token."
    )
    wan_validation_load_other_stage: bool = key(
        False, "Validate with both experts of Wan 2.2, the one that is not trained as it comes."
    )
    wan_expert_switch_steps: int = key(
        100, "Flavours `…-both`: optimizer steps that one expert is trained before the other's turn.", ge=1
    )
    wan_lean_blocks: bool = key(
        False,
        "Compute norms, modulation and gates of each block in pieces, and again in backward, instead of keeping "
        "float32 copies of all tokens: a third to a half less for the block at work, for some per cent of time.",
        effect="memory",
    )
    wan_condition: Literal["first_frame", "none"] = key(
        "first_frame", "`ti2v-5b-2.2`: continue the clip's first frame, or train from text alone (`none`)."
    )


class WanPlugin(Plugin[WanConfig]):
    """Wan 2.1 and 2.2: text to video, image to video, both experts."""

    provides = frozenset({"model-family"})
    levers: ClassVar[tuple[Mapping[str, Any], ...]] = ({"wan_lean_blocks": True},)
    Config = WanConfig

    @hookimpl
    def configure(self, run: Run) -> None:
        """Say so where blocks cannot keep less."""
        if self.config.wan_lean_blocks and not self._keeps_less(run):
            run.log.warning("wan_lean_blocks has no effect with model_type: full: what it leaves out is needed there")

    @hookimpl
    def estimate(self, run: Run, spec: ModelSpec, workload: Workload) -> Mapping[str, Any]:
        """What blocks hold and move that keep less."""
        from tuner_wan.costs import lean

        return {"activations": lean, "traffic": LEAN_TRAFFIC} if self._keeps_less(run) else {}

    @hookimpl
    def describe_model(self, run: Run) -> ModelSpec:
        """From config.json files, or from the table of flavours."""
        from tuner_wan.describe import describe

        return describe(run.config, self.config)

    @hookimpl
    def known_models(self, run: Run) -> Iterable[ModelSpec]:
        """Every flavour."""
        from tuner_wan.describe import known

        return known(run.config)

    @hookimpl
    def check_model(self, run: Run, spec: ModelSpec) -> None:
        """Say what spoils clips, and which keys are for the one flavour whose first frame may go in without noise."""
        from tuner_wan.flavours import FLAVOURS
        from tuner_wan.sampling_advice import advice

        pair = len(spec.networks) > 1 or (spec.boundary is not None and self.config.wan_validation_load_other_stage)
        for line in advice(run, spec, pair=pair) if run.is_main else ():
            run.log.warning("%s", line)
        if not run.is_main or FLAVOURS[spec.flavour].condition == "clean_first_frame":
            return
        if self.config.wan_force_2_1_time_embedding:
            run.log.warning("wan_force_2_1_time_embedding does nothing: %s has one time per clip anyway", spec.flavour)
        if self.config.wan_condition == "none":
            run.log.warning("wan_condition does nothing: it is a choice that %s does not have", spec.flavour)

    @hookimpl
    def data_ready(self, run: Run, spec: ModelSpec, data: Prepared) -> None:
        """Look at pictures among clips of an image-to-video model, and warn of masked loss.

        People who tried masked loss on Wan found it to do harm.
        """
        from tuner_wan.pictures import check_pictures

        for line in check_pictures(spec, data) if run.is_main else ():
            run.log.warning("%s", line)
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

        return load(run, self.config)

    @hookimpl
    def model_transforms(self, run: Run, model: Model) -> Iterable[Transform]:
        """Blocks that keep less, where their own weights are frozen."""
        if not self._keeps_less(run):
            return []
        from tuner_wan.lean import transform

        return [transform()]

    def _keeps_less(self, run: Run) -> bool:
        return self.config.wan_lean_blocks and run.config.model_type != "full"

    @hookimpl
    def encode_batch(self, model: Model, batch: EncodeBatch) -> Encoded:
        """Captions by UMT5, clips by the VAE."""
        from tuner_wan.encode import encode

        return encode(model, batch)

    @hookimpl
    def compute_loss(self, run: Run, model: Model, batch: Batch) -> Loss:
        """The flow-matching loss of one micro-batch."""
        from dataclasses import replace

        from tuner import flow
        from tuner_wan.conditions import loss_mask

        return flow.loss(run.config, model.predict(batch), replace(batch, mask=loss_mask(model.spec, batch)))
