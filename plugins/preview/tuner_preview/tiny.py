"""The decoder of a tiny video autoencoder, frame by frame: latents to pixels in a fraction of the VAE's time.

TAEHV (Ollin Boer Bohan, github.com/madebyollin/taehv): 2D convolutions, blocks that also see the same place one frame
before, and growth in time by 1x1 convolutions. It is causal, so that one latent frame at a time gives the same as all
at once and needs the memory of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from tuner_preview.layout import COLOURS, FIRST, LEVELS, MEMORIES, Layout


class Squash(nn.Module):
    """Latents softly limited to (-3, 3)."""

    def forward(self, latents: Tensor) -> Tensor:
        """The same shape."""
        squashed: Tensor = torch.tanh(latents / 3) * 3
        return squashed


class Memory(nn.Module):
    """A residual block over a frame and what the block was given for the frame before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, frames: Tensor, before: Tensor) -> Tensor:
        """(N, C, H, W), of ``frames`` and those one ``before`` each of them."""
        changed: Tensor = self.conv(torch.cat([frames, before], dim=1))
        return (changed + frames).relu()


class Grow(nn.Module):
    """Several frames of each one."""

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.times = times
        self.conv = nn.Conv2d(width, width * times, 1, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """(N * times, C, H, W), in the order of time, of (N, C, H, W)."""
        grown: Tensor = self.conv(frames).unflatten(1, (self.times, -1)).flatten(0, 1)
        return grown


class TinyDecoder(nn.Module):
    """The decoder of one layout; its parameters are named as in the public files."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        stack: list[nn.Module] = [Squash(), nn.Conv2d(layout.channels, layout.widths[0], 3, padding=1), nn.ReLU()]
        assert isinstance(stack[FIRST], nn.Conv2d)
        for level in range(LEVELS):
            width, narrower = layout.widths[level], layout.widths[level + 1]
            stack += [Memory(width) for _ in range(MEMORIES)]
            stack += [nn.Upsample(scale_factor=2), Grow(width, layout.grows[level])]
            stack += [nn.Conv2d(width, narrower, 3, padding=1, bias=False)]
        stack += [nn.ReLU(), nn.Conv2d(layout.widths[-1], COLOURS * layout.patch**2, 3, padding=1)]
        self.decoder = nn.Sequential(*stack)

    @classmethod
    def read(cls, path: Path, layout: Layout, dtype: torch.dtype) -> TinyDecoder:
        """The decoder in a safetensors file of that ``layout``, on the CPU."""
        from safetensors import safe_open

        with torch.device("meta"):
            made = cls(layout)
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name).to(dtype) for name in layout.shapes()}
        made.load_state_dict(weights, assign=True)
        return made.requires_grad_(False).eval()

    def frames(self, latents: Tensor) -> Iterator[Tensor]:
        """Pieces (n, 3, H, W) in [0, 1] of the clip of normalised ``latents`` (F', C, h, w), in the order of time.

        What the first latent frame gives too much is left out, as the VAE makes one frame of it.
        """
        seen: dict[int, Tensor] = {}
        for number, latent in enumerate(latents):
            pixels = self._decoded(latent.unsqueeze(0), seen)
            yield pixels[self.layout.stride_time - 1 :] if number == 0 else pixels

    def _decoded(self, frames: Tensor, seen: dict[int, Tensor]) -> Tensor:
        """Frames (n, 3, H, W) of one latent frame (1, C, h, w); ``seen`` is what each block remembers."""
        for place, layer in enumerate(self.decoder):
            if isinstance(layer, Memory):
                last = seen.get(place, torch.zeros_like(frames[:1]))
                seen[place] = frames[-1:]
                frames = layer(frames, torch.cat([last, frames[:-1]]))
            else:
                frames = layer(frames)
        return functional.pixel_shuffle(frames, self.layout.patch).clamp(0, 1)
