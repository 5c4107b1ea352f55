"""A toy denoiser in float64, and its block stack: every kind of companion a real family has.

Rotary cosines have their token axis at 1 and a batch axis of 1, sines have it at 2, modulation is per
sample and token and comes from a trained embedder, text is shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tuner.blocks import BlockStack, Stream

GRID = (3, 2, 2)
TOKENS = 12
DIM = 8
HEADS = 2
BLOCKS = 5
BATCH = 2


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` (B, S, H, E) turned by cos (., S, 1, E) and sin (., 1, S, E)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin.transpose(1, 2)


class ToyBlock(nn.Module):
    """Modulated self-attention with rotary positions, cross-attention to text, feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.query = nn.Linear(DIM, DIM)
        self.text = nn.Linear(DIM, 2 * DIM)
        self.feed_forward = nn.Sequential(nn.Linear(DIM, 3 * DIM), nn.GELU(), nn.Linear(3 * DIM, DIM))

    def forward(self, tokens: Tensor, text: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = F.layer_norm(tokens, (DIM,)) * (1 + modulation)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        tokens = tokens + self.attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        k, v = self.text(text).unflatten(-1, (2, HEADS, -1)).unbind(2)
        tokens = tokens + self.attend(self.query(tokens).unflatten(-1, (HEADS, -1)), k, v)
        return tokens + self.feed_forward(tokens) * modulation

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ToyNet(nn.Module):
    """Its own ``forward`` is a plain loop: the reference."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(3, DIM)
        self.time = nn.Linear(1, DIM)
        self.caption = nn.Linear(4, DIM)
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(BLOCKS))
        self.head = nn.Linear(DIM, 3)
        angles = torch.outer(torch.arange(TOKENS), torch.tensor([1.0, 0.1])).repeat(1, 2).double()
        self.register_buffer("cos", angles.cos()[None, :, None], persistent=False)
        self.register_buffer("sin", angles.sin()[None, None], persistent=False)
        self.double()

    def forward(self, latents: Tensor, times: Tensor, text: Tensor) -> Tensor:
        """(B, S, 3), (B, S), (B, L, 4) -> (B, S, 3)."""
        tokens, modulation, caption = self.patch(latents), self.time(times.unsqueeze(-1)), self.caption(text)
        for block in self.blocks:
            tokens = block(tokens, caption, modulation, self.cos, self.sin)
        return self.head(tokens)


class ToyStack(BlockStack):
    """The same network, told to the block driver."""

    module: ToyNet

    def embed(self, latents: Tensor, times: Tensor, text: Tensor) -> Stream:
        net = self.module
        return Stream(
            net.patch(latents),
            {"cos": (net.cos, 1), "sin": (net.sin, 2), "mod": (net.time(times.unsqueeze(-1)), 1)},
            {"text": net.caption(text)},
            GRID,
        )

    def block(self, block: nn.Module, stream: Stream) -> Stream:
        cos, sin, modulation = (stream.per_token[name][0] for name in ("cos", "sin", "mod"))
        return replace(stream, tokens=block(stream.tokens, stream.shared["text"], modulation, cos, sin))

    def unembed(self, stream: Stream) -> Tensor:
        return self.module.head(stream.tokens)


@dataclass
class Toy:
    """A network, its stack, and inputs."""

    net: ToyNet
    stack: ToyStack
    inputs: tuple[Tensor, Tensor, Tensor]

    def gradients(self) -> dict[str, Tensor | None]:
        """Gradients by parameter name, taken away from the network."""
        found = {name: parameter.grad for name, parameter in self.net.named_parameters()}
        self.net.zero_grad()
        return found

    def freeze_all_but(self, *blocks: int) -> None:
        """As LoRA leaves a network: only these blocks are trained."""
        self.net.requires_grad_(False)
        for index in blocks:
            self.net.blocks[index].requires_grad_(True)


@pytest.fixture
def make_toy() -> Callable[[], Toy]:
    def make() -> Toy:
        torch.manual_seed(0)
        net = ToyNet()
        inputs = (torch.randn(BATCH, TOKENS, 3), torch.rand(BATCH, TOKENS), torch.randn(BATCH, 5, 4))
        return Toy(net, ToyStack(net, net.blocks), tuple(x.double() for x in inputs))  # type: ignore[arg-type]

    return make


@pytest.fixture
def toy(make_toy: Callable[[], Toy]) -> Toy:
    return make_toy()


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Bit-equality holds at one thread count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
