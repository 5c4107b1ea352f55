"""Feed-forward layers in chunks of tokens, each recomputed in backward: less memory, the same gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from tuner import Plugin, PluginConfig, hookimpl, key

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig
    from tuner.model import Model, Transform
    from tuner.run import Run
    from tuner.spec import ModelSpec
    from tuner.workload import Workload

TOKENS_PER_UNIT = 1024
"""Tokens in a chunk for each unit of ``feed_forward_chunk_size``."""


class ChunkedFeedForwardConfig(PluginConfig):
    """The keys of chunked feed-forward."""

    enable_chunked_feed_forward: bool = key(
        False,
        "Compute each feed-forward layer in chunks of tokens, and each chunk again in backward, instead of keeping its "
        "wide intermediates: less memory for one more feed-forward per block.",
        effect="memory",
    )
    feed_forward_chunk_size: int = key(
        2,
        "Tokens in a chunk, in units of 1024: 2 is at most 2048 tokens at a time. Clips with no more tokens than that "
        "are computed as without chunks.",
        ge=1,
        environment="WAN_FEED_FORWARD_CHUNK_SIZE",
    )


class ChunkedFeedForwardPlugin(Plugin[ChunkedFeedForwardConfig]):
    """Feed-forward layers in chunks of tokens, each recomputed in backward: less memory, the same gradients."""

    requires = frozenset({"model-family"})
    levers: ClassVar[tuple[Mapping[str, Any], ...]] = ({"enable_chunked_feed_forward": True},)
    Config = ChunkedFeedForwardConfig

    def is_active(self, core: CoreConfig) -> bool:
        """Only when switched on."""
        return self.config.enable_chunked_feed_forward

    @hookimpl
    def configure(self, run: Run) -> None:
        """Say so where a chunk size is set that nothing uses."""
        if "feed_forward_chunk_size" in run.explicit and not self.config.enable_chunked_feed_forward:
            run.log.warning("feed_forward_chunk_size has no effect without enable_chunked_feed_forward")

    @hookimpl
    def estimate(self, run: Run, spec: ModelSpec, workload: Workload) -> Mapping[str, Any]:
        """Tokens that a feed-forward layer computes at a time."""
        if not self.config.enable_chunked_feed_forward:
            return {}
        return {"feed_forward_tokens": self.config.feed_forward_chunk_size * TOKENS_PER_UNIT}

    @hookimpl
    def model_transforms(self, run: Run, model: Model) -> Iterable[Transform]:
        """Rewrite the feed-forward layers of every network."""
        if not self.config.enable_chunked_feed_forward:
            return []
        from tuner_chunked_ff.chunk import transform

        return [transform(self.config.feed_forward_chunk_size * TOKENS_PER_UNIT)]
