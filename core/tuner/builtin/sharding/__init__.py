"""Sharding: each process holds a part of the network's weights (FSDP2, torch's ``fully_shard``)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from tuner import processes
from tuner.config.warnings import unused
from tuner.errors import ConfigError
from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig, key

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig
    from tuner.model import Model, Transform
    from tuner.run import Run
    from tuner.spec import ModelSpec
    from tuner.workload import Workload

GATHERED = 2
"""Blocks that are whole at any time: the one at work, and the one that is fetched meanwhile."""
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
        return self.config.fsdp_enable and processes.launched()[1] > 1

    def warnings(self, core: CoreConfig) -> Iterator[str]:
        """Settings of a run that spreads nothing."""
        if not self.config.fsdp_enable:
            yield from unused(self.config, "fsdp_enable is false", "fsdp_")
        elif processes.launched()[1] == 1:
            yield "fsdp_enable does nothing: this run is one process"
        elif core.model_type != "full":
            yield from unused(self.config, "what an adapter trains is not spread", "fsdp_state_dict_type")

    @hookimpl
    def configure(self, run: Run) -> None:
        """Refuse what cannot be had together."""
        refuse_other_launchers(self.config.deepspeed_config)
        if not self.is_active(run.config):
            return
        precision = run.config.base_model_precision
        if precision != "no_change":
            raise ConfigError(
                f"fsdp_enable and base_model_precision {precision!r} do not go together: a quantised weight is made of "
                "several tensors, which cannot be cut alike",
                remedy="leave one of them out: of a base that is spread each process holds only its part, and of a "
                "quantised one all",
            )
        sampling = run.plugins.get("scheduled_sampling")
        if sampling is not None and sampling.is_active(run.config):
            raise ConfigError(
                "fsdp_enable and scheduled sampling do not go together: each forward of a network that is spread needs "
                "every process, and their rollouts differ in length",
                remedy="leave scheduled_sampling_max_step_offset out, or fsdp_enable",
            )
        offload = run.plugins.get("offload")
        if offload is not None and getattr(offload.config, "enable_group_offload", False):
            raise ConfigError(
                "fsdp_enable and enable_group_offload both say where the blocks' weights are",
                remedy="leave enable_group_offload out; fsdp_cpu_offload: true keeps the parts in host memory",
            )

    @hookimpl
    def check_model(self, run: Run, spec: ModelSpec) -> None:
        """Refuse an optimizer that cannot step parts of tensors, where it would have to."""
        name = run.config.optimizer
        choice = run.optimizers.get(name) or run.optimizers.get(name.lower())
        if not self.is_active(run.config) or run.config.model_type != "full" or choice is None or choice.steps_shards:
            return
        raise ConfigError(
            f"optimizer {name!r} cannot step weights that are spread over the processes (fsdp_enable, model_type full)",
            allowed=sorted(each for each, other in run.optimizers.items() if other.steps_shards),
            remedy="of those with 8-bit state the ao- ones can, such as ao-adamw8bit",
        )

    @hookimpl
    def estimate(self, run: Run, spec: ModelSpec, workload: Workload) -> Mapping[str, Any]:
        """The part that each process holds, and what it gathers."""
        if not self.is_active(run.config):
            return {}
        return {
            "shards": run.process_count,
            "gathered_blocks": GATHERED if self.config.fsdp_reshard_after_forward else None,
            "parts_on_host": self.config.fsdp_cpu_offload,
        }

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


def refuse_other_launchers(deepspeed_config: Any) -> None:
    """Raise ConfigError where DeepSpeed or Accelerate's own FSDP is asked for, by key or by the launcher's settings."""
    asked = {
        "deepspeed_config": deepspeed_config is not None,
        "ACCELERATE_USE_DEEPSPEED (a deepspeed_config of `accelerate launch`)": _says("ACCELERATE_USE_DEEPSPEED"),
        "ACCELERATE_USE_FSDP (an fsdp_config of `accelerate launch`)": _says("ACCELERATE_USE_FSDP"),
    }
    for where in [name for name, is_asked in asked.items() if is_asked]:
        engine = "Accelerate's FSDP" if "FSDP" in where else "DeepSpeed"
        raise ConfigError(
            f"{engine} is asked for, and tuner shards by keys of its own (FSDP2)",
            where=where,
            remedy=f"leave it out: {INSTEAD_OF_DEEPSPEED}",
        )


def _says(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")
