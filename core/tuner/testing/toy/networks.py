"""The toy model's modules: a denoiser of transformer blocks, a linear VAE, a hashing text encoder.

Shapes: B batch, C channels, F' h w the latent's axes, S tokens, D width, L text tokens, T text width.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from tuner.testing.toy.describe import FREQUENCIES, LATENTS, ToyDimensions

VOCABULARY = 64


class Embedded(NamedTuple):
    """What the blocks read."""

    tokens: Tensor
    """(B, S, D)"""
    position: Tensor
    """(1, S, D)"""
    modulation: Tensor
    """(B, 2, D): scale and shift"""
    text: Tensor
    """(B, L, D)"""
    grid: tuple[int, int, int]


def waves(values: Tensor, width: int) -> Tensor:
    """(N,) numbers as (N, width) float32 sines and cosines of falling frequency."""
    rates = torch.exp(torch.arange(0, width, 2, device=values.device) * (-9.0 / width))
    angles = values.float().unsqueeze(1) * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Attention(nn.Module):
    """Multi-head attention of tokens (B, S, D) to ``context`` (B, L, D); positions are added to queries and keys."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, tokens: Tensor, context: Tensor, position: Tensor | None = None) -> Tensor:
        """(B, S, D)"""
        query, key = (tokens, context) if position is None else (tokens + position, context + position)
        heads = (self.to_q(query), self.to_k(key), self.to_v(context))
        q, k, v = (each.unflatten(2, (self.heads, -1)).transpose(1, 2) for each in heads)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Self-attention, attention to text, feed-forward; the last scaled and shifted by the time."""

    def __init__(self, dimensions: ToyDimensions) -> None:
        super().__init__()
        dim = dimensions.dim
        self.norm = nn.LayerNorm(dim)
        self.self_attention = Attention(dim, dimensions.heads)
        self.cross_attention = Attention(dim, dimensions.heads)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, dimensions.ffn_dim), nn.GELU(), nn.Linear(dimensions.ffn_dim, dim)
        )

    def forward(self, tokens: Tensor, position: Tensor, modulation: Tensor, text: Tensor) -> Tensor:
        """(B, S, D)"""
        normed = self.norm(tokens)
        tokens = tokens + self.self_attention(normed, normed, position)
        tokens = tokens + self.cross_attention(self.norm(tokens), text)
        scale, shift = modulation.unsqueeze(2).unbind(1)
        return tokens + self.feed_forward(self.norm(tokens) * (1 + scale) + shift)  # type: ignore[no-any-return]


class ToyTransformer(nn.Module):
    """The denoiser: (B, C, F', h, w), times (B,) in [0, 1000] and text (B, L, T) to a velocity like the latents."""

    time_scale: Tensor

    def __init__(self, dimensions: ToyDimensions) -> None:
        super().__init__()
        self.dimensions = dimensions
        dim, patch = dimensions.dim, torch.Size(dimensions.patch).numel()
        self.patch_in = nn.Linear(dimensions.channels * patch, dim)
        self.text_in = nn.Linear(dimensions.text_dim, dim)
        self.time_in = nn.Linear(FREQUENCIES, 2 * dim)
        self.blocks = nn.ModuleList(Block(dimensions) for _ in range(dimensions.blocks))
        self.norm_out = nn.LayerNorm(dim)
        self.patch_out = nn.Linear(dim, dimensions.channels * patch)
        # Computed, not stored: building on the meta device must leave it real.
        self.register_buffer("time_scale", torch.tensor(1 / 100), persistent=False)

    def forward(self, latents: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """The plain forward, without the block driver: the reference that the driver is held to."""
        tokens, position, modulation, context, grid = self.embed(latents, time, text)
        for block in self.blocks:
            tokens = block(tokens, position, modulation, context)
        return self.unembed(tokens, modulation, grid)

    def embed(self, latents: Tensor, time: Tensor, text: Tensor) -> Embedded:
        """What enters the blocks."""
        batch, channels, *size = latents.shape
        steps = self.dimensions.patch
        grid = (size[0] // steps[0], size[1] // steps[1], size[2] // steps[2])
        cut = latents.reshape(batch, channels, grid[0], steps[0], grid[1], steps[1], grid[2], steps[2])
        tokens = self.patch_in(cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3))
        moments = self.time_in(waves(time * self.time_scale, FREQUENCIES))
        return Embedded(tokens, self.positions(grid), moments.unflatten(1, (2, -1)), self.text_in(text), grid)

    def positions(self, grid: tuple[int, int, int]) -> Tensor:
        """(1, S, D): a third of the width for each axis of the grid."""
        axes = torch.meshgrid(*(torch.arange(size, device=self.time_scale.device) for size in grid), indexing="ij")
        third = self.dimensions.dim // 3
        return torch.cat([waves(axis.flatten(), third) for axis in axes], dim=1).unsqueeze(0)

    def unembed(self, tokens: Tensor, modulation: Tensor, grid: tuple[int, ...]) -> Tensor:
        """(B, C, F', h, w) from tokens (B, S, D)."""
        scale, shift = modulation.unsqueeze(2).unbind(1)
        patches = self.patch_out(self.norm_out(tokens) * (1 + scale) + shift)
        steps = self.dimensions.patch
        cut: Tensor = patches.unflatten(2, (self.dimensions.channels, *steps)).unflatten(1, grid)
        cut = cut.permute(0, 4, 1, 5, 2, 6, 3, 7)
        return cut.reshape(*cut.shape[:2], grid[0] * steps[0], grid[1] * steps[1], grid[2] * steps[2])


class ToyVae(nn.Module):
    """Clips to latents and back, linearly: each latent is what two matrices make of 4 frames of 8 x 8 pixels.

    The first frame stands alone, as in video VAEs: it is preceded by copies of itself.
    """

    def __init__(self) -> None:
        super().__init__()
        pixels = 3 * LATENTS.stride_time * LATENTS.stride_space**2
        self.encoder = nn.Linear(pixels, LATENTS.channels, bias=False)
        self.decoder = nn.Linear(LATENTS.channels, pixels, bias=False)

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents (B, C, F', h, w) of ``pixels`` (B, 3, F, H, W) in [-1, 1], F = 4k + 1."""
        time, space = LATENTS.stride_time, LATENTS.stride_space
        padded = torch.cat([pixels[:, :, :1]] * (time - 1) + [pixels], dim=2)
        cells = padded.unflatten(4, (-1, space)).unflatten(3, (-1, space)).unflatten(2, (-1, time))
        latents = self.encoder(cells.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4))
        return latents.permute(0, 4, 1, 2, 3)  # type: ignore[no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, F, H, W) of ``latents`` (B, C, F', h, w)."""
        time, space = LATENTS.stride_time, LATENTS.stride_space
        cells = self.decoder(latents.permute(0, 2, 3, 4, 1)).unflatten(4, (3, time, space, space))
        pixels = cells.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return pixels[:, :, time - 1 :]  # type: ignore[no-any-return]


class ToyTextEncoder(nn.Module):
    """Words to states, each word by its hash; the end of the caption is a state of its own."""

    def __init__(self, width: int, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.mix = nn.Linear(width, width)

    def forward(self, caption: str) -> Tensor:
        """States (L, T) of one caption, L its words and one, at most ``limit``."""
        words = [1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in caption.split()]
        tokens = torch.tensor([*words[: self.limit - 1], 0], device=self.mix.weight.device)
        return torch.tanh(self.mix(self.embedding(tokens)))
