"""Group offload: the blocks' weights live in host memory and stream through the device, a few at a time.

A frozen base is never copied back, since it does not change: half the traffic of swapping. Where the base itself
is trained, its gradients go to the host, and the optimizer works there.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tuner.config.warnings import unused
from tuner.errors import ConfigError, ConfigErrors
from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig, key

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig
    from tuner.data.order import Order
    from tuner.data.samples import Prepared
    from tuner.model import Model, Transform
    from tuner.run import Run
    from tuner.spec import ModelSpec
    from tuner.workload import Workload


class OffloadConfig(PluginConfig):
    """Where the weights live."""

    enable_group_offload: bool = key(
        False,
        "Keep the blocks' weights in host memory (pinned on CUDA) and stream them through the device, "
        "two groups of blocks at a time. With `model_type: full` gradients and optimizer live on the host too.",
        effect="memory",
    )
    group_offload_type: Literal["block_level", "leaf_level"] = key(
        "block_level",
        "What moves at a time. `block_level`: groups of whole blocks. `leaf_level`: each Linear layer by itself; less "
        "memory, half as much traffic again, and it works without gradient_checkpointing too.",
    )
    group_offload_blocks_per_group: int = key(1, "Blocks that move together.", ge=1)
    group_offload_use_stream: bool = key(
        False,
        "Copy the next group on a CUDA stream of its own while the current one computes. Recommended on CUDA: without "
        "it the device waits for every copy.",
    )
    group_offload_resident_blocks: int | None = key(
        None,
        "Blocks that stay on the device for good, spread evenly over the network; the others stream. None: 0. "
        "Each one makes the traffic less and the memory more by one block.",
        ge=0,
    )
    group_offload_to_disk_path: Path | None = key(
        None,
        "Folder of files that stand in for host memory: the weights are read from there (and from the base's own files "
        "where these hold them as they are needed) each time they are copied.",
    )
    enable_model_cpu_offload: bool = key(
        False,
        "Move the frozen denoiser to the host for as long as validation decodes or encodes, and back. "
        "Excludes group offload.",
        effect="memory",
    )
    text_encoder_offload: bool = key(
        False,
        "Stream the text encoder's blocks through the device while captions are encoded: two of them are there at any "
        "time, the table of words stays on the host.",
        effect="memory",
    )


class OffloadPlugin(Plugin[OffloadConfig]):
    """Stream the blocks' weights through the device, a few at a time."""

    requires: ClassVar[frozenset[str]] = frozenset({"model-family"})
    levers: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"enable_group_offload": True, "group_offload_use_stream": True},
        {"text_encoder_offload": True},
        {"enable_model_cpu_offload": True},
    )
    Config = OffloadConfig

    def is_active(self, core: CoreConfig) -> bool:
        """Only when an offload is switched on."""
        config = self.config
        return config.enable_group_offload or config.enable_model_cpu_offload or config.text_encoder_offload

    def warnings(self, core: CoreConfig) -> Iterable[str]:
        """Settings of a group offload that is off."""
        if not self.config.enable_group_offload:
            yield from unused(self.config, "enable_group_offload is false", "group_offload_")

    @hookimpl
    def configure(self, run: Run) -> None:
        """Refuse what does not go together, and what is not built yet."""
        faults = [
            *self._kind_faults(run),
            *(self._group_faults(run.config) if self.config.enable_group_offload else ()),
        ]
        if faults:
            raise faults[0] if len(faults) == 1 else ConfigErrors(faults)

    def _kind_faults(self, run: Run) -> Iterable[ConfigError]:
        """What is wrong with the choice of offload."""
        if self.config.enable_model_cpu_offload and self.config.enable_group_offload:
            yield ConfigError(
                "enable_model_cpu_offload and enable_group_offload exclude each other",
                remedy="keep enable_group_offload: it needs the least device memory in training",
            )
        elif self.config.enable_model_cpu_offload and run.config.model_type == "full":
            run.log.warning("enable_model_cpu_offload moves frozen weights; those that are trained stay on the device")

    def _group_faults(self, core: CoreConfig) -> Iterable[ConfigError]:
        """What keeps group offload from running with these keys."""
        where = "enable_group_offload: true"
        folder = self.config.group_offload_to_disk_path
        if folder is not None and folder.expanduser().exists() and not folder.expanduser().is_dir():
            yield ConfigError("this is not a folder", where=f"group_offload_to_disk_path: {folder}")
        frozen = ["group_offload_type: leaf_level"] if self._by_leaf else []
        frozen += [f"group_offload_to_disk_path: {folder}"] if folder is not None else []
        if core.model_type == "full" and frozen:
            yield ConfigError(
                "this is for a frozen base, and `model_type: full` trains it",
                where=" and ".join(frozen),
                remedy="leave this out: groups of blocks are then offloaded to host memory",
            )
        if self._by_leaf:
            return  # a layer's backward brings its weights itself
        if core.checkpointing == "none":
            yield ConfigError(
                "group offload needs gradient_checkpointing: without it backward keeps all weights on the device",
                where=where,
                remedy="set gradient_checkpointing to true",
            )
        elif core.gradient_checkpointing_interval > 1:
            yield ConfigError(
                "group offload needs every block checkpointed, and gradient_checkpointing_interval is "
                f"{core.gradient_checkpointing_interval}: backward keeps the weights of the others on the device",
                where=where,
                remedy="leave gradient_checkpointing_interval out, or leave enable_group_offload out",
            )

    @hookimpl
    def check_model(self, run: Run, spec: ModelSpec) -> None:
        """Refuse groups so large that the ring would hold the whole network."""
        if not self.config.enable_group_offload:
            return
        from tuner_offload.schedule import RING_GROUPS

        size, resident = self.config.group_offload_blocks_per_group, self._resident
        if self._by_leaf and run.is_main and "group_offload_blocks_per_group" in run.explicit:
            run.log.warning("group_offload_blocks_per_group does nothing: leaf_level moves layer by layer")
        for network in spec.networks:
            if self._by_leaf and resident < network.blocks:
                continue
            if resident + RING_GROUPS * size >= network.blocks:
                kept = f" and {resident} resident blocks" if resident else ""
                largest = (network.blocks - resident - 1) // RING_GROUPS
                raise ConfigError(
                    f"group_offload_blocks_per_group {size}{kept} would keep all {network.blocks} blocks of network "
                    f"{network.name!r} on the device: {RING_GROUPS} groups are there at any time",
                    allowed=f"1 to {largest}" if largest > 0 else "nothing: too few blocks are left to stream",
                    remedy="make the groups smaller, keep fewer blocks resident, or leave enable_group_offload out",
                )

    @property
    def _by_leaf(self) -> bool:
        return self.config.group_offload_type == "leaf_level"

    @property
    def _resident(self) -> int:
        return self.config.group_offload_resident_blocks or 0

    @hookimpl
    def data_ready(self, run: Run, spec: ModelSpec, data: Prepared, plan: Order) -> None:
        """Refuse weights that the host has no room for."""
        if self.config.enable_group_offload and self.config.group_offload_to_disk_path is None:
            from tuner_offload.room import check_room

            check_room(run, spec, data, self._resident)

    @hookimpl
    def estimate(self, run: Run, spec: ModelSpec, workload: Workload) -> Mapping[str, Any]:
        """The blocks that are on the device at any time, where the others wait, and what else does."""
        encoders = spec.encoders.get("text", ()) if self.config.text_encoder_offload else ()
        denoiser = ("network",) if self.config.enable_model_cpu_offload else ()
        waiting = {"waiting": frozenset((*encoders, *denoiser))}
        if not self.config.enable_group_offload:
            return waiting
        from tuner_offload.schedule import leaf_ring_blocks, resident_at_any_time

        size, network = self.config.group_offload_blocks_per_group, workload.network
        if self._by_leaf:
            resident = self._resident + leaf_ring_blocks([each.inputs * each.outputs for each in network.matrices])
        else:
            resident = resident_at_any_time(network.blocks, self._resident, size)
        return {
            **waiting,
            "resident_blocks": resident,
            "offloaded_to": "host" if self.config.group_offload_to_disk_path is None else "disk",
        }

    @hookimpl(wrapper=True)
    def load_model(self, run: Run) -> Generator[None, Model, Model]:
        """Surround the phases of encoders and decoders, where they stream or the denoiser makes room for them."""
        model = yield
        if self.config.text_encoder_offload:
            from tuner_offload.encoders import stream_text_encoders

            stream_text_encoders(run, model)
        if self.config.enable_model_cpu_offload:
            from tuner_offload.by_phase import take_turns

            take_turns(run, model)
        return model

    @hookimpl
    def model_transforms(self, run: Run, model: Model) -> Iterable[Transform]:
        """The placement of every network's blocks, when group offload is on."""
        if not self.config.enable_group_offload:
            return []
        from tuner_offload.disk import DiskStore
        from tuner_offload.placement import group_offload

        folder = self.config.group_offload_to_disk_path
        return [
            group_offload(
                run,
                blocks_per_group=self.config.group_offload_blocks_per_group,
                use_stream=self.config.group_offload_use_stream,
                resident=self._resident,
                by_leaf=self._by_leaf,
                disk=None if folder is None else DiskStore(folder.expanduser()),
            )
        ]
