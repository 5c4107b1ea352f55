"""How a LoRA starts: by PEFT's ways, in float32; or from a file.

PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) take what the LoRA starts as out of the base's weights, so that
the network starts as it was. What a file must hold is then the difference to that start (``tuner.builtin.lora.files``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tuner.errors import ConfigError

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from tuner.builtin.adapter_file import Update
    from tuner.builtin.lora.adapter import LoraSettings
    from tuner.model import Network

MATRICES = ("lora_A", "lora_B")
SHOWN = 3
"""How many modules an error names."""


def needs_base(initialisation: str) -> bool:
    """Whether this start is made of the base's weights, and changes them."""
    return initialisation.startswith(("pissa", "olora"))


def initialise(layer: LoraLayer, adapter: str, initialisation: str) -> tuple[Tensor, Tensor] | None:
    """Start the LoRA of ``layer`` in float32. Gives A and B as they start where these were taken out of the base."""
    pair: list[nn.Module] = [getattr(layer, matrix)[adapter] for matrix in MATRICES]
    for matrix in pair:
        matrix.to("cpu", torch.float32)
    if initialisation.startswith("pissa"):
        layer.pissa_init(adapter, initialisation)
    elif initialisation == "olora":
        layer.olora_init(adapter)
    elif initialisation == "orthogonal":
        layer.orthogonal_init(adapter)
        for matrix in pair:
            matrix.to(torch.float32)
    else:
        layer.reset_lora_parameters(adapter, True if initialisation == "default" else initialisation)
    if not needs_base(initialisation):
        return None
    down, up = (matrix.get_parameter("weight").detach().to("cpu", torch.float32, copy=True) for matrix in pair)
    return down, up


def check_base(network: Network, modules: Iterable[str], settings: LoraSettings) -> None:
    """Raise ConfigError unless the weights of ``modules`` are plain tensors of their own, which can be changed."""
    what = "use_dora: true" if settings.dora else f"lora_init_type: {settings.initialisation}"
    for name in modules:
        weight = network.module.get_submodule(name)._parameters.get("weight")
        if (
            weight is None
            or not weight.is_floating_point()
            or type(weight.data) is not Tensor
            or weight.is_meta
            or weight.untyped_storage().nbytes() != weight.nbytes
        ):
            raise ConfigError(
                f"{what} is computed from the base's weights, and {name!r} is quantised or streamed",
                where=f"network {network.name}",
                remedy="leave out base_model_precision and enable_group_offload, or start otherwise",
            )


def check_file(path: Path, updates: Mapping[str, Update], modules: Mapping[str, tuple[int, float]]) -> None:
    """Raise ConfigError unless every update of a file is a plain LoRA that fits into one of ``modules``."""
    foreign = sorted(set(updates) - set(modules))
    if foreign:
        raise ConfigError(
            f"init_lora adapts {len(foreign)} modules that this run does not, such as {', '.join(foreign[:SHOWN])}",
            where=path,
            remedy="add them to lora_target_modules",
        )
    for name, update in updates.items():
        if update.kind != "lora" or update.dora_scale is not None or set(update.tensors) != {"lora_down", "lora_up"}:
            raise ConfigError(
                f"init_lora is no plain LoRA: {name!r} is {'DoRA' if update.dora_scale is not None else update.kind}",
                where=path,
                remedy="make one of it: tuner convert FILE --to diffusers --rank R",
            )
        rank = update.tensors["lora_down"].shape[0]
        if rank > modules[name][0]:
            raise ConfigError(
                f"init_lora has rank {rank} at {name!r}, and this run {modules[name][0]}",
                where=path,
                remedy=f"set lora_rank: {rank}, or make it smaller: tuner convert FILE --to comfyui --rank R",
            )


@torch.no_grad()
def take_over(
    parameters: Mapping[str, nn.Parameter], updates: Mapping[str, Update], alphas: Mapping[str, float]
) -> None:
    """Make the LoRA start as the file's: A as it is there, B scaled to this run's; further ranks add nothing yet.

    Arguments
        alphas: by module name; over this run's rank that is what B·A is multiplied by.
    """
    for name, update in updates.items():
        down, up = update.tensors["lora_down"].float(), update.tensors["lora_up"].float()
        own_down, own_up = (parameters[f"{name}.{matrix}.weight"] for matrix in MATRICES)
        own_down[: len(down)].copy_(down)
        own_up.zero_()
        own_up[:, : len(down)].copy_(up * (update.scale * own_up.shape[1] / alphas[name]))
