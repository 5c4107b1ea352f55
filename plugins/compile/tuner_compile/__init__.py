"""``torch.compile`` for the blocks of the denoiser, each compiled once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from tuner import Plugin, PluginConfig, hookimpl, key
from tuner.errors import ConfigError, nearest

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig
    from tuner.model import Model, Transform
    from tuner.run import Run

REWRITES = ("fused_blocks", "wan_lean_blocks")
"""Keys of other plugins that rewrite blocks by hand."""
OFF = ("no", "none")


class CompileConfig(PluginConfig):
    """The keys of compilation."""

    dynamo_backend: str = key(
        "no",
        "Compile the denoiser's blocks: `inductor` makes fused kernels; `aot_eager` and `eager` compile nothing and "
        "are for finding faults. All blocks share their code; a second number of tokens makes it general once.",
    )
    dynamo_mode: Literal["default", "max-autotune-no-cudagraphs"] = key(
        "default", "How long `inductor` may look for fast kernels."
    )
    dynamo_dynamic: bool | None = key(
        None,
        "Whether the code is general in the number of tokens from the start; by default once a second number comes.",
    )


class CompilePlugin(Plugin[CompileConfig]):
    """torch.compile for the denoiser's blocks, compiled once for all of them."""

    requires = frozenset({"model-family"})
    Config = CompileConfig

    def is_active(self, core: CoreConfig) -> bool:
        """Only when switched on."""
        return self.config.dynamo_backend.lower() not in OFF

    def warnings(self, core: CoreConfig) -> Iterator[str]:
        """Which keys do nothing."""
        for name in ("dynamo_mode", "dynamo_dynamic"):
            if not self.is_active(core) and getattr(self.config, name) != CompileConfig.model_fields[name].default:
                yield f"{name} does nothing: dynamo_backend is {self.config.dynamo_backend}"

    @hookimpl
    def configure(self, run: Run) -> None:
        """Refuse what cannot be compiled with or by. Raises ConfigError."""
        if not self.is_active(run.config):
            return
        _check_backend(self.config.dynamo_backend)
        if self.config.dynamo_mode != "default" and self.config.dynamo_backend != "inductor":
            raise ConfigError(
                f"dynamo_mode is for dynamo_backend inductor, which is {self.config.dynamo_backend}",
                where="dynamo_mode",
                remedy="leave it out",
            )
        taken = [name for name in REWRITES for each in run.plugins.values() if getattr(each.config, name, False)]
        if taken:
            raise ConfigError(
                f"dynamo_backend and {taken[0]} are two ways to make blocks do less",
                where="dynamo_backend",
                remedy=f"set one of them: leave {taken[0]} out, or dynamo_backend",
            )

    @hookimpl
    def model_transforms(self, run: Run, model: Model) -> Iterable[Transform]:
        """Compile every block of every network, after all that rewrites them."""
        if not self.is_active(run.config):
            return []
        from tuner_compile.blocks import check_compiler, transform

        check_compiler(self.config.dynamo_backend, run.device)
        return [transform(self.config)]


def _check_backend(name: str) -> None:
    """Raise ConfigError unless torch knows the backend and it can train."""
    import torch

    known = [*torch._dynamo.list_backends(exclude_tags=()), *OFF]
    if name == "cudagraphs":
        raise ConfigError(
            "dynamo_backend 'cudagraphs' keeps results in place, which checkpointing and offload write over",
            where="dynamo_backend",
            remedy="use inductor",
        )
    if name not in known:
        raise ConfigError(
            f"torch has no backend {name!r} to compile with",
            where="dynamo_backend",
            allowed=["no", "inductor", "aot_eager", "eager"],
            nearest=nearest(name, known),
        )


def has_triton() -> bool:
    """Whether Triton, which writes inductor's kernels for a GPU, is installed."""
    return find_spec("triton") is not None
