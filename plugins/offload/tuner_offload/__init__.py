"""Group offload: a frozen base lives in host memory and streams through the device, a few blocks at a time.

Nothing is ever copied back, since nothing frozen changes: half the traffic of swapping. What is trained
never moves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from tuner.errors import ConfigError, ConfigErrors
from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig, key

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig
    from tuner.model import Model, Transform
    from tuner.run import Run
    from tuner.spec import ModelSpec

RING_GROUPS = 2
"""Groups on the device at any time: the one that computes and the one being copied."""


class OffloadConfig(PluginConfig):
    """Where the frozen weights live."""

    enable_group_offload: bool = key(
        False,
        "Keep the frozen blocks in host memory (pinned on CUDA) and stream them through the device, "
        "two groups of blocks at a time.",
        effect="memory",
    )
    group_offload_type: Literal["block_level", "leaf_level"] = key(
        "block_level", "What moves at a time. `block_level`: groups of whole blocks."
    )
    group_offload_blocks_per_group: int = key(1, "Blocks that move together.", ge=1)
    group_offload_use_stream: bool = key(
        False, "Copy the next group on a CUDA stream of its own while the current one computes."
    )
    group_offload_to_disk_path: str | None = key(None, "Folder to offload to instead of host memory.")
    enable_model_cpu_offload: bool = key(False, "Move whole models between host and device by phase.", effect="memory")


class OffloadPlugin(Plugin[OffloadConfig]):
    """Stream a frozen base through the device in groups of blocks."""

    requires: ClassVar[frozenset[str]] = frozenset({"model-family"})
    Config = OffloadConfig

    def is_active(self, core: CoreConfig) -> bool:
        """Only when an offload is switched on."""
        return self.config.enable_group_offload or self.config.enable_model_cpu_offload

    @hookimpl
    def configure(self, run: Run) -> None:
        """Refuse what does not go together, and what is not built yet."""
        faults = [*self._kind_faults(), *(self._group_faults(run.config) if self.config.enable_group_offload else ())]
        if faults:
            raise faults[0] if len(faults) == 1 else ConfigErrors(faults)

    def _kind_faults(self) -> Iterable[ConfigError]:
        """What is wrong with the choice of offload."""
        if not self.config.enable_model_cpu_offload:
            return
        if self.config.enable_group_offload:
            yield ConfigError(
                "enable_model_cpu_offload and enable_group_offload exclude each other",
                remedy="keep enable_group_offload: it needs the least device memory in training",
            )
        else:
            yield ConfigError(
                "enable_model_cpu_offload is not built yet",
                remedy="use enable_group_offload; encoders and denoiser are never loaded together anyway",
            )

    def _group_faults(self, core: CoreConfig) -> Iterable[ConfigError]:
        """What keeps group offload from running with these keys."""
        where = "enable_group_offload: true"
        if self.config.group_offload_type == "leaf_level":
            yield ConfigError("group_offload_type leaf_level is not built yet", where=where, allowed="block_level")
        if self.config.group_offload_to_disk_path is not None:
            yield ConfigError(
                "group_offload_to_disk_path is not built yet",
                where=where,
                remedy="leave it out: groups are then offloaded to host memory",
            )
        if not core.gradient_checkpointing:
            yield ConfigError(
                "group offload needs gradient_checkpointing: without it backward keeps all weights on the device",
                where=where,
                remedy="set gradient_checkpointing to true",
            )
        if core.model_type == "full":
            yield ConfigError(
                "group offload streams a frozen base, and `model_type: full` trains it",
                where=where,
                remedy="use `model_type: lora`, or leave enable_group_offload out",
            )
        if core.base_model_precision != "no_change":
            yield ConfigError(
                f"group offload of a quantised base ({core.base_model_precision}) is not built yet",
                where=where,
                remedy="use one of the two",
            )

    @hookimpl
    def check_model(self, run: Run, spec: ModelSpec) -> None:
        """Refuse groups so large that the ring would hold the whole network."""
        if not self.config.enable_group_offload:
            return
        size = self.config.group_offload_blocks_per_group
        for network in spec.networks:
            largest = (network.blocks - 1) // RING_GROUPS
            if size > largest:
                raise ConfigError(
                    f"group_offload_blocks_per_group {size} would keep all {network.blocks} blocks of network "
                    f"{network.name!r} on the device: {RING_GROUPS} groups are there at any time",
                    allowed=f"1 to {largest}" if largest else f"nothing: offload needs more than {RING_GROUPS} blocks",
                    remedy="make the groups smaller, or leave enable_group_offload out",
                )

    @hookimpl
    def model_transforms(self, run: Run, model: Model) -> Iterable[Transform]:
        """The placement of every network's blocks, when group offload is on."""
        if not self.config.enable_group_offload:
            return []
        from tuner_offload.placement import group_offload

        return [
            group_offload(
                run,
                blocks_per_group=self.config.group_offload_blocks_per_group,
                ring_groups=RING_GROUPS,
                use_stream=self.config.group_offload_use_stream,
            )
        ]
