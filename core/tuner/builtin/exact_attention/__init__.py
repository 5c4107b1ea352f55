"""The exact attention kernels of torch, and which of them is the fastest here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig

if TYPE_CHECKING:
    from tuner.attention import AttentionBackend
    from tuner.run import Run

CUDA_ONLY = ("_native_cudnn", "_native_flash")
ANYWHERE = ("native", "_native_efficient", "_native_math")
"""Names that diffusers' dispatcher has for the kernels of torch; ``native`` is torch's own choice among them."""


class ExactAttentionPlugin(Plugin[PluginConfig]):
    """Torch's exact attention kernels; by default the fastest one, measured once for each device."""

    values: ClassVar[Mapping[str, frozenset[str]]] = {"attention_mechanism": frozenset({*CUDA_ONLY, *ANYWHERE})}

    @hookimpl
    def configure(self, run: Run) -> None:
        """Say so where a kernel of CUDA devices is named on a machine without one."""
        name = run.config.attention_mechanism
        if name in CUDA_ONLY and not _cuda():
            run.log.warning("attention_mechanism %r needs a CUDA device: torch's own choice is used here", name)

    @hookimpl
    def attention_backends(self, run: Run) -> Mapping[str, AttentionBackend | None]:
        """Every exact kernel by name, and under ``auto`` the fastest."""
        from tuner.attention import EXACT, AttentionBackend
        from tuner.builtin.exact_attention.measure import best

        usable = {name: AttentionBackend(dispatcher=name, trains=True) for name in (*CUDA_ONLY, *ANYWHERE)}
        if not _cuda():
            return {**usable, **dict.fromkeys(CUDA_ONLY), EXACT: None}
        name = best(run, [*CUDA_ONLY, "native"])
        return {**usable, EXACT: usable.get(name or "")}


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
