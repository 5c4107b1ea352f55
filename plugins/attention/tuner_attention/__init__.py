"""Attention kernels beside the exact default: one plugin for each library, served to the core's registry.

A kernel is switched on each attention processor of the denoiser, never for the whole process, and one
without a backward is used in validation only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

from tuner.errors import ConfigError
from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig

if TYPE_CHECKING:
    from tuner.attention import AttentionBackend
    from tuner.config.keys import CoreConfig
    from tuner.run import Run


@dataclass(frozen=True)
class Needs:
    """What a value of ``attention_mechanism`` needs: a module, and how to get it."""

    module: str
    install: str
    trains: bool = True


FLASH_2 = Needs("flash_attn", "pip install flash-attn --no-build-isolation")
FLASH_3 = Needs("flash_attn_interface", "build FlashAttention 3 from the folder hopper of its repository")
HUB = Needs("kernels", "pip install kernels")
SAGE = Needs(
    "sageattention",
    "pip install sageattention (1.0.6, Triton), or build 2.1.1 or newer from its repository",
    trains=False,
)
XFORMERS = Needs("xformers", "pip install xformers")


class LibraryPlugin(Plugin[PluginConfig]):
    """A library's kernels. A subclass says which values need what, and makes the kernels of those."""

    requires: ClassVar[frozenset[str]] = frozenset({"model-family"})
    needs: ClassVar[Mapping[str, Needs]] = {}
    operators: ClassVar[tuple[str, ...]] = ()
    """The library's operators, with (B, tokens, heads, head_dim): checkpointing may keep what they give."""

    def is_active(self, core: CoreConfig) -> bool:
        """Only when one of its kernels is chosen."""
        return core.attention_mechanism in self.needs

    @hookimpl
    def configure(self, run: Run) -> None:
        """Without a CUDA device say that the exact kernel is used; with one refuse a library that is not there."""
        name = run.config.attention_mechanism
        if not self.is_active(run.config):
            return
        if not _cuda():
            run.log.warning("attention_mechanism %r needs a CUDA device: the exact kernel is used here", name)
        elif find_spec(self.needs[name].module) is None:
            raise ConfigError(
                f"attention_mechanism {name!r} needs the package {self.needs[name].module}, which is not installed",
                remedy=f"{self.needs[name].install}; or use auto, the fastest exact kernel of torch",
            )

    @hookimpl
    def attention_backends(self, run: Run) -> Mapping[str, AttentionBackend | None]:
        """The chosen kernel; its library is imported only then."""
        name = run.config.attention_mechanism
        if self.is_active(run.config):
            from tuner.checkpointing import ATTENTION_OPERATORS

            ATTENTION_OPERATORS.update(dict.fromkeys(self.operators, -3))
        return {each: self.backend(each) if each == name and _cuda() else None for each in self.needs}

    def backend(self, name: str) -> AttentionBackend:
        """The kernel ``name``, by default the dispatcher's own of that name."""
        from tuner.attention import AttentionBackend

        return AttentionBackend(dispatcher=name, trains=self.needs[name].trains)


class FlashPlugin(LibraryPlugin):
    """FlashAttention 2, 3 and 4 (arXiv:2205.14135, 2307.08691, 2407.08608): exact, training and validation."""

    operators = (
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::_flash_attn_forward",
        "flash_attn_3::fwd",
    )

    needs: ClassVar[Mapping[str, Needs]] = {
        **dict.fromkeys(("flash", "flash_varlen"), FLASH_2),
        **dict.fromkeys(("flash_3", "_flash_3", "_flash_varlen_3"), FLASH_3),
        **dict.fromkeys(
            (
                "flash_hub",
                "flash_varlen_hub",
                "flash_4_hub",
                "_flash_3_hub",
                "_flash_3_varlen_hub",
                "aiter_fa2_hub",
            ),
            HUB,
        ),
    }
    values: ClassVar[Mapping[str, frozenset[str]]] = {"attention_mechanism": frozenset(needs)}

    def backend(self, name: str) -> AttentionBackend:
        """The library's function for FlashAttention 3: diffusers' wrapper of it has no backward."""
        if self.needs[name] is not FLASH_3:
            return super().backend(name)
        from tuner.attention import AttentionBackend
        from tuner_attention.flash import flash_3

        return AttentionBackend(kernel=flash_3, trains=True)


class SagePlugin(LibraryPlugin):
    """SageAttention (arXiv:2410.02367): 8-bit queries and keys, for validation; in training if asked for."""

    needs: ClassVar[Mapping[str, Needs]] = {
        **dict.fromkeys(
            (
                "sageattention",
                "sageattention-int8-fp16-triton",
                "sageattention-int8-fp16-cuda",
                "sageattention-int8-fp8-cuda",
                "sage",
                "sage_varlen",
                "_sage_qk_int8_pv_fp16_triton",
                "_sage_qk_int8_pv_fp16_cuda",
                "_sage_qk_int8_pv_fp8_cuda",
                "_sage_qk_int8_pv_fp8_cuda_sm90",
            ),
            SAGE,
        ),
        **dict.fromkeys(("sage_hub", "sage_blackwell_hub"), Needs("kernels", HUB.install, trains=False)),
    }
    values: ClassVar[Mapping[str, frozenset[str]]] = {"attention_mechanism": frozenset(needs)}

    def backend(self, name: str) -> AttentionBackend:
        """The library's function, and beside it one with an exact, recomputed backward."""
        if self.needs[name] is not SAGE:
            return super().backend(name)
        from tuner.attention import AttentionBackend
        from tuner_attention.exact_backward import with_exact_backward
        from tuner_attention.sage import sage

        kernel = sage(name)
        return AttentionBackend(kernel=kernel, training=with_exact_backward(kernel))


class XformersPlugin(LibraryPlugin):
    """Memory-efficient attention of xFormers: exact, training and validation."""

    operators = ("xformers::efficient_attention_forward_cutlass", "xformers_flash::flash_fwd")

    needs: ClassVar[Mapping[str, Needs]] = {"xformers": XFORMERS}
    values: ClassVar[Mapping[str, frozenset[str]]] = {"attention_mechanism": frozenset(needs)}


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
    def attention_backends(self, run: Run) -> Mapping[str, AttentionBackend]:
        """``flex``. It has no backward on the CPU, so that it never trains."""
        from tuner.attention import AttentionBackend

        return {"flex": AttentionBackend(dispatcher="flex")}


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
