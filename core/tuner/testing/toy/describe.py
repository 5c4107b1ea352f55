"""The toy model's facts, read from its folder without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.errors import ConfigError, ModelError
from tuner.spec import LatentGeometry, Linear, ModelSpec, NetworkSpec

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig

NETWORK = "transformer"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FREQUENCIES = 16
"""Of the embedding of a time."""
PARTS = (NETWORK, "vae", "text_encoder")
LATENTS = LatentGeometry(channels=12, stride_time=4, stride_space=8)
"""Mean colours of the four quadrants of 8 x 8 pixels over 4 frames: 3 x 4 channels."""


@dataclass(frozen=True)
class ToyDimensions:
    """What ``transformer/config.json`` holds."""

    blocks: int = 4
    dim: int = 48
    heads: int = 2
    ffn_dim: int = 96
    text_dim: int = 16
    text_tokens: int = 8
    channels: int = LATENTS.channels
    patch: tuple[int, int, int] = (1, 2, 2)


def model_folder(core: CoreConfig) -> Path:
    """The model's folder. Raises ConfigError when none is named, ModelError when a part is missing."""
    if core.pretrained_model_name_or_path is None:
        raise ConfigError(
            "the toy family needs pretrained_model_name_or_path",
            remedy="name a folder written by tuner.testing.toy.build_toy",
        )
    folder = Path(core.pretrained_model_name_or_path)
    for part in PARTS:
        for file in (CONFIG, WEIGHTS):
            if not (folder / part / file).is_file():
                raise ModelError(f"the toy model lacks {part}/{file}", where=folder)
    return folder


def read_dimensions(folder: Path) -> ToyDimensions:
    """The dimensions of the network in ``folder``. Raises ModelError when its config does not hold them."""
    path = folder / NETWORK / CONFIG
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name: found[field.name] for field in fields(ToyDimensions)}
    except (ValueError, KeyError) as error:
        raise ModelError(f"the toy model's config is not one: {error}", where=path) from None
    return ToyDimensions(**{**known, "patch": tuple(known["patch"])})


def describe(core: CoreConfig) -> ModelSpec:
    """The ModelSpec of the folder that ``pretrained_model_name_or_path`` names."""
    folder = model_folder(core)
    dimensions = read_dimensions(folder)
    return ModelSpec(
        family="toy",
        flavour="toy",
        base=str(folder),
        networks=(
            NetworkSpec(
                name=NETWORK,
                blocks=dimensions.blocks,
                dim=dimensions.dim,
                heads=dimensions.heads,
                ffn_dim=dimensions.ffn_dim,
                text_dim=dimensions.text_dim,
                text_tokens=dimensions.text_tokens,
                in_channels=dimensions.channels,
                patch=dimensions.patch,
                linears=_linears(dimensions.dim, dimensions.ffn_dim),
                small=11 * dimensions.dim + dimensions.ffn_dim,
                other=_outside_blocks(dimensions),
            ),
        ),
        latents=LATENTS,
        size_multiple=LATENTS.stride_space * dimensions.patch[1],
        fps=16.0,
        adapter_targets=("to_q", "to_k", "to_v", "to_out"),
        encoders={"text": ("text_encoder",), "video": ("vae",)},
        rename=tuple(
            (f"{ours}.to_{part}", f"{theirs}.{original}")
            for ours, theirs in (("self_attention", "self_attn"), ("cross_attention", "cross_attn"))
            for part, original in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))
        ),
    )


def _linears(dim: int, ffn_dim: int) -> tuple[Linear, ...]:
    """The matrices of a block."""
    projections = ("to_q", "to_k", "to_v", "to_out")
    found = [Linear(f"self_attention.{each}", dim, dim) for each in projections]
    found += [
        Linear(f"cross_attention.{each}", dim, dim, "text" if each in ("to_k", "to_v") else "tokens")
        for each in projections
    ]
    return (*found, Linear("feed_forward.0", dim, ffn_dim), Linear("feed_forward.2", ffn_dim, dim))


def _outside_blocks(dimensions: ToyDimensions) -> int:
    """Parameters of the layers around the blocks: patches in and out, text, times, the last norm."""
    dim, patch = dimensions.dim, dimensions.channels * prod(dimensions.patch)
    layers = ((patch, dim), (dim, patch), (dimensions.text_dim, dim), (FREQUENCIES, 2 * dim))
    return sum((inputs + 1) * outputs for inputs, outputs in layers) + 2 * dim
