"""The toy network as the block driver sees it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from tuner.blocks import BlockStack, Stream
from tuner.testing.toy.networks import ToyTransformer


class ToyStack(BlockStack):
    """Embed, blocks, unembed of a :class:`ToyTransformer`."""

    module: ToyTransformer

    def __init__(self, module: ToyTransformer) -> None:
        super().__init__(module, list(module.blocks))

    def embed(self, latents: Tensor, time: Tensor, text: Tensor) -> Stream:
        """The arguments of the network's forward, as a stream."""
        embedded = self.module.embed(latents, time, text)
        return Stream(
            tokens=embedded.tokens,
            per_token={"position": (embedded.position, 1)},
            shared={"modulation": embedded.modulation, "text": embedded.text},
            grid=embedded.grid,
        )

    def block(self, block: nn.Module, stream: Stream) -> Stream:
        """One block."""
        position, _ = stream.per_token["position"]
        tokens = block(stream.tokens, position, stream.shared["modulation"], stream.shared["text"])
        return replace(stream, tokens=tokens)

    def unembed(self, stream: Stream) -> Tensor:
        """The network's prediction, (B, C, F', h, w)."""
        return self.module.unembed(stream.tokens, stream.shared["modulation"], stream.grid)
