"""From a mask's pixels to the size of latents.

A mask lies over its clip: it is decoded with the clip's own view, whatever its own size, and averaged over
each latent cell. Latent frame 0 covers pixel frame 0, latent frame k the ``stride_time`` frames that end at
frame k * ``stride_time``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tuner.builtin.datasets.decode import decode_file
from tuner.data.cached import SEGMENTATION
from tuner.data.samples import Bucket, Companion, View
from tuner.errors import DataError
from tuner.spec import LatentGeometry, ModelSpec

BLACK = 8 / 255
"""What is no brighter is black: lossy video is never quite so."""
FORCED = 0.5
"""A token is forced when one of its latent cells is at least so bright."""


def weigh_mask(file: Companion, view: View, bucket: Bucket, spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """The mask of one view at the size of latents (see ``tuner.data.samples.Weigh``).

    Raises DataError when it cannot be decoded, or is black everywhere.
    """
    try:
        pixels = decode_file(file.path, view, bucket)
    except DataError as error:
        raise DataError(f"its mask {file.path.name}: {error.what}", where=file.path) from error
    weights = to_latents(brightness(pixels, file.role), spec.latents)
    if not weights.any():
        raise DataError(
            f"its mask {file.path.name} is black everywhere, so nothing of it would be trained", where=file.path
        )
    return weights, forced_tokens(weights, spec.networks[0].patch)


def brightness(pixels: Tensor, role: str) -> Tensor:
    """(F, H, W) in [0, 1] of mask pixels (3, F, H, W) in [-1, 1].

    The brightest of the three colours counts: of grey, the grey; of pure red, 1. Black is exactly 0. In a
    segmentation whatever is not black is 1.
    """
    values = (pixels.amax(0) + 1) / 2
    coloured = values > BLACK
    return coloured.float() if role == SEGMENTATION else torch.where(coloured, values, 0)


def to_latents(values: Tensor, latents: LatentGeometry) -> Tensor:
    """(1, F', h, w): the mean of pixel values (F, H, W) over what each latent cell covers."""
    first, rest = values[:1], values[1:]
    frames = torch.cat([first, rest.unflatten(0, (-1, latents.stride_time)).mean(1)]) if len(rest) else first
    return functional.avg_pool2d(frames.unsqueeze(0), latents.stride_space)


def forced_tokens(weights: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """(S,) bool, in the order of the network's tokens: whether any cell of a token's patch is bright.

    ``weights`` are (1, F', h, w).
    """
    return (functional.max_pool3d(weights, patch) >= FORCED).flatten()
