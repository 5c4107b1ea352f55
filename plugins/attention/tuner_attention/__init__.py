"""Attention kernels beside the exact default: one plugin for each, served to the core's registry.

A kernel is switched on each attention processor of the denoiser, never for the whole process, and one
without a backward is used in validation only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig
    from tuner.run import Run


class FlexPlugin(Plugin[PluginConfig]):
    """FlexAttention of PyTorch, for validation renders; training keeps the exact kernel.

    diffusers calls it uncompiled: scores of (B, heads, S, S) are then held whole, so it suits short clips.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"model-family"})
    values: ClassVar[Mapping[str, frozenset[str]]] = {"attention_mechanism": frozenset({"flex"})}

    def is_active(self, core: CoreConfig) -> bool:
        """Only when the kernel is chosen."""
        return core.attention_mechanism == "flex"

    @hookimpl
    def attention_backends(self, run: Run) -> Mapping[str, Any]:
        """``flex``. It has no backward on the CPU, so that it never trains."""
        from tuner.attention import AttentionBackend

        return {"flex": AttentionBackend(dispatcher="flex", trains=False)}
