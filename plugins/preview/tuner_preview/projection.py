"""Colours straight from latents: a matrix and an offset, fitted by least squares on clips that the run has encoded.

Each latent place becomes one pixel: the mean colour of the pixels that it stands for. That a linear map shows what a
latent holds is known from the latent previews of image tools; ours needs no table for each model, as it is fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.errors import DataError

if TYPE_CHECKING:
    from tuner.data.cached import CachedData
    from tuner.model import Model
    from tuner.spec import LatentGeometry

CLIPS, FRAMES, EDGE = 4, 3, 32
"""What is fitted on at most: clips, latent frames of each, and latent places along each edge of their middle."""
RIDGE = 1e-4
"""Of the latents' own variance: keeps channels that say nothing from counting."""


@dataclass(frozen=True)
class Projection:
    """Latents to colours."""

    matrix: Tensor
    """(C + 1, 3) float32 on the CPU, the last row the offset; colours are in [0, 1]"""
    explained: float
    """Share of the colours' variance, on what it was fitted on"""

    def colours(self, latents: Tensor) -> Tensor:
        """(F', 3, h, w) in [0, 1] of ``latents`` (F', C, h, w)."""
        matrix = self.matrix.to(latents)
        mixed = torch.einsum("fchw,ck->fkhw", latents, matrix[:-1])
        return (mixed + matrix[-1].view(1, 3, 1, 1)).clamp(0, 1)


def fit(cached: CachedData, model: Model, device: torch.device) -> Projection:
    """The projection of the model's latents: clips of the cache against what the VAE makes of them on ``device``.

    Always the same for the same cache. Loads the VAE. Raises DataError where nothing is encoded.
    """
    places, colours = [], []
    with model.use(*model.spec.encoders.get("video", ())):
        for index in _spread(len(cached.samples), CLIPS):
            latents = _middle(cached.video(cached.samples[index])["latents"].float())
            frames = model.decode(latents.unsqueeze(0).to(device)).to("cpu", torch.float32) / 255
            places.append(latents.permute(1, 2, 3, 0).flatten(0, 2))
            colours.append(_means(frames, model.spec.latents).flatten(0, 2))
    if not places:
        raise DataError("no clip is encoded that the colours of previews could be fitted on")
    return solve(torch.cat(places), torch.cat(colours))


def solve(places: Tensor, colours: Tensor) -> Projection:
    """The projection of ``places`` (N, C) to ``colours`` (N, 3) with the least squared error, in float64."""
    values, wanted = places.double(), colours.double()
    centre, mean = values.mean(0), wanted.mean(0)
    values, wanted = values - centre, wanted - mean
    moments = values.T @ values
    penalty = RIDGE * moments.diagonal().mean().clamp(min=1e-12)
    matrix = torch.linalg.solve(moments + penalty * torch.eye(len(moments), dtype=torch.float64), values.T @ wanted)
    spread, missed = wanted.square().sum(), (wanted - values @ matrix).square().sum()
    explained = 1 - float(missed / spread) if spread > 0 else 1.0
    offset = (mean - centre @ matrix).unsqueeze(0)
    return Projection(torch.cat([matrix, offset]).float(), explained)


def _spread(count: int, most: int) -> Sequence[int]:
    """At most ``most`` of ``count`` indices, evenly spaced."""
    taken = min(count, most)
    return [index * count // taken for index in range(taken)]


def _middle(latents: Tensor) -> Tensor:
    """The first frames and the middle of ``latents`` (C, F', h, w)."""
    height, width = latents.shape[-2:]
    top, left = max(0, height - EDGE) // 2, max(0, width - EDGE) // 2
    return latents[:, :FRAMES, top : top + EDGE, left : left + EDGE]


def _means(frames: Tensor, geometry: LatentGeometry) -> Tensor:
    """(F', h, w, 3): the mean colour of the pixels of each latent place, of ``frames`` (F, H, W, 3)."""
    side, time = geometry.stride_space, geometry.stride_time
    cells = frames.unflatten(2, (-1, side)).unflatten(1, (-1, side)).mean(dim=(2, 4))
    later = cells[1:].unflatten(0, (-1, time)).mean(1) if len(cells) > 1 else cells[1:]
    return torch.cat([cells[:1], later])
