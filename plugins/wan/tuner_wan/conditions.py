"""What a Wan denoiser is given beside the noisy latents: first and last frames, and times of its tokens.

Image to video has 36 input channels: 16 noisy, 4 of a mask, 16 of a condition, the encoding of a clip that is black
but for the frames that are given. Wan 2.2 5B has no channels for it: its first latent frame goes in without noise,
at time 0. Both are what diffusers' ``WanImageToVideoPipeline`` makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.errors import PluginError

if TYPE_CHECKING:
    from tuner.model import Batch
    from tuner.spec import ModelSpec, NetworkSpec

FIRST, LAST = "first_frame", "last_frame"
CLEAN = "clean_first_frame"
BETWEEN = "first_and_last_frame"
CONDITION = "condition"
"""Name of the encoded condition beside the latents: (C, F', h, w)."""
CLEAN_LATENT = "first_frame"
"""Name of the encoded first frame beside the latents: (C, 1, h, w)."""
STATES = "image_states"
"""Name of the embeddings of the frames: (frames, tokens, width)."""


def given_clip(pixels: Tensor, first: Tensor, last: Tensor | None) -> Tensor:
    """The clip whose encoding is the condition: the given frames, zeros elsewhere.

    ``pixels`` (3, F, H, W) say only how long it is; ``first`` and ``last`` are (3, 1, H, W). Zeros are grey, as
    pixels are in [-1, 1]. Raises PluginError where there is no room for a last frame.
    """
    frames = pixels.shape[1]
    if last is None:
        return torch.cat([first, first.new_zeros(3, frames - 1, *first.shape[2:])], dim=1)
    if frames < 2:
        raise PluginError("a clip of one frame has no last frame beside its first")
    return torch.cat([first, first.new_zeros(3, frames - 2, *first.shape[2:]), last], dim=1)


def frame_mask(condition: str, frames: int, stride: int, device: torch.device | None = None) -> Tensor:
    """(stride, F', 1, 1) float32: 1 where a pixel frame is given, by its place in its latent frame and that frame.

    The first pixel frame fills the whole first latent frame.
    """
    mask = torch.zeros(stride, frames, 1, 1, device=device)
    mask[:, 0] = 1
    if condition == BETWEEN:
        mask[-1, -1] = 1
    return mask


def with_mask(encoded: Tensor, condition: str, stride: int) -> Tensor:
    """(B, stride + C, F', h, w): the mask and the encoded condition (B, C, F', h, w), as channels."""
    batch, _, frames, height, width = encoded.shape
    mask = frame_mask(condition, frames, stride, encoded.device).to(encoded.dtype)
    return torch.cat([mask.expand(batch, -1, -1, height, width), encoded], dim=1)


def starts_clean(spec: ModelSpec, frames: int) -> bool:
    """Whether the first of ``frames`` latent frames goes in without noise: a picture is trained from text alone."""
    return spec.condition == CLEAN and frames > 1


def network_input(spec: ModelSpec, noisy: Tensor, video: Mapping[str, Tensor]) -> Tensor:
    """What the network reads: ``noisy`` (B, C, F', h, w) with the condition as the model takes it.

    ``video`` is what was encoded beside the latents, as a batch.
    """
    if starts_clean(spec, noisy.shape[2]):
        return torch.cat([video[CLEAN_LATENT].to(noisy), noisy[:, :, 1:]], dim=2)
    if spec.condition in (FIRST, BETWEEN):
        return torch.cat(
            [noisy, with_mask(video[CONDITION].to(noisy), spec.condition, spec.latents.stride_time)], dim=1
        )
    return noisy


def token_times(spec: ModelSpec, network: NetworkSpec, times: Tensor, latents: Tensor) -> Tensor:
    """Times (B,) of the samples as the network takes them: as they are, or (B, S), 0 for the tokens of a clean frame.

    ``latents`` are (B, C, F', h, w).
    """
    frames, height, width = latents.shape[2:]
    if not starts_clean(spec, frames):
        return times
    return times.unsqueeze(1) * ~first_frame_tokens(network, (frames, height, width), times.device)


def first_frame_tokens(network: NetworkSpec, grid: tuple[int, int, int], device: torch.device | None = None) -> Tensor:
    """(S,) bool: the tokens of the first latent frame of a clip of ``grid`` latent (frames, height, width)."""
    tokens = torch.zeros(network.tokens(*grid), dtype=torch.bool, device=device)
    tokens[: network.tokens(network.patch[0], *grid[1:])] = True
    return tokens


def image_states(spec: ModelSpec, video: Mapping[str, Tensor]) -> Tensor | None:
    """(B * frames, tokens, width), the frames of a sample one after the other, as the network joins them itself."""
    return video[STATES].flatten(0, 1) if spec.conditioning_frames else None


def loss_mask(spec: ModelSpec, batch: Batch) -> Tensor | None:
    """How much each place counts, (B, 1, F', 1, 1) or with h and w: a clean first frame is given, so it counts nothing.

    The mean of the loss is then taken over the other frames alone. None is everywhere alike.
    """
    if not starts_clean(spec, batch.latents.shape[2]):
        return batch.mask
    ahead = torch.ones(1, 1, batch.latents.shape[2], 1, 1, device=batch.latents.device)
    ahead[:, :, 0] = 0
    return ahead if batch.mask is None else batch.mask * ahead
