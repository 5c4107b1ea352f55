"""Training the network itself: every floating-point parameter."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.config.warnings import unused
from tuner.errors import ConfigError
from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig
    from tuner.model import Model, Transform
    from tuner.run import Run


class FullPlugin(Plugin[PluginConfig]):
    """Full-rank training: every weight of the network itself."""

    def is_active(self, core: CoreConfig) -> bool:
        """Whether this run trains the network itself."""
        return core.model_type == "full"

    @hookimpl
    def configure(self, run: Run) -> None:
        """Refuse a quantised base, and say what bf16 weights mean."""
        core = run.config
        if not self.is_active(core):
            return
        if core.base_model_precision != "no_change":
            raise ConfigError(
                f"base_model_precision {core.base_model_precision!r} cannot be trained: model_type is 'full'",
                remedy="leave base_model_precision out, or train a LoRA (model_type: lora)",
            )
        lora = run.plugins.get("lora")
        for line in unused(lora.config, "model_type is full") if lora is not None else ():
            run.log.warning("%s", line)
        if core.mixed_precision == "bf16" and core.base_model_default_dtype != "fp32":
            run.log.warning(
                "model_type full trains bf16 weights in place, where small updates round to nothing; "
                "set base_model_default_dtype: fp32 if they fit"
            )

    @hookimpl
    def model_transforms(self, run: Run, model: Model) -> Iterable[Transform]:
        """Make every floating-point parameter trainable."""
        if not self.is_active(run.config):
            return []
        from tuner.builtin.full.adapter import attach
        from tuner.model import Stage, Transform

        return [
            Transform(stage=Stage.ADAPT, name=self.name, claims=frozenset({"adapter", "base_weights"}), apply=attach)
        ]

    @hookimpl
    def save(self, run: Run, model: Model, directory: Path) -> Iterable[Path]:
        """Write each network's weights in the layout that ``from_pretrained`` reads."""
        if not self.is_active(run.config):
            return []
        from tuner.builtin.full.adapter import export

        return [
            path
            for network in model.networks.values()
            for path in export(network, directory / network.name if run.is_main else None)
        ]
