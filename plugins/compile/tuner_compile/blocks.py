"""Compiling blocks where they are: classes, names of weights and files stay."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import torch

from tuner.errors import ConfigError
from tuner.model import Network, Stage, Transform
from tuner_compile import has_triton

if TYPE_CHECKING:
    from tuner_compile import CompileConfig

SHAPES = 16
"""Versions of a block's code that are kept: training and rendering, with and without gradients, special and general."""


def transform(config: CompileConfig) -> Transform:
    """The transform that compiles every block of a network."""
    options: dict[str, Any] = {"backend": config.dynamo_backend, "dynamic": config.dynamo_dynamic}
    if config.dynamo_mode != "default":
        options["mode"] = config.dynamo_mode

    def apply(network: Network) -> None:
        limits: Any = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, SHAPES)
        for block in network.stack.blocks:
            block.compile(**options)

    return Transform(Stage.COMPILE, f"compiled blocks ({config.dynamo_backend})", frozenset({"compiled_blocks"}), apply)


def check_compiler(backend: str, device: torch.device) -> None:
    """Raise ConfigError where inductor lacks what it writes kernels with on ``device``."""
    if backend != "inductor":
        return
    if device.type == "cuda" and not has_triton():
        raise ConfigError(
            "dynamo_backend inductor writes its kernels with Triton, which is not installed",
            where="dynamo_backend",
            remedy="install triton (it comes with torch for CUDA on Linux), or leave dynamo_backend out",
        )
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise ConfigError(
            "dynamo_backend inductor compiles C++ on this device, and there is no compiler",
            where="dynamo_backend",
            remedy="install g++ or clang, or leave dynamo_backend out",
        )
