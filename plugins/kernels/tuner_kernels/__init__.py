"""Blocks of Wan in few operations: fused norms, rotary turns, gates and LoRA, forward and backward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tuner import Plugin, PluginConfig, hookimpl, key
from tuner.errors import ConfigError

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig
    from tuner.model import Model, Transform
    from tuner.run import Run
    from tuner.spec import ModelSpec
    from tuner.workload import Workload
    from tuner_kernels.costs import Apart

OTHER_BLOCKS = "wan_lean_blocks"
"""A key of the Wan family that rewrites the same blocks."""


WITH_TRITON, IN_PLAIN_TORCH = 0.15, 0.45
"""Elementwise traffic beside that of plain blocks, LoRA r16, checkpointed, as `make bench` counts it."""
LORA_APART = ("lora_dropout", "use_dora")
"""Keys with which LoRA is more than two matrices, and left to its own modules."""
LAYER_BY_LAYER = {"enable_group_offload": True, "group_offload_type": "leaf_level"}
"""Keys with which every matrix moves by itself, and is multiplied by its own module."""


class KernelsConfig(PluginConfig):
    """The keys of this plugin."""

    fused_blocks: bool = key(
        False,
        "Compute what is between matrices and attention in one pass each, forward and backward, and LoRA with its "
        "matrix: the same mathematics with less than half the memory traffic. Triton kernels on a GPU, torch's own "
        "operations elsewhere.",
        effect="memory",
    )


class KernelsPlugin(Plugin[KernelsConfig]):
    """Fused norms, rotary turns, gates and LoRA for the blocks of Wan, forward and backward."""

    requires = frozenset({"model-family"})
    Config = KernelsConfig

    def is_active(self, core: CoreConfig) -> bool:
        """Only when switched on, and something else than the blocks' own weights is trained."""
        return self.config.fused_blocks and core.model_type != "full"

    @hookimpl
    def configure(self, run: Run) -> None:
        """Refuse a second way to compute the same blocks; say where there is nothing to be had. Raises ConfigError."""
        if not self.config.fused_blocks:
            return
        if any(getattr(plugin.config, OTHER_BLOCKS, False) for plugin in run.plugins.values()):
            raise ConfigError(
                f"fused_blocks and {OTHER_BLOCKS} are two ways to compute the same blocks",
                where="fused_blocks",
                remedy=f"leave {OTHER_BLOCKS} out: fused blocks keep as little",
            )
        if not self.is_active(run.config):
            run.log.warning(
                "fused_blocks has no effect with model_type: full: gradients of all weights are wanted there"
            )

    @hookimpl
    def estimate(self, run: Run, spec: ModelSpec, workload: Workload) -> Mapping[str, Any]:
        """Blocks hold less, compute less again, and move less."""
        if not self.is_active(run.config):
            return {}
        from tuner_kernels import costs

        if not costs.is_of_wan(workload.network):
            return {}
        kernels = find_spec("triton") is not None
        return {
            "activations": partial(costs.activations, kernels=kernels, apart=_apart(run)),
            "traffic": WITH_TRITON if kernels else IN_PLAIN_TORCH,
        }

    @hookimpl
    def model_transforms(self, run: Run, model: Model) -> Iterable[Transform]:
        """Rewrite the blocks of every network that has Wan's."""
        if not self.is_active(run.config):
            return []
        from tuner_kernels.block import is_known, transform

        unknown = [name for name, each in model.networks.items() if not all(map(is_known, each.stack.blocks))]
        if unknown and run.is_main:
            run.log.warning("fused_blocks has no effect on %s: its blocks are not those of Wan", ", ".join(unknown))
        return [transform(frozenset(model.networks) - set(unknown))]


def _apart(run: Run) -> Apart:
    """What keys of other plugins leave to its own modules."""
    configs = [plugin.config for plugin in run.plugins.values()]
    if any(all(getattr(each, name, None) == value for name, value in LAYER_BY_LAYER.items()) for each in configs):
        return "matrices"
    return "lora" if any(getattr(each, name, False) for each in configs for name in LORA_APART) else "nothing"
