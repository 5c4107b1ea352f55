"""Writing a toy model folder: three parts, each a config.json and a safetensors file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuner.files import atomic_path, atomic_write_text
from tuner.testing.toy.describe import CONFIG, LATENTS, NETWORK, WEIGHTS, ToyDimensions
from tuner.testing.toy.networks import ToyTextEncoder, ToyTransformer, ToyVae

FORMAT = {"format": "pt"}


def build(path: Path, *, seed: int = 0, **dimensions: Any) -> Path:
    """Write a toy model with random weights from ``seed`` to ``path``; the same arguments give the same bytes.

    ``dimensions`` are fields of :class:`ToyDimensions`, such as ``blocks=8``; ``dim`` must be a multiple of 6
    and of ``heads``.
    """
    settings = ToyDimensions(**dimensions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ToyTransformer(settings)
        encoder = ToyTextEncoder(settings.text_dim, settings.text_tokens)
        vae = averaging_vae()
    _write(path / NETWORK, network, asdict(settings))
    _write(path / "vae", vae, asdict(LATENTS))
    _write(path / "text_encoder", encoder, {"width": settings.text_dim, "limit": settings.text_tokens})
    return path


def averaging_vae() -> ToyVae:
    """A VAE whose latents are mean colours of quadrants, and whose decoder paints them: clips stay recognisable."""
    vae = ToyVae()
    half = LATENTS.stride_space // 2
    quadrants = torch.zeros(LATENTS.channels, 3, LATENTS.stride_time, 2, half, 2, half)
    for channel in range(LATENTS.channels):
        colour, row, column = channel // 4, channel // 2 % 2, channel % 2
        quadrants[channel, colour, :, row, :, column] = 1
    painted = quadrants.flatten(1)
    with torch.no_grad():
        vae.encoder.weight.copy_(painted / painted.sum(1, keepdim=True))
        vae.decoder.weight.copy_(painted.T)
    return vae


def _write(folder: Path, module: nn.Module, config: dict[str, Any]) -> None:
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    atomic_write_text(folder / CONFIG, json.dumps({"class": type(module).__name__, **config}, indent=2) + "\n")
    with atomic_path(folder / WEIGHTS) as temporary:
        temporary.write_bytes(save(tensors, metadata=FORMAT))
