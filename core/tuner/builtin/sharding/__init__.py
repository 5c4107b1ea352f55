"""Sharding: each process holds a part of the network's weights (FSDP2, torch's ``fully_shard``)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from tuner.errors import ConfigError
from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig, key

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig
    from tuner.model import Model, Transform
    from tuner.run import Run

INSTEAD_OF_DEEPSPEED = (
    "fsdp_enable: true does what ZeRO 3 does, with fsdp_reshard_after_forward: false what ZeRO 2 does, and "
    "fsdp_cpu_offload: true what its offload does"
)


class ShardingConfig(PluginConfig):
    """Keys of sharding."""

    fsdp_enable: bool = key(False, "Spread the network's weights over the processes.", effect="memory")
    fsdp_version: Literal[2] = key(2, "Version of FSDP; there is only 2.")
    fsdp_reshard_after_forward: bool = key(
        True, "Let go of a block's gathered weights after its forward; false saves messages and takes memory."
    )
    fsdp_cpu_offload: bool = key(False, "Keep the parts in host memory, and the optimizer's work there.")
    fsdp_state_dict_type: Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT"] = key(
        "FULL_STATE_DICT",
        "How checkpoints hold what is spread: put together by the main process, or each process's parts in files of "
        "its own. Any number of processes can resume either.",
        effect="files",
    )
    deepspeed_config: Any = key(None, "Not supported: see `fsdp_enable`.")


class ShardingPlugin(Plugin[ShardingConfig]):
    """Spreads the network's weights over the processes, block by block (torch's fully_shard, FSDP2)."""

    Config = ShardingConfig

    def is_active(self, core: CoreConfig) -> bool:
        """Whether there is something to spread, and something to spread it over."""
        from tuner import processes

        return self.config.fsdp_enable and processes.launched()[1] > 1

    @hookimpl
    def configure(self, run: Run) -> None:
        """Refuse what cannot be had together; say where nothing is spread."""
        if self.config.deepspeed_config is not None:
            raise ConfigError(
                "deepspeed_config is given, and tuner shards by FSDP2",
                where="deepspeed_config",
                remedy=f"leave it out: {INSTEAD_OF_DEEPSPEED}",
            )
        if not self.config.fsdp_enable:
            return
        if not self.is_active(run.config):
            run.log.warning("fsdp_enable does nothing: this run is one process")
            return
        precision = run.config.base_model_precision
        if precision != "no_change":
            raise ConfigError(
                f"fsdp_enable and base_model_precision {precision!r} do not go together: a quantised weight is made of "
                "several tensors, which cannot be cut alike",
                remedy="leave one of them out",
            )

    @hookimpl
    def model_transforms(self, run: Run, model: Model) -> Iterable[Transform]:
        """Spread each network once everything is attached to it."""
        if not self.is_active(run.config):
            return []
        from tuner.builtin.sharding.shard import HostSink, shard
        from tuner.model import Stage, Transform

        keys = self.config
        return [
            Transform(
                stage=Stage.PLACE,
                name="sharding",
                claims=frozenset({"placement"}),
                apply=lambda network: shard(
                    network,
                    run.device,
                    keys.fsdp_reshard_after_forward,
                    cpu_offload=keys.fsdp_cpu_offload,
                    saves_parts=keys.fsdp_state_dict_type == "SHARDED_STATE_DICT",
                ),
                sink=lambda network: HostSink(),
            )
        ]
