"""Text and video to what is cached: T5 states with their mask, and normalised VAE latents. One item at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tuner.errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase, T5EncoderModel

    from tuner.model import EncodeBatch, Encoded, Model

TEXT_VERSION = 1
"""Bumped when the states of a caption change."""
VIDEO_VERSION = 1
"""Bumped when the latents of a clip change."""


@dataclass(frozen=True)
class TextEncoder:
    """T5 and its tokenizer, which are only used together."""

    tokenizer: PreTrainedTokenizerBase
    model: T5EncoderModel
    tokens: int
    """Captions are truncated to this many tokens."""


def encode(model: Model, batch: EncodeBatch) -> Encoded:
    """``{"states": (L, D), "mask": (L,)}`` of each caption, or ``{"latents": (C, F', h, w)}`` of each clip."""
    if batch.kind == "text":
        with model.use("text_encoder") as (encoder,):
            return [encode_caption(encoder, caption) for caption in batch.captions]
    if batch.kind == "video" and batch.pixels is not None:
        with model.use("vae") as (vae,):
            return [{"latents": encode_clip(vae, clip)} for clip in batch.pixels]
    raise PluginError(f"LTX-Video has nothing to encode for {batch.kind!r}", allowed=sorted(model.spec.encoders))


def encode_caption(encoder: TextEncoder, caption: str) -> dict[str, Tensor]:
    """States (L, D) of ``caption`` and a mask (L,) of ones, L its true number of tokens, on the CPU.

    The unpadded part of what ``LTXPipeline.encode_prompt`` gives. As there, T5 sees the padding, without a mask.
    """
    inputs = encoder.tokenizer(
        [caption], padding="max_length", max_length=encoder.tokens, truncation=True, return_tensors="pt"
    )
    device, length = encoder.model.device, int(inputs.attention_mask.sum())
    with torch.autocast(device.type, enabled=False):
        states: Tensor = encoder.model(inputs.input_ids.to(device))[0][0]
    # The batch is padded with zeros: with ones for its tokens, the mask comes out right by itself.
    return {"states": states[:length].detach().cpu().clone(), "mask": torch.ones(length)}


def padded(text: Mapping[str, Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    """States (B, ``tokens``, D) and mask (B, ``tokens``) of a batch of captions padded to its longest."""
    missing = tokens - text["mask"].shape[1]
    return pad(text["states"], (0, 0, 0, missing)), pad(text["mask"], (0, missing))


def encode_clip(vae: Any, pixels: Tensor) -> Tensor:
    """Normalised latents (C, F', h, w), float32 on the CPU, of ``pixels`` (3, F, H, W) in [-1, 1]."""
    with torch.autocast(vae.device.type, enabled=False):
        mode = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist.mode().float()
    mean, std = _statistics(vae, mode)
    normalised: Tensor = (mode - mean) * vae.config.scaling_factor / std
    return normalised[0].detach().cpu()


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Frames (F, H, W, 3) uint8, on the CPU, of normalised ``latents`` (1, C, F', h, w), as ``LTXPipeline`` decodes.

    A VAE that takes a time is given 0, the pipeline's default, which adds no noise.
    """
    with torch.no_grad(), torch.autocast(vae.device.type, enabled=False):
        latents = latents.to(vae.device, vae.dtype)
        mean, std = _statistics(vae, latents)
        time = torch.zeros(1, device=vae.device, dtype=vae.dtype) if vae.config.timestep_conditioning else None
        video: Tensor = vae.decode(latents * std / vae.config.scaling_factor + mean, time, return_dict=False)[0][0]
    frames = (video.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return frames.permute(1, 2, 3, 0).cpu()


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (1, C, 1, 1, 1), which come with the VAE's weights."""
    mean, std = (each.view(1, -1, 1, 1, 1).to(latents) for each in (vae.latents_mean, vae.latents_std))
    return mean, std
