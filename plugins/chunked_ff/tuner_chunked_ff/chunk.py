"""The rewrite of a feed-forward module.

Chunks alone lower only the peak inside the layer: autograd would still keep the wide intermediates of
every chunk. So each chunk is checkpointed, and what is kept for backward is the layer's input.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tuner.errors import PluginError
from tuner.model import Network, Stage, Transform


def transform(chunk_tokens: int) -> Transform:
    """The transform that chunks every feed-forward module of a network."""

    def apply(network: Network) -> None:
        if not network.feed_forwards:
            raise PluginError(
                f"network {network.name!r} has no feed-forward modules that its family allows to be chunked",
                where="enable_chunked_feed_forward",
                remedy="set enable_chunked_feed_forward to false for this model",
            )
        for name, module in network.feed_forwards.items():
            install(module, chunk_tokens, name)

    return Transform(Stage.REWRITE, "chunked feed-forward", frozenset({"feed_forward"}), apply)


def install(module: nn.Module, chunk_tokens: int, name: str = "feed-forward") -> None:
    """Make ``module``, token-wise (B, S, D) -> (B, S, D), compute at most ``chunk_tokens`` tokens at a time.

    A bound method on the instance: class and state dict stay, and a deep copy runs the copy's weights.
    Raises PluginError where the instance's forward has already been replaced.
    """
    if "forward" in vars(module):
        raise PluginError(
            f"the forward of {name!r} has already been rewritten",
            where="enable_chunked_feed_forward",
            remedy="leave out one of the plugins that rewrite feed-forward layers",
        )
    object.__setattr__(module, "_tuner_chunk_tokens", chunk_tokens)
    object.__setattr__(module, "forward", MethodType(_chunked_forward, module))


def remove(module: nn.Module) -> None:
    """Give ``module`` its class's forward back."""
    del module.forward, module._tuner_chunk_tokens


def _chunked_forward(self: Any, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    plain = type(self).forward
    chunks = -(-tokens.shape[1] // self._tuner_chunk_tokens)
    if chunks <= 1:
        result: Tensor = plain(self, tokens, *args, **kwargs)
        return result

    def compute(chunk: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return checkpoint(plain, self, chunk, *args, use_reentrant=False, **kwargs)  # type: ignore[no-any-return]
        return plain(self, chunk, *args, **kwargs)  # type: ignore[no-any-return]

    # Equal chunks, not full ones and a remainder: a sliver of a few tokens costs a whole pass over the weights.
    return torch.cat([compute(chunk) for chunk in tokens.tensor_split(chunks, dim=1)], dim=1)
