"""Text and video to what is cached: UMT5 states and normalised VAE latents.

Items are encoded one at a time on purpose. The size of a batch changes the last bits of a result, and
an interrupted caching that goes on with other batches must end with the very same files; at 512 tokens
and at video sizes the device is busy with one item anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tuner.errors import PluginError
from tuner_wan import conditions

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

    from tuner.model import EncodeBatch, Encoded, Model
    from tuner_wan.components import ImageEncoder

TEXT_VERSION = 1
"""Bumped when the states of a caption change. Guarded by a golden test."""
IMAGE_VERSION = 1
"""Bumped when the embeddings of an image change."""
VIDEO_VERSION = 1
"""Bumped when the latents of a clip change. Guarded by a golden test."""


@dataclass(frozen=True)
class TextEncoder:
    """UMT5 and its tokenizer, which are only used together."""

    tokenizer: PreTrainedTokenizerBase
    model: UMT5EncoderModel
    tokens: int
    """Captions are truncated to this many tokens."""


def encode(model: Model, batch: EncodeBatch) -> Encoded:
    """One dict per item: ``{"states": (L, D)}`` for captions, ``{"latents": (C, F', h, w)}`` for clips, with what
    the denoiser is given of their frames (see :mod:`tuner_wan.conditions`); for images their embeddings.
    """
    if batch.kind == "text":
        with model.use("text_encoder") as (encoder,):
            return [{"states": encode_caption(encoder, caption)} for caption in batch.captions]
    if batch.kind == "video" and batch.pixels is not None:
        frames = [batch.frame(role) for role in model.spec.frames_taken]
        with model.use("vae") as (vae,):
            return [
                {"latents": encode_clip(vae, clip)}
                | encode_condition(vae, model.spec.condition, clip, [each[index] for each in frames])
                for index, clip in enumerate(batch.pixels)
            ]
    if batch.kind == "conditioning" and "image_encoder" in model.components:
        frames = [batch.frame(role) for role in model.spec.conditioning_frames]
        with model.use("image_encoder") as (images,):
            return [{conditions.STATES: encode_pictures(images, each)} for each in zip(*frames, strict=True)]
    raise PluginError(
        f"the wan plugin was asked to encode a batch of kind {batch.kind!r}", allowed=sorted(model.spec.encoders)
    )


def encode_caption(encoder: TextEncoder, caption: str) -> Tensor:
    """Last hidden states (L, D) of ``caption``, L its true number of tokens, in the encoder's dtype, on the CPU.

    Equal to the unpadded part of what diffusers' ``WanPipeline.encode_prompt`` gives.
    """
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    inputs = encoder.tokenizer(
        [prompt_clean(caption)],
        padding="max_length",
        max_length=encoder.tokens,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask = inputs.attention_mask.to(encoder.model.device)
    with _own_precision(encoder.model.device):
        states: Tensor = encoder.model(inputs.input_ids.to(encoder.model.device), mask).last_hidden_state[0]
    # A copy: a view would keep (and store) the padding with it.
    return states[: int(mask.sum())].detach().cpu().clone()


def encode_clip(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    """Normalised latents (C, F', h, w), float32 on the CPU, of ``pixels`` (3, F, H, W) in [-1, 1].

    They are the mode of the posterior, as for images of diffusers' pipelines. Stored in float32: half
    precision would save 4 MB on 81 frames of 832x480, and round what the noise is added to.
    """
    return normalise(_mode(vae, pixels), vae.config)[0].detach().cpu()


def encode_condition(
    vae: AutoencoderKLWan, condition: str, pixels: Tensor, frames: Sequence[Tensor]
) -> dict[str, Tensor]:
    """What the denoiser is given of the ``frames`` (3, 1, H, W) of a clip ``pixels`` (3, F, H, W), float32 on the CPU.

    ``{"condition": (C, F', h, w)}``, or ``{"first_frame": (C, 1, h, w)}`` where the first latent frame goes in clean;
    nothing for a model that takes no frame. Bit for bit what ``WanImageToVideoPipeline.prepare_latents`` makes.
    """
    if condition == conditions.CLEAN:
        return {conditions.CLEAN_LATENT: _encode_given(vae, frames[0])}
    if not frames:
        return {}
    given = conditions.given_clip(pixels, frames[0], frames[1] if len(frames) > 1 else None)
    return {conditions.CONDITION: _encode_given(vae, given)}


def _encode_given(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    mode = _mode(vae, pixels)
    mean, std = _statistics(mode, vae.config)
    # The pipeline multiplies by 1 / std, which rounds otherwise than a division by std.
    given: Tensor = (mode - mean) * (1.0 / std)
    return given[0].detach().cpu()


def _mode(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    """The posterior's mode (1, C, F', h, w), float32 on the VAE's device, of ``pixels`` (3, F, H, W) on any device.

    The VAE's encoder is called with the first frame and then with four at a time, tile by tile where it works in
    tiles. Each piece is brought to its device and dtype there, so that the clip as a whole never is.
    """

    def bring(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        frames, *others = arguments
        return frames.to(vae.device, vae.dtype), *others

    handle = vae.encoder.register_forward_pre_hook(bring)
    try:
        with _own_precision(vae.device):
            mode: Tensor = vae.encode(pixels.unsqueeze(0)).latent_dist.mode()
    finally:
        handle.remove()
    return mode.float()


def encode_pictures(encoder: ImageEncoder, frames: Sequence[Tensor]) -> Tensor:
    """Embeddings (frames, tokens, width) of the ``frames`` (3, 1, H, W) of one clip, float32 on the CPU.

    CLIP's last states but one, of the frames in 8 bits, as ``WanImageToVideoPipeline.encode_image`` gives them.
    """
    from PIL import Image

    pictures = [
        Image.fromarray(((frame[:, 0] + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())
        for frame in frames
    ]
    inputs = encoder.processor(images=pictures, return_tensors="pt").to(encoder.model.device)
    with _own_precision(encoder.model.device):
        states: Tensor = encoder.model(**inputs, output_hidden_states=True).hidden_states[-2]
    return states.detach().float().cpu().clone()


def normalise(latents: Tensor, config: Any) -> Tensor:
    """(latents - mean) / std per channel, for latents (B, C, F', h, w) and a VAE config."""
    mean, std = _statistics(latents, config)
    return (latents - mean) / std


def denormalise(latents: Tensor, config: Any) -> Tensor:
    """What :func:`normalise` undoes: the VAE's own latents (B, C, F', h, w)."""
    mean, std = _statistics(latents, config)
    return latents * std + mean


def _statistics(latents: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    return mean, std


def decode_latents(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Frames (F, H, W, 3) uint8, on the CPU, of normalised ``latents`` (1, C, F', h, w)."""
    with torch.no_grad(), _own_precision(vae.device):
        latents = denormalise(latents.to(vae.device, vae.dtype), vae.config)
        video: Tensor = vae.decode(latents, return_dict=False)[0][0]
    frames = (video.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return frames.permute(1, 2, 3, 0).cpu()


@contextmanager
def _own_precision(device: torch.device) -> Iterator[None]:
    """Outside any autocast: encoders and VAE compute in the precision they were loaded in."""
    with torch.autocast(device.type, enabled=False):
        yield


def pad_states(states: Tensor, tokens: int) -> Tensor:
    """``states`` (B, L, D) zero-padded to (B, ``tokens``, D): what the network reads, without a mask."""
    return torch.nn.functional.pad(states, (0, 0, 0, tokens - states.shape[1]))
