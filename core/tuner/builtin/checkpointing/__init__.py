"""Activation checkpointing beyond the block driver's own: ``selective`` and ``offload``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig

if TYPE_CHECKING:
    from tuner.checkpointing import Checkpointing
    from tuner.config.keys import CoreConfig
    from tuner.model import Model, Network, Transform
    from tuner.run import Run


class CheckpointingPlugin(Plugin[PluginConfig]):
    """What is kept of each block for backward beside, or instead of, its input on the device."""

    values: ClassVar[Mapping[str, frozenset[str]]] = {"gradient_checkpointing": frozenset({"selective", "offload"})}
    levers: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": "offload"},
    )

    def is_active(self, core: CoreConfig) -> bool:
        """Only for the values that the core does not serve by itself."""
        return core.checkpointing in ("selective", "offload")

    @hookimpl
    def configure(self, run: Run) -> None:
        """Say so where an interval is set and nothing is checkpointed."""
        if run.config.checkpointing == "none" and run.config.gradient_checkpointing_interval > 1:
            run.log.warning("gradient_checkpointing_interval has no effect: gradient_checkpointing is false")

    @hookimpl
    def model_transforms(self, run: Run, model: Model) -> Iterable[Transform]:
        """Put the policy on each network. They share one, and with it the host memory of offloaded inputs."""
        if not self.is_active(run.config):
            return []
        from tuner.model import Stage, Transform

        @cache
        def policy() -> Checkpointing:
            # Not before the run has its device.
            return _policy(run)

        def apply(network: Network) -> None:
            network.checkpointing = policy()

        return [
            Transform(
                stage=Stage.CHECKPOINT,
                name=f"checkpointing: {run.config.checkpointing}",
                claims=frozenset({"checkpointing"}),
                apply=apply,
            )
        ]


def _policy(run: Run) -> Checkpointing:
    from tuner.builtin.checkpointing.offload import Offload
    from tuner.builtin.checkpointing.selective import Selective

    interval = run.config.gradient_checkpointing_interval
    return Offload(run.device, interval) if run.config.checkpointing == "offload" else Selective(interval)
